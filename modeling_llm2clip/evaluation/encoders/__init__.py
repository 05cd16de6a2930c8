"""What is evaluated, whatever it is: texts and images in, embeddings out, every choice told."""
