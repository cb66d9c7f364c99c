"""What `data_prep.inspect` shows."""
