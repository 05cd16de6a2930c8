"""Converts official checkpoints to model folders; imports nothing, so `--help` is quick."""
