"""Checks that a model folder, or an endpoint, gives the embeddings it was written with."""
