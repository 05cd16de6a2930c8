"""Captions: groups, text pairs and sentence views."""
