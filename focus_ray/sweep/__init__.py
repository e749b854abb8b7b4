"""Searches for good settings with Ray Tune."""
