"""Densities: models of normal embeddings that measure how far a new embedding is from them. Each density has one file."""
