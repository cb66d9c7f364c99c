"""Data, model, optimizer and step."""
