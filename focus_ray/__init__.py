"""Industrial anomaly detection from normal images only, trained, searched and served on Ray.

A reconstruction of "Focus Your Distribution" (arXiv 2110.04538). The package itself imports nothing heavy: every
module loads torch or Ray only where it needs them.
"""

import os

# read by OpenMP as torch loads: threads that spin while they wait made a fit eight times slower on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
