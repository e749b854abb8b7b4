"""Searches for good settings: trials on a Ray cluster, proposed by a grid, at random or by Optuna."""
