"""The embedding store: its files, reading and writing."""
