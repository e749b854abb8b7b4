"""Sends commands to a Ray cluster as jobs."""
