"""Pictures found by sentences."""
