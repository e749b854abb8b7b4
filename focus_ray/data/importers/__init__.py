"""Importers: each file reads one folder layout and turns it into a plan of samples."""
