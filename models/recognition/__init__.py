"""Finding the norms of a PyTorch model by what they compute."""
