"""Frozen towers and the one forward pass."""
