"""Images with captions, as they lie in a user's folder."""
