"""Prompt-based continual learning of frozen vision transformers."""

__version__ = "0.1.0"
