"""Captions: groups and pairs of them, and those that others published."""
