"""Exports the whole scorer of a bundle to one file for another runtime, and checks the export against PyTorch."""
