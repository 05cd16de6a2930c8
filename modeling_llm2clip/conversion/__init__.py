"""Official checkpoints into model folders; imports nothing, so that `--help` is quick."""
