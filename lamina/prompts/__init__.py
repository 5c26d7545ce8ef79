"""What is learned inside a tower."""
