"""What a model is worth: validation loss, samples, plots."""
