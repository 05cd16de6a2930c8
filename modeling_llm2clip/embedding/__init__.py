"""Compute embeddings of texts and images and store them: `extract` and `embed`."""
