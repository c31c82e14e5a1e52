"""What every room may use: errors, digests, artifacts, the store, stages and recipes."""
