"""The `focus-ray` command. Every subcommand imports heavy modules only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from focus_ray.cli.completion import answer_completion_request
from focus_ray.cli.output import EXIT_ERROR, EXIT_INTERRUPTED, make_stdout_accept_all_characters
from focus_ray.cluster.messages import VERBOSE_VARIABLE
from focus_ray.errors import FocusRayError, check_extra_is_installed, find_missing_package_error
from focus_ray.version import __version__

# The modules with the function `add_parsers`, in the order of the help text.
COMMAND_MODULES = (
    "data train fit sweep evaluate inspect watch update calibrate export registry jobs config doctor completion serve"
)
# Command -> the extra that it always needs. Other commands name a missing package when they need it.
REQUIRED_EXTRAS = {
    "fit": "train",
    "train": "train",
    "evaluate": "train",
    "calibrate": "train",
    "sweep": "ray",
    "inspect-batch": "ray",
    "serve": "ray",
    "submit": "ray",
    "jobs": "ray",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 after success, 1 after an error (printed on standard error), 3 after a partial failure, 130 after an
    interrupt. `submit` and `jobs follow` return the status of their job.
    """
    make_stdout_accept_all_characters()
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    answer_completion_request(parser)
    if not words:
        parser.print_help()
        return 0
    arguments = parse_command_line(parser, words)
    if arguments.verbose:
        os.environ[VERBOSE_VARIABLE] = "1"
    try:
        if arguments.command in REQUIRED_EXTRAS:
            check_extra_is_installed(REQUIRED_EXTRAS[arguments.command], f"focus-ray {arguments.command}")
        return int(arguments.run(arguments))
    except (FocusRayError, ModuleNotFoundError) as error:
        message = error if isinstance(error, FocusRayError) else find_missing_package_error(error)
        if message is None:
            raise
        print(f"focus-ray: {message}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("focus-ray: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_command_line(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Settings (key=value) may also follow options, which argparse (3.11) does not allow."""
    arguments, remaining_words = parser.parse_known_args(words)
    if remaining_words and hasattr(arguments, "override") and not any(word.startswith("-") for word in remaining_words):
        arguments.override = [*arguments.override, *remaining_words]
    elif remaining_words:
        parser.error(f"unrecognized arguments: {' '.join(remaining_words)}")
    for name, value in vars(arguments).items():
        if name != "words":  # words of `submit` are for another machine with another home folder
            setattr(arguments, name, _expand_home_folder(value))
    return arguments


def _expand_home_folder(value: Any) -> Any:
    """Replaces a leading ~ by the home folder, because a shell does not do so in --output=~/x."""
    if isinstance(value, list):
        return [_expand_home_folder(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `focus-ray` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="focus-ray",
        description="Learns from images of good parts. For a new image it says whether the part is defective, where the "
        "defect is, and how certain that is.",
    )
    parser.add_argument("--version", action="version", version=f"focus-ray {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages and all output of workers")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMAND_MODULES.split():
        import_module(f"focus_ray.cli.{name}").add_parsers(commands)
    return parser
