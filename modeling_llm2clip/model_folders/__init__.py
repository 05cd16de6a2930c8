"""What a model folder is: find, load, write, fingerprint, card."""
