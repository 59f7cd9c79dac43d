"""The norms of a model: each alone, and the segments between them."""
