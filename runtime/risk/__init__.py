"""Which norms are at risk in which dtype."""
