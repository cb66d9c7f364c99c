"""What is evaluated during a run: each evaluation in a file of its own."""
