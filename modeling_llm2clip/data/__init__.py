"""Records and their sources, the embedding store, and the files that hold them."""
