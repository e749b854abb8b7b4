"""Package for the alignment of images and features: congealing, and spatial transformers that a loss trains."""
