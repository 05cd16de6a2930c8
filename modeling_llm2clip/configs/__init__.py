"""Every dataclass of options: flags, YAML, defaults and help are generated from them."""
