"""What keeps old knowledge in place."""
