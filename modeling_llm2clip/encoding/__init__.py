"""Many captions or images into embeddings, fast and without a trace of the batch they were in."""
