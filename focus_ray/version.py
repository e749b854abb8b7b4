"""The version of focus_ray."""

__version__ = "0.1.0"
