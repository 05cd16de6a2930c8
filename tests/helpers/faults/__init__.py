"""Trouble on purpose: each harness brings one kind of trouble to every command, input or output."""
