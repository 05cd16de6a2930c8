"""Images found by sentences."""
