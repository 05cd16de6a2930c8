"""The embedding store: its files and how to read them."""
