"""What is measured: from embeddings to scores and their protocol."""
