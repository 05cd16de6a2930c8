"""Which process computes which shard of an output, and how a run stops in good order."""
