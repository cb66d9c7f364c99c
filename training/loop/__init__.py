"""The run, its end, and requests to stop it."""
