"""Searches for good settings with Ray Tune: a sweep runs trials, each with other settings, and compares their scores."""
