"""Datasets that models are evaluated on, read as their publishers ship them."""
