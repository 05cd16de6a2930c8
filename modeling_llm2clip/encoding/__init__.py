"""Many captions or pictures into vectors, fast and without a trace of the batch they were in."""
