"""Where images are, and their bytes out of files that hold many."""
