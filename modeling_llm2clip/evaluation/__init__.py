"""How good the embeddings are. The metrics know no model."""
