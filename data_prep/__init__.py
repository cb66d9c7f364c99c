"""Text in, token shards out. Needs no torch."""
