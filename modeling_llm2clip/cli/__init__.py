"""One module a command: the flags it takes, and the public function it calls."""
