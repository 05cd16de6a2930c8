"""One file a format: what lies in a publisher's files, as entries, with every error noted."""
