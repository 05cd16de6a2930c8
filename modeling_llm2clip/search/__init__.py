"""Images found and labeled by texts."""
