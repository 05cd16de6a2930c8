"""Serves a model over HTTP, with dynamic batching and the request schemas of common clients."""
