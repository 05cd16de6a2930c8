"""Lists and reads files on other machines, and retries failed requests."""
