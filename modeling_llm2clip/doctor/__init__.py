"""Checks that a model folder or an endpoint reproduces the embeddings recorded at export."""
