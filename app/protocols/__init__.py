"""Other languages for the same capabilities."""
