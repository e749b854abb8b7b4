"""Configurations: load, override, check."""
