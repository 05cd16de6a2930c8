<<<<<<< HEAD
"""One module a command: the flags it takes, and the public function it calls."""
=======
"""The command line: one module per command, flags generated from `configs`."""
>>>>>>> configs
