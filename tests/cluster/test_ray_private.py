"""All private parts of Ray exist, and a version of Ray without a part is refused with a clear message."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from focus_ray.cluster import ray_private
from focus_ray.cluster.connect import connect_to_ray
from focus_ray.errors import TrainingError
from focus_ray.serving import serve_private


def test_the_installed_ray_has_all_private_parts() -> None:
    ray_private.check_private_attributes()
    serve_private.check_private_serve_api()


def test_a_ray_without_a_part_joins_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.state

    monkeypatch.delattr(type(ray._private.state.state), "get_max_resources_from_cluster_config")
    with pytest.raises(TrainingError, match=r"get_max_resources_from_cluster_config.* the limits of the autoscaler"):
        connect_to_ray()


def test_a_serve_that_keeps_its_models_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_private, "_WRAPPER_ATTRIBUTE", "__moved")
    with pytest.raises(TrainingError, match=r"ray\.serve\.api.*'__moved'"):
        serve_private.check_private_serve_api()


@pytest.mark.parametrize("name", ["self.models", "_push_multiplexed_replica_info"])
def test_a_renamed_part_of_the_multiplexer_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import inspect

    from ray.serve import multiplex

    source = inspect.getsource
    renamed = re.sub(rf"{re.escape(name)}\b", f"{name}_elsewhere", source(multiplex))
    assert name in renamed
    monkeypatch.setattr(inspect, "getsource", lambda module: renamed if module is multiplex else source(module))
    with pytest.raises(TrainingError, match=rf"ray\.serve\.multiplex.*'{re.escape(name)}'"):
        serve_private.check_private_serve_api()


def test_an_unloaded_model_is_removed_from_the_list_of_serve_and_the_list_is_sent() -> None:
    multiplexer = SimpleNamespace(models={"one": 1, "two": 2}, _push_multiplexed_replica_info=False)
    replica = SimpleNamespace()
    serve_private.unregister_model(replica, "one")  # a replica without models forgets nothing
    setattr(replica, "__serve_multiplex_wrapper", multiplexer)
    serve_private.unregister_model(replica, "one")
    assert multiplexer.models == {"two": 2}
    assert multiplexer._push_multiplexed_replica_info
    del multiplexer._push_multiplexed_replica_info
    with pytest.raises(AttributeError, match=r"Ray 2\.60\.0 had it"):
        serve_private.unregister_model(replica, "one")
