"""One file a format: each yields the raw records of its source, and knows no other."""
