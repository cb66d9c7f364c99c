"""What is recorded and watched during a run."""
