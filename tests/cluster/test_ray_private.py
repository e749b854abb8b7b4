"""Ray's private parts are where they were read, and a version that has moved one is told at once."""

from __future__ import annotations

import re

import pytest

from focus_ray.cluster import ray_private
from focus_ray.cluster.connect import connect
from focus_ray.errors import TrainingError
from focus_ray.serving import serve_private


def test_the_installed_ray_has_all_that_is_read_of_it() -> None:
    ray_private.check_private_parts()
    serve_private.check_serve_parts()


@pytest.mark.parametrize("part", ray_private.PARTS)
def test_a_part_that_has_moved_is_named_with_the_version_that_had_it(part: str) -> None:
    module, path = ray_private.PARTS[part]
    moved = {part: (module, f"{path}_gone")}
    message = rf"Ray \d+\.\d+.* has no {module}:.*_gone, which tells {part}; it was there in Ray 2\.60\.0: install that"
    with pytest.raises(TrainingError, match=message):
        ray_private.check_private_parts(moved)


def test_a_cluster_is_not_joined_with_a_ray_that_has_moved_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.state

    monkeypatch.delattr(type(ray._private.state.state), "get_max_resources_from_cluster_config")
    with pytest.raises(TrainingError, match="what the autoscaler can bring"):
        connect()


def test_a_serve_that_keeps_its_models_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_private, "_WRAPPER_ATTRIBUTE", "__moved")
    with pytest.raises(TrainingError, match=r"ray\.serve\.api.*'__moved'"):
        serve_private.check_serve_parts()


@pytest.mark.parametrize("name", ["self.models", "_push_multiplexed_replica_info"])
def test_a_multiplexer_that_has_renamed_a_part_is_named_though_longer_names_begin_alike(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import inspect

    from ray.serve import multiplex

    source = inspect.getsource
    renamed = re.sub(rf"{re.escape(name)}\b", f"{name}_elsewhere", source(multiplex))
    assert name in renamed
    monkeypatch.setattr(inspect, "getsource", lambda module: renamed if module is multiplex else source(module))
    with pytest.raises(TrainingError, match=rf"ray\.serve\.multiplex.*'{re.escape(name)}'"):
        serve_private.check_serve_parts()


class Multiplexer:
    def __init__(self) -> None:
        self.models = {"one": 1, "two": 2}
        self._push_multiplexed_replica_info = False


class Replica:
    pass


def test_a_model_that_went_is_taken_off_serves_list_and_the_list_is_sent() -> None:
    replica, multiplexer = Replica(), Multiplexer()
    setattr(replica, "__serve_multiplex_wrapper", multiplexer)
    serve_private.forget_model(replica, "one")
    assert multiplexer.models == {"two": 2}
    assert multiplexer._push_multiplexed_replica_info


def test_a_replica_that_holds_no_model_yet_has_none_to_forget() -> None:
    serve_private.forget_model(Replica(), "one")


def test_a_multiplexer_without_its_flag_is_no_silent_loss() -> None:
    replica, multiplexer = Replica(), Multiplexer()
    del multiplexer._push_multiplexed_replica_info
    setattr(replica, "__serve_multiplex_wrapper", multiplexer)
    with pytest.raises(AttributeError, match=r"Ray 2\.60\.0 had it"):
        serve_private.forget_model(replica, "one")
