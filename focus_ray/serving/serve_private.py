"""All uses of private code of Ray Serve (read in Ray 2.60.0); `check_private_serve_api` checks it before a replica starts.

The router of Serve sends requests for a model to the replicas that list this model. No public function removes a model from the
list when the model is dropped to free memory. `unregister_model` therefore changes the list itself, which is in Serve's
multiplexer (the object of a replica that manages its models).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from focus_ray.cluster.ray_private import RAY_VERSION, check_private_attributes
from focus_ray.errors import TrainingError

_WRAPPER_ATTRIBUTE = "__serve_multiplex_wrapper"  # of replicas that have called a `serve.multiplexed` method
_PUSH_FLAG = "_push_multiplexed_replica_info"  # if True, Serve soon sends the list to the router


def check_private_serve_api() -> None:
    """Checks that the installed Ray still has all private classes and attributes that this module uses.

    Raises: TrainingError: the installed Ray lacks a class or attribute.
    """
    check_private_attributes({"which models a replica holds": ("ray.serve.multiplex", "_ModelMultiplexWrapper")})
    import ray
    from ray.serve import api, multiplex

    # these attributes exist only on instances, not on the class, so the source is searched for them
    for module, name in ((multiplex, "self.models"), (multiplex, _PUSH_FLAG), (api, _WRAPPER_ATTRIBUTE)):
        if not re.search(rf"{re.escape(name)}\b", inspect.getsource(module)):
            raise TrainingError(
                f"Ray {ray.__version__}: {module.__name__} no longer has {name!r}, which lists the models of a replica; "
                f"Ray {RAY_VERSION} has it: install that version, or a newer focus_ray"
            )


def unregister_model(replica: Any, key: str) -> None:
    """Removes a model from Serve's list of a replica's models, so that requests for the model go to other replicas that have it.

    Does nothing if the replica has not loaded a model through `serve.multiplexed` yet.

    Raises: AttributeError: Serve has changed; `check_private_serve_api` finds this earlier.
    """
    if not hasattr(replica, _WRAPPER_ATTRIBUTE):
        return
    multiplexer = getattr(replica, _WRAPPER_ATTRIBUTE)
    multiplexer.models.pop(key, None)
    if not hasattr(multiplexer, _PUSH_FLAG):
        raise AttributeError(f"Serve's multiplexer has no {_PUSH_FLAG}: Ray {RAY_VERSION} had it")
    setattr(multiplexer, _PUSH_FLAG, True)
