"""Losses of the alignment, and the terms beside them."""
