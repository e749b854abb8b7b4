"""Industrial anomaly detection from normal images only, trained, searched and served on Ray.

A reconstruction of "Focus Your Distribution" (arXiv 2110.04538). The package itself imports nothing heavy: every
module loads torch or Ray only where it needs them.
"""

__version__ = "0.1.0"
