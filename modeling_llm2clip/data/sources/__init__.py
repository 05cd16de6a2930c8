"""One reader per format; all readers yield raw records."""
