"""Embeddings and their correspondence in, ranks and numbers out. Knows no model."""
