"""Join the processes of a run, and stop runs gracefully."""
