"""What is read of Serve's private parts, in one place; read in Ray 2.60.0, and looked for before a replica starts.

Serve's router sends requests for a model to the replicas that say they hold it. No public call takes a model off that list
when memory runs short, so its multiplexer is told directly.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from focus_ray.cluster.ray_private import RAY_VERSION, check_private_parts
from focus_ray.errors import TrainingError

_ATTRIBUTE = "__serve_multiplex_wrapper"  # of a replica, once `serve.multiplexed` was called on it
_PUSH = "_push_multiplexed_replica_info"  # set: the list is sent to the router soon
PARTS = {"which models a replica holds": ("ray.serve.multiplex", "_ModelMultiplexWrapper")}


def check_serve_parts(parts: dict[str, tuple[str, str]] = PARTS) -> None:
    """Looks whether all parts are where they were. Raises: TrainingError: the installed Ray has moved one."""
    check_private_parts(parts)
    import ray
    from ray.serve import api, multiplex

    # they are set on instances, so the class does not have them, and only the source tells
    for module, name in ((multiplex, "self.models"), (multiplex, _PUSH), (api, _ATTRIBUTE)):
        if not re.search(rf"{re.escape(name)}\b", inspect.getsource(module)):
            raise TrainingError(
                f"Ray {ray.__version__}: {module.__name__} no longer knows {name!r}, which tells which models a replica "
                f"holds; it was there in Ray {RAY_VERSION}: install that version, or a newer focus_ray"
            )


def forget_model(replica: Any, key: str) -> None:
    """Takes a model off the list of those that a replica holds, so that requests for it go where it still is.

    Does nothing where the replica has loaded none through `serve.multiplexed` yet.

    Raises: AttributeError: Serve has changed; `check_serve_parts` says so beforehand.
    """
    if not hasattr(replica, _ATTRIBUTE):
        return
    multiplexer = getattr(replica, _ATTRIBUTE)
    multiplexer.models.pop(key, None)
    if not hasattr(multiplexer, _PUSH):
        raise AttributeError(f"Serve's multiplexer has no {_PUSH}: Ray {RAY_VERSION} had it")
    setattr(multiplexer, _PUSH, True)
