"""Image addresses, and reading images from files that hold many."""
