"""Records of a run: logs, metrics, environment."""
