"""Two towers into an untrained model."""
