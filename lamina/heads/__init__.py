"""Features to scores over the classes met so far."""
