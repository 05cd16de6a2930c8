"""The options of the library: flags, YAML, defaults and help are generated from them."""
