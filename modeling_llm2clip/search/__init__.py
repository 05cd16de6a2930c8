"""Search images by text or image, and label them."""
