"""The command `completion`, which prints the shell's script, and the answers to a shell that completes a word (argcomplete)."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_ASKING = "_ARGCOMPLETE"  # the variable that a shell sets when it completes a word
_CONFIGS = {"train": "run", "sweep": "sweep"}  # command -> kind of its standard configurations
_ROOTS = {
    "sweep": "a sweep",
    "serve": "the service",
}  # command -> configuration of its keys; other commands take keys of a run
_DESCRIBED = {
    "integer",
    "number",
    "text",
    "name",
    "null",
    "anything",
    "section",
}  # words of the reference that are types, not values


def add_completion_parser(commands: Any) -> None:
    """Adds the parser of `completion`."""
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes the words of focus-ray",
        description='For bash: eval "$(focus-ray completion bash)" in ~/.bashrc. For zsh: the same with zsh, in ~/.zshrc '
        "after compinit. For fish: focus-ray completion fish > ~/.config/fish/completions/focus-ray.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    completion.set_defaults(run=_print_script)


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Answers a shell's request for completion: prints the matching words and ends the process.

    Does nothing if no shell asks (the variable `_ARGCOMPLETE` is not set).
    """
    if _ASKING not in os.environ:
        return
    import argcomplete

    for command, action in _iterate_arguments(parser):
        if action.dest in ("config", "named", "what"):
            action.completer = _ConfigCompleter(_CONFIGS.get(command))  # type: ignore[attr-defined]
        elif action.dest in ("override", "rest"):
            action.completer = _KeyCompleter(_ROOTS.get(command, "a run"))  # type: ignore[attr-defined]
        elif action.dest == "key":
            action.completer = _KeyCompleter(None)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _print_script(arguments: argparse.Namespace) -> int:
    """Runs `completion`: prints the completion script for a shell. Returns the exit status."""
    import argcomplete

    print(argcomplete.shellcode(["focus-ray"], shell=arguments.shell))
    return 0


def _iterate_arguments(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Yields (last word of the command, argument) for every argument of every command, such as ("remove", ...)."""
    for action in parser._actions:
        yield command, action
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _iterate_arguments(inner, name)


class _ConfigCompleter:
    """Completes names of standard configurations, and files."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def __call__(self, prefix: str, **request: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        from focus_ray.settings.standard import standard_names

        names = standard_names(self.kind)  # type: ignore[arg-type]
        return [*names, *FilesCompleter(("yaml", "yml"))(prefix, **request)]


class _KeyCompleter:
    """Completes dotted keys of a configuration. After "key=", completes the values if the key takes a value from a list."""

    def __init__(self, of: str | None) -> None:
        self.of = of  # title of a configuration; None: keys of all, without values

    def __call__(self, prefix: str, **request: Any) -> list[str]:
        from focus_ray.cli.config_reference import ROOTS, parts_of

        values_by_key = {
            setting.key: setting.values
            for root in ROOTS
            if self.of in (None, root.title)
            for part in parts_of(root.model)
            for setting in part.settings
        }
        if self.of == "a sweep":
            (run,) = (root for root in ROOTS if root.title == "a run")
            values_by_key |= {
                f"base.{setting.key}": setting.values for part in parts_of(run.model) for setting in part.settings
            }
        if self.of is None:
            return [name for name in values_by_key if name.startswith(prefix)]
        key, sign, _ = prefix.partition("=")
        if sign:
            return [f"{key}={value}" for value in _parse_values(values_by_key.get(key, ""))]
        return [f"{name}=" for name in values_by_key if name.startswith(prefix)]


def _parse_values(values: str) -> list[str]:
    """Returns the values in the reference's description of a setting, without types and null.

    Returns ["cosine", "constant"] for "cosine, constant, or null"; an empty list for settings that take any number or text.
    """
    words = re.split(r", or |, | or ", values.partition(";")[0])
    return [word for word in words if re.fullmatch(r"[\w-]+", word) and word not in _DESCRIBED]
