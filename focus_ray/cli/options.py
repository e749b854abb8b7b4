"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_model_version_option(parser: argparse.ArgumentParser) -> None:
    """Adds --version to a command that reads models from a registry."""
    parser.add_argument(
        "--version",
        dest="version_of",
        default="latest",
        metavar="NAME",
        help="version or alias of models in a registry (default: latest)",
    )


def add_cluster_settings_argument(parser: argparse.ArgumentParser) -> None:
    """Adds words such as cluster.labels.site=a to a command that runs on Ray."""
    parser.add_argument(
        "override",
        nargs="*",
        type=_check_setting_word,
        metavar="cluster.KEY=VALUE",
        help="nodes and resources of the workers, for instance cluster.labels.site=a or cluster.cpus_per_worker=2",
    )


def _check_setting_word(word: str) -> str:
    """Returns the word of a setting. Raises: ArgumentTypeError: the word has another form than key=value."""
    if "=" not in word:
        raise argparse.ArgumentTypeError(f"{word!r}: expected key=value, for instance cluster.labels.site=a")
    return word


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --engine and --examples to a command that inspects images on this machine."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--engine",
        default="torch",
        help="engine for the features: torch, or on a CPU onnxruntime or onnxruntime-int8 (default: torch)",
    )
    parser.add_argument(
        "--examples",
        nargs="+",
        metavar="IMAGE",
        help="image files of good parts, or folders of them, for scaling and checking another engine",
    )
