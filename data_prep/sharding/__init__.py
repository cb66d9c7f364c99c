"""Token shards and their manifest."""
