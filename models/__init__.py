"""What a norm is, and the models that have them."""
