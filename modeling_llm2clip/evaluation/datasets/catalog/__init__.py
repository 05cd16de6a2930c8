"""The published datasets, and the readers of captions."""
