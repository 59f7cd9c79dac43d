"""An exported model held against PyTorch."""
