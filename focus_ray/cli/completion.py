"""The command `completion`, which prints the shell's script, and the answers to a shell that completes a word (argcomplete)."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_REQUEST_VARIABLE = "_ARGCOMPLETE"  # the variable that a shell sets when it completes a word
_STANDARD_KINDS = {"train": "run", "sweep": "sweep"}  # command -> kind of its standard configurations
# command -> configuration of its keys; other commands take keys of a run
_CONFIG_TITLES = {"sweep": "a sweep", "serve": "the service"}
# words of the reference that are types, not values
_TYPE_WORDS = {"integer", "number", "text", "name", "null", "anything", "section"}


def add_parsers(commands: Any) -> None:
    """Adds the parser of `completion`."""
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes the words of focus-ray",
        description='For bash: eval "$(focus-ray completion bash)" in ~/.bashrc. For zsh: the same with zsh, in ~/.zshrc '
        "after compinit. For fish: focus-ray completion fish > ~/.config/fish/completions/focus-ray.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    completion.set_defaults(run=_run_completion_command)


def answer_completion_request(parser: argparse.ArgumentParser) -> None:
    """Answers a shell's request for completion: prints the matching words and ends the process.

    Does nothing if no shell asks (the variable `_ARGCOMPLETE` is not set).
    """
    if _REQUEST_VARIABLE not in os.environ:
        return
    import argcomplete

    for command, action in _iterate_parser_arguments(parser):
        if action.dest in ("config", "named", "what"):
            action.completer = _ConfigNameCompleter(_STANDARD_KINDS.get(command))  # type: ignore[attr-defined]
        elif action.dest == "override":
            action.completer = _SettingKeyCompleter(_CONFIG_TITLES.get(command, "a run"))  # type: ignore[attr-defined]
        elif action.dest == "key":
            action.completer = _SettingKeyCompleter(None)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _run_completion_command(arguments: argparse.Namespace) -> int:
    """Runs `completion`: prints the completion script for a shell. Returns the exit status."""
    import argcomplete

    print(argcomplete.shellcode(["focus-ray"], shell=arguments.shell))
    return 0


def _iterate_parser_arguments(
    parser: argparse.ArgumentParser, command: str = ""
) -> Iterator[tuple[str, argparse.Action]]:
    """Yields (last word of the command, argument) for every argument of every command, such as ("remove", ...)."""
    for action in parser._actions:
        yield command, action
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _iterate_parser_arguments(inner, name)


class _ConfigNameCompleter:
    """Completes names of standard configurations, and files."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def __call__(self, prefix: str, **request: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        from focus_ray.settings.standard import list_standard_configs

        names = list_standard_configs(self.kind)  # type: ignore[arg-type]
        return [*names, *FilesCompleter(("yaml", "yml"))(prefix, **request)]


class _SettingKeyCompleter:
    """Completes dotted keys of a configuration. After "key=", completes the values if the key takes a value from a list."""

    def __init__(self, config_title: str | None) -> None:
        self.config_title = config_title  # title of a configuration; None: keys of all, without values

    def __call__(self, prefix: str, **request: Any) -> list[str]:
        from focus_ray.cli.config_reference import CONFIG_KINDS, iterate_sections

        values_by_key = {
            setting.key: setting.values
            for kind in CONFIG_KINDS
            if self.config_title in (None, kind.title)
            for section in iterate_sections(kind.model)
            for setting in section.settings
        }
        if self.config_title == "a sweep":
            (run,) = (kind for kind in CONFIG_KINDS if kind.title == "a run")
            values_by_key |= {
                f"base.{setting.key}": setting.values
                for section in iterate_sections(run.model)
                for setting in section.settings
            }
        if self.config_title is None:
            return [name for name in values_by_key if name.startswith(prefix)]
        key, sign, _ = prefix.partition("=")
        if sign:
            return [f"{key}={value}" for value in _parse_allowed_values(values_by_key.get(key, ""))]
        return [f"{name}=" for name in values_by_key if name.startswith(prefix)]


def _parse_allowed_values(values: str) -> list[str]:
    """Returns the values in the reference's description of a setting, without types and null.

    Returns ["cosine", "constant"] for "cosine, constant, or null"; an empty list for settings that take any number or text.
    """
    words = re.split(r", or |, | or ", values.partition(";")[0])
    return [word for word in words if re.fullmatch(r"[\w-]+", word) and word not in _TYPE_WORDS]
