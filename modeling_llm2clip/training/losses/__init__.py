"""Losses of the alignment, one file each."""
