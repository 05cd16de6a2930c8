"""Models behind one interface: texts and images in, embeddings out."""
