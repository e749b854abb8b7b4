"""completion: what a shell needs to complete focus-ray's words; and what it is told while it does (argcomplete)."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_ASKING = "_ARGCOMPLETE"  # a shell that completes a word sets it
_CONFIGS = {"train": "run", "sweep": "sweep"}  # command -> kind of the standard configurations that it takes
_ROOTS = {"sweep": "a sweep", "serve": "the service"}  # command -> whose keys it takes; others take a run's
_DESCRIBED = {
    "integer",
    "number",
    "text",
    "name",
    "null",
    "anything",
    "section",
}  # words of the reference that are no value


def add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print what a shell needs to complete focus-ray's words",
        description='For bash: eval "$(focus-ray completion bash)" in ~/.bashrc; zsh alike in ~/.zshrc, after compinit. '
        "For fish: focus-ray completion fish > ~/.config/fish/completions/focus-ray.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    completion.set_defaults(run=_completion)


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Ends the process with the words that fit, where a shell asks for them; else nothing."""
    if _ASKING not in os.environ:
        return
    import argcomplete

    for command, action in _actions(parser):
        if action.dest in ("config", "named", "what"):
            action.completer = _Configs(_CONFIGS.get(command))  # type: ignore[attr-defined]
        elif action.dest in ("override", "rest"):
            action.completer = _Keys(_ROOTS.get(command, "a run"))  # type: ignore[attr-defined]
        elif action.dest == "key":
            action.completer = _Keys(None)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _completion(arguments: argparse.Namespace) -> int:
    import argcomplete

    print(argcomplete.shellcode(["focus-ray"], shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Every argument, with the command, or its last word, that takes it."""
    for action in parser._actions:
        yield command, action
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _actions(inner, name)


class _Configs:
    """Names of standard configurations, and files."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def __call__(self, prefix: str, **asked: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        from focus_ray.standard import standard_names

        names = standard_names(self.kind)  # type: ignore[arg-type]
        return [*names, *FilesCompleter(("yaml", "yml"))(prefix, **asked)]


class _Keys:
    """Dotted keys of a configuration, up to their next dot, and values where a key takes one of a few."""

    def __init__(self, of: str | None) -> None:
        self.of = of  # None: of all, to be asked about and not set

    def __call__(self, prefix: str, **asked: Any) -> list[str]:
        from focus_ray.config_reference import ROOTS, parts_of

        known = {
            setting.key: setting.values
            for root in ROOTS
            if self.of in (None, root.title)
            for part in parts_of(root.model)
            for setting in part.settings
        }
        if self.of == "a sweep":
            (run,) = (root for root in ROOTS if root.title == "a run")
            known |= {f"base.{one.key}": one.values for part in parts_of(run.model) for one in part.settings}
        if self.of is None:
            return [name for name in known if name.startswith(prefix)]
        key, sign, _ = prefix.partition("=")
        if sign:
            return [f"{key}={value}" for value in _listed(known.get(key, ""))]
        return [f"{name}=" for name in known if name.startswith(prefix)]


def _listed(values: str) -> list[str]:
    """The values that the reference lists of a key, as "cosine, constant, or null"; numbers and texts have none."""
    words = re.split(r", or |, | or ", values.partition(";")[0])
    return [word for word in words if re.fullmatch(r"[\w-]+", word) and word not in _DESCRIBED]
