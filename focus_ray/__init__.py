"""Industrial anomaly detection from normal images only, trained, searched and served on Ray.

    model = focus_ray.fit("photographs of good parts/")
    model.inspect("new.png").verdict

A reconstruction of "Focus Your Distribution" (arXiv 2110.04538). The package itself imports nothing heavy: every
module loads torch or Ray only where it needs them.
"""

import os
from typing import TYPE_CHECKING, Any

from focus_ray.version import __version__

if TYPE_CHECKING:
    from focus_ray.api import Model, fit, load
    from focus_ray.estimator import AnomalyDetector

# read by GNU's OpenMP as torch loads: threads that spin for long while they wait made a fit eight times slower on a busy machine,
# threads that never spin a fifth slower on an idle one
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

__all__ = ["AnomalyDetector", "Model", "__version__", "fit", "load"]
_MODULES = {"Model": "api", "fit": "api", "load": "api", "AnomalyDetector": "estimator"}


def __getattr__(name: str) -> Any:
    """What needs torch comes when it is asked for. Raises: MissingPackageError: it comes with an extra that is not installed."""
    if name in _MODULES:
        from importlib import import_module

        from focus_ray.errors import find_missing_package_error

        try:
            return getattr(import_module(f"focus_ray.{_MODULES[name]}"), name)
        except ModuleNotFoundError as error:
            raise find_missing_package_error(error) or error from None
    raise AttributeError(f"module 'focus_ray' has no attribute {name!r}")
