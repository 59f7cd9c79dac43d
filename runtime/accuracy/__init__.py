"""How far an array is from the reference, and whether that is near enough."""
