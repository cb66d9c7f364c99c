"""The training loop around Accelerate."""
