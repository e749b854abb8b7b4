"""What is known of normal embeddings, and how far a new one is from it: one file a density."""
