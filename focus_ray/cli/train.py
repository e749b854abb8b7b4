"""The command `train`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_ray.cli.output import EXIT_INTERRUPTED, print_message
from focus_ray.errors import ConfigError

if TYPE_CHECKING:
    from focus_ray.fitting.settings import Config

_SHOWN_CATEGORIES = 3  # with more categories, only the report shows the caveats


def add_parsers(commands: Any) -> None:
    """Adds the parser of `train`."""
    train = commands.add_parser("train", help="train one model for each category and write its bundle")
    add = train.add_argument
    add("config", nargs="?", help="a YAML file, or a name of `focus-ray config list`")
    add("override", nargs="*", help="key=value, for instance train.steps=10")
    add("--config", dest="named", metavar="CONFIG", help="the configuration as an option; then all words are key=value")
    add("--verbose", action="store_true", default=argparse.SUPPRESS, help="also show Ray's own messages")
    add("--resume", action="store_true", help="continue the run of this name, or start it if there is none yet")
    train.set_defaults(run=_run_train_command)


def read_run_config(place: str, overrides: list[str]) -> Config:
    """Reads a configuration from a file, by the name of a standard configuration, or from a URI, and applies overrides.

    Raises:
        ConfigError: The configuration cannot be read, or is not valid.
    """
    from focus_ray.fitting.settings import load_config, parse_config
    from focus_ray.settings.sections import apply_overrides, parse_yaml_mapping
    from focus_ray.settings.standard import find_config_file

    if "://" not in place:
        return load_config(find_config_file(place, "run"), overrides)
    from focus_ray.storage.files import read_bytes

    try:
        text = read_bytes(place).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: cannot read the configuration: {error}") from error
    return parse_config(apply_overrides(parse_yaml_mapping(text, place), overrides), source=place)


def _run_train_command(arguments: argparse.Namespace) -> int:
    """Runs `train`: trains a model per category, and prints the bundles and the next commands. Returns the exit status."""
    name_or_path, overrides = _split_config_and_overrides(arguments)
    config = read_run_config(name_or_path, overrides)
    print_message(f"train: {config.data.uri} -> {config.storage}/{config.name}")
    from focus_ray.training.training import train  # takes seconds to import, so check the keys first

    names: list[str] = []

    def log(message: str) -> None:
        """Prints a message. Remembers the run's name from the message "name: ..."."""
        names.extend([message.partition(": ")[2]] if message.startswith("name: ") else [])
        print_message(message)

    try:
        bundles = train(config, resume=arguments.resume, log=log)
    except KeyboardInterrupt:
        name = names[0] if names else config.name
        words = " ".join([*(word for word in overrides if not word.startswith("name=")), f"name={name}"])
        print_message(
            f"focus-ray: interrupted; `focus-ray train {name_or_path} {words} --resume` goes on from the last checkpoints"
        )
        return EXIT_INTERRUPTED
    for category, bundle in bundles.items():
        print(f"{category}\t{bundle}")
    print_threshold_caveats(bundles)
    for place in list(bundles.values())[:1]:
        print_message(
            f"next: focus-ray evaluate {place.rpartition('/bundles/')[0] or place}   # on labelled test images"
        )
        print_message(f"      focus-ray inspect {place} IMAGES --overlays heat")
    return 0


def print_threshold_caveats(bundles: Mapping[str, str]) -> None:
    """Prints the caveats of the thresholds, if there are at most _SHOWN_CATEGORIES categories."""
    from focus_ray.bundle.bundle import read_manifest
    from focus_ray.detect.calibration import Calibration

    if len(bundles) <= _SHOWN_CATEGORIES:
        for category, place in bundles.items():
            for caveat in Calibration.from_dict(read_manifest(place)["calibration"]).describe_limits():
                print_message(f"note: {category}: {caveat}")


def _split_config_and_overrides(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Returns (configuration, overrides). The configuration is the value of --config, or else the first word.

    Raises:
        ConfigError: The command line names no configuration.
    """
    if arguments.named is not None:
        return arguments.named, [*([] if arguments.config is None else [arguments.config]), *arguments.override]
    if arguments.config is None or ("=" in arguments.config and not Path(arguments.config).exists()):
        from focus_ray.settings.standard import list_standard_configs

        raise ConfigError(
            "train needs a configuration, before any key=value: the path of a YAML file, or one of "
            f"{', '.join(list_standard_configs('run'))}"
        )
    return arguments.config, arguments.override
