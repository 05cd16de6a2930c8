"""Options of the library, from which flags, YAML, defaults and help texts are generated."""
