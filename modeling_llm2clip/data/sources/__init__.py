"""Readers of one format each, which yield raw records."""
