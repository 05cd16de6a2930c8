"""Evaluates any model on any dataset, with the protocol of every score."""
