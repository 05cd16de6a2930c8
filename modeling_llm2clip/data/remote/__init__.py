"""Files that are not on this machine: listing them, reading them, trying again."""
