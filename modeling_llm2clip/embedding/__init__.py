"""The path from texts and images to stored embeddings: `extract`, `embed`, their shards."""
