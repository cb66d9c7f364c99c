"""Resume, recovery from divergence, preflight."""
