"""A model over HTTP: dynamic batching, and the request schemas that clients use."""
