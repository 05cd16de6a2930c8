"""Exports models, states results on their cards, and uploads them to the Hub."""
