"""The sets that are measured on: one card each, read as their publishers ship them."""
