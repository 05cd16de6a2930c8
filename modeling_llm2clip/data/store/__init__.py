"""The embedding store: the files and how to read them."""
