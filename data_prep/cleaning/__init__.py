"""Raw documents in, cleaned ones out, on datatrove."""
