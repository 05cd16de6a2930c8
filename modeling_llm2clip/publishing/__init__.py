"""Building from towers, checking, saving and publishing."""
