"""Transforms, and what finds them."""
