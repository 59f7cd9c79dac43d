"""The custom operators and what implements them."""
