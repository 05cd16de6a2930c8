"""Files that an export writes for hosts; each runs there without this package."""
