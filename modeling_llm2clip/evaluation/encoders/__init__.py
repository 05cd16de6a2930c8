"""What is evaluated: texts and images in, embeddings out, with a description of every choice."""
