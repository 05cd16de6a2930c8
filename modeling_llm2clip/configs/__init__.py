"""Options of the library, which also define the flags, YAML fields, defaults and help texts."""
