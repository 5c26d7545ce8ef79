"""Data sets of transfer learning: one task with images to learn from, to choose settings on, and to test."""
