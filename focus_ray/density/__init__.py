"""Package of the densities: models of normal embeddings that measure how far a new embedding is from the normal ones."""
