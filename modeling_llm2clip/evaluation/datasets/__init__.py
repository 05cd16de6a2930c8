"""Evaluation datasets, read in their publishers' own formats."""
