"""Drawn sample parts with drawn defects."""
