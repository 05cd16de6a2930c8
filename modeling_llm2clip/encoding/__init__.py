"""Texts and images into embeddings: one facade, which takes loaded models and knows no folders."""
