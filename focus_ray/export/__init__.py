"""Exports the whole scorer of a bundle to model files for another runtime, and compares the export with PyTorch."""
