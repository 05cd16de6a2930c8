"""Models of any type behind one interface: texts and images in, embeddings out."""
