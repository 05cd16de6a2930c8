"""The whole method from one YAML file."""
