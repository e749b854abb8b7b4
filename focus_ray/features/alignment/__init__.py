"""Spatial transformations: congealing, and transformers that a loss trains."""
