"""Tasks: from embeddings to scores and their protocol."""
