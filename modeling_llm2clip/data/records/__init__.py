"""Records as columns: reading them from sources, their index, hashes and splits."""
