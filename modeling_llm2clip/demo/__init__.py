"""Run the whole method on real towers, from two towers to a searched image folder."""
