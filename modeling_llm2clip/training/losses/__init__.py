"""Losses for the alignment, and additional terms."""
