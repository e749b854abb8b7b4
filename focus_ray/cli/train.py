"""train, update."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from focus_ray.cli.output import EXIT_INTERRUPTED, require, say

if TYPE_CHECKING:
    from focus_ray.config import Config


def read_config(place: str, overrides: list[str]) -> Config:
    """`load_config` of a file, or of an object in a storage, as a sweep's best.yaml may be. Raises: ConfigError."""
    from focus_ray.config import load_config, mapping_of, override_tree, parse_config

    if "://" not in place:
        return load_config(place, overrides)
    from focus_ray.errors import ConfigError
    from focus_ray.storage import read_bytes

    try:
        text = read_bytes(place).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: cannot read the configuration: {error}") from error
    return parse_config(override_tree(mapping_of(text, place), overrides), source=place)


def _train(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.config, arguments.override)
    from focus_ray.cluster.training import train  # seconds of imports, which a misspelt key need not wait for

    names: list[str] = []

    def tell(message: str) -> None:
        names.extend([message.partition(": ")[2]] if message.startswith("name: ") else [])
        say(message)

    try:
        bundles = train(config, resume=arguments.resume, log=tell)
    except KeyboardInterrupt:
        name = names[0] if names else config.name
        words = " ".join([*(word for word in arguments.override if not word.startswith("name=")), f"name={name}"])
        say(
            f"focus-ray: interrupted; `focus-ray train {arguments.config} {words} --resume` goes on from the last checkpoints"
        )
        return EXIT_INTERRUPTED
    for category, bundle in bundles.items():
        print(f"{category}\t{bundle}")
    return 0


def _metric(arguments: argparse.Namespace) -> int:
    require(*arguments.bundles)
    from focus_ray.bundle.metric import share_metric

    categories = share_metric(arguments.bundles, arguments.output)
    print(f"{arguments.output}\t{len(categories)} categories\t{', '.join(categories)}")
    return 0


def _update(arguments: argparse.Namespace) -> int:
    require(arguments.bundle, arguments.add, arguments.remove, arguments.join, arguments.calibrate)
    from focus_ray.bundle.update import update_bundle
    from focus_ray.errors import DataError

    changes = {key: getattr(arguments, key) for key in ("add", "remove", "join")}
    if not any(changes.values()):
        raise DataError("nothing to change: give --add, --remove or --join")
    manifest = update_bundle(arguments.bundle, arguments.output, **changes, calibrate=arguments.calibrate)
    print(f"{arguments.output}\t{manifest['moments']['count']} images\t{manifest['sha256']}")
    return 0
