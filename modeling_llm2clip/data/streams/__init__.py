"""Records of shards that are read one after the other."""
