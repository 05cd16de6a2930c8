"""One file a family of checkpoints: how it names its weights, and what vision tower they make."""
