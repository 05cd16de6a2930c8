"""Ranks and scores of embeddings, independent of any model."""
