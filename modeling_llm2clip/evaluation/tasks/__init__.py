"""What is measured: one module a task, each from embeddings to scores with their protocol."""
