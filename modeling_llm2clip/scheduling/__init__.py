"""Processes of a run, and graceful stopping."""
