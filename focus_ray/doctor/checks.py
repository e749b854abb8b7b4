"""All checks, in the order in which they are told, and what they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from focus_ray.config import Config, override_tree, parse_config, read_mapping
from focus_ray.doctor import cluster, machine, places, software
from focus_ray.doctor.finding import Asked, Check, Finding, examine
from focus_ray.errors import ConfigError
from focus_ray.standard import find_config

CHECKS: dict[str, Check] = {
    "Python": software.python,
    "packages": software.packages,
    "torch and torchvision": software.torch_pair,
    "GPU": machine.gpu,
    "CPUs": machine.cpus,
    "memory": machine.memory,
    "disk": machine.disk,
    "Ray's disk": machine.ray_disk,
    "/dev/shm": machine.shared_memory,
    "Ray": software.ray,
    "Ray cluster": cluster.address,
    "Ray left behind": cluster.left_behind,
    "ports": machine.ports,
    "storage": places.storage,
    "data set": places.data,
    "weights": places.weights,
    "trackers": places.trackers,
}


def diagnose(config: str | None, overrides: Sequence[str], checks: dict[str, Check] = CHECKS) -> Iterator[Finding]:
    """Findings, one after the other; where the configuration cannot be read, that is the first, and defaults are checked.

    Args:
        config: a path or the name of a standard configuration, of a run or a sweep; None for the defaults.
        overrides: key=value, as for `train`, or `sweep`.
    """
    try:
        asked = read_asked(config, overrides)
    except ConfigError as error:
        yield Finding("configuration", "FAILED", str(error))
        asked = read_asked(None, ())
    else:
        if config is not None:
            yield Finding("configuration", "ok", f"{config} is valid")
    yield from examine(checks, asked)


def read_asked(config: str | None, overrides: Sequence[str]) -> Asked:
    """Raises: ConfigError: no such configuration, or one that is not valid."""
    if config is None:
        tree = override_tree({}, list(overrides))
        has_data = isinstance(tree.get("data"), dict) and "uri" in tree["data"]
        return Asked(_with_data(tree), bool(overrides), has_data)
    path = find_config(config)
    tree = read_mapping(path)
    if "space" in tree:
        from focus_ray.sweep.settings import load_sweep

        return Asked(load_sweep(path, overrides).base_config(), True, True)
    return Asked(parse_config(override_tree(tree, list(overrides)), str(path)), True, True)


def _with_data(tree: dict[str, Any]) -> Config:
    """A configuration of overrides alone, which may leave the data set out."""
    if tree.get("data") is None:
        tree["data"] = {}
    if isinstance(tree["data"], dict):
        tree["data"].setdefault("uri", "data")
    return parse_config(tree)
