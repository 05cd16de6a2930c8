"""Ranks and scores of embeddings; the metrics know no model."""
