"""Images and data sets: ingestion, storage, reading, splits, and shards for workers. Does not import Ray."""
