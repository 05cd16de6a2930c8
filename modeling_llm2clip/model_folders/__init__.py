"""Finds, loads and writes model folders: weights, card, fingerprint, golden embeddings."""
