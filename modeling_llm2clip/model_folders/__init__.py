"""Find, load and write model folders: weights, card, fingerprint, golden embeddings."""
