"""Streams records from shards that are read sequentially."""
