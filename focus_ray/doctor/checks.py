"""The list of all checks, in the order in which they are printed, and the configuration that they check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from focus_ray.doctor import cluster, machine, resources, software
from focus_ray.doctor.diagnosis import Check, CheckContext, Diagnosis, run_checks
from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.settings.sections import override_tree, read_mapping
from focus_ray.settings.standard import find_config

CHECKS: dict[str, Check] = {
    "Python": software.check_python,
    "packages": software.check_packages,
    "torch and torchvision": software.check_torch_pair,
    "GPU": machine.check_gpu,
    "CPUs": machine.check_cpus,
    "memory": machine.check_memory,
    "disk": machine.check_disk,
    "Ray's disk": machine.check_ray_disk,
    "/dev/shm": machine.check_shared_memory,
    "Ray": software.check_ray,
    "Ray cluster": cluster.check_address,
    "Ray left behind": cluster.check_stale_cluster_file,
    "ports": machine.check_ports,
    "storage": resources.check_storage,
    "data set": resources.check_data,
    "weights": resources.check_weights,
    "trackers": resources.check_trackers,
}


def diagnose(config: str | None, overrides: Sequence[str], checks: dict[str, Check] = CHECKS) -> Iterator[Diagnosis]:
    """Runs all checks for a configuration and yields their diagnoses.

    If the user named a configuration, the first diagnosis says whether it is valid. If the configuration or an override is
    not valid, the first diagnosis fails, and the checks use the default configuration.

    Args:
        config: Path or standard name of the configuration of a run or a sweep; None takes the defaults.
        overrides: Texts "key=value", as for the commands `train` and `sweep`.
        checks: Name of each check -> its function.
    """
    try:
        context = read_context(config, overrides)
    except ConfigError as error:
        yield Diagnosis("configuration", "FAILED", str(error))
        context = read_context(None, ())
    else:
        if config is not None:
            yield Diagnosis("configuration", "ok", f"{config} is valid")
    yield from run_checks(checks, context)


def read_context(config: str | None, overrides: Sequence[str]) -> CheckContext:
    """Reads the configuration that the checks use.

    Args:
        config: Path or standard name of the configuration of a run or a sweep; None takes the defaults.
        overrides: Texts "key=value".

    Raises:
        ConfigError: The configuration does not exist or is not valid.
    """
    if config is None:
        tree = override_tree({}, list(overrides))
        has_data = isinstance(tree.get("data"), dict) and "uri" in tree["data"]
        return CheckContext(_parse_with_default_data(tree), bool(overrides), has_data)
    path = find_config(config)
    tree = read_mapping(path)
    if "space" in tree:  # only a sweep has this key
        from focus_ray.sweep.settings import load_sweep

        return CheckContext(load_sweep(path, overrides).config_at(), True, True)
    return CheckContext(parse_config(override_tree(tree, list(overrides)), str(path)), True, True)


def _parse_with_default_data(tree: dict[str, Any]) -> Config:
    """Parses a configuration, with `data.uri=data` if the tree does not name a data set. Changes the tree."""
    if tree.get("data") is None:
        tree["data"] = {}
    if isinstance(tree["data"], dict):
        tree["data"].setdefault("uri", "data")
    return parse_config(tree)
