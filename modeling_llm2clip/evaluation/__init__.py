"""Evaluate any model on any dataset and record the protocol behind every score."""
