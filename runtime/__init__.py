"""Running an exported model, comparing it with PyTorch, and measuring it."""
