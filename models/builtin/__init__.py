"""The models that are shipped: a readable decoder, and a small one trained to add numbers."""
