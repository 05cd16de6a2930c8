"""Records as columns: their index, where it comes from, hashes and splits."""
