"""Run the whole method from one YAML file."""
