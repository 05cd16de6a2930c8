"""Records, their sources, the embedding store, and the files they are in."""
