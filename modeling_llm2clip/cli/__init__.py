"""The command line: one module per command, flags generated from `configs`."""
