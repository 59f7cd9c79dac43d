"""What a model is run with."""
