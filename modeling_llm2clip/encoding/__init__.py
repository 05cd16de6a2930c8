"""Turns texts and images into embeddings with loaded models; knows nothing about folders."""
