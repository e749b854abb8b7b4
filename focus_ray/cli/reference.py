"""Writes the reference of all commands from the parser: `python -m focus_ray.cli.reference docs/reference/cli.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from focus_ray.cli.main import build_parser

COMMAND = "python -m focus_ray.cli.reference docs/reference/cli.md"
_HEAD = f"""# Commands

This page lists every command of `focus-ray` with its arguments. `focus-ray COMMAND --help` shows the same in the terminal.
`{COMMAND}` writes this page from the commands, and a test fails if the page is out of date.

```bash
focus-ray --version
focus-ray config list
```

A command with `key=value` takes any [setting](configuration.md). A misspelt key is refused, with the nearest key. Every path
may also be an `s3://bucket/prefix`, unless the text says otherwise.

## Exit statuses

| status | meaning |
|---|---|
| 0 | All was done. |
| 1 | There was an error, printed on standard error. |
| 2 | The command line was wrong. |
| 3 | A part failed: `ingest` rejected files, `evaluate` failed for a category, `watch --once` met a file that is not an image. |
| 130 | The command was interrupted, a job or sweep was stopped, or following a job was stopped. |

`focus-ray submit` and `focus-ray jobs follow` return the status of the job that they follow.
"""


def commands_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Returns name -> (one-line help, parser) of each subcommand, in order."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            help_lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (help_lines[name], below) for name, below in action.choices.items()}
    return {}


def markdown() -> str:
    """Returns the text of docs/reference/cli.md."""
    parser = build_parser()
    lines = [_HEAD, "## For every command", "", *_table(parser)]
    for name, (help_line, below) in commands_of(parser).items():
        lines += ["", *_command(f"focus-ray {name}", help_line, below, "##")]
    return "\n".join(lines) + "\n"


def _command(name: str, help_line: str, parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    yield f"{heading} `{name}`"
    yield ""
    yield _sentence(help_line)
    if parser.description:
        yield f"\n{_sentence(parser.description)}"
    inner = commands_of(parser)
    if not inner:
        yield f"\n```text\n{' '.join([name, *_usage(parser)])}\n```\n"
        yield from _table(parser)
    if parser.epilog:
        yield f"\n{_sentence(parser.epilog)}"
    for action, (words, below) in inner.items():
        yield ""
        yield from _command(f"{name} {action}", words, below, "###")


def _sentence(text: str) -> str:
    start = text if text.startswith("focus-ray") else text[:1].upper() + text[1:]
    return start + ("" if text.endswith(".") else ".")


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    hidden = (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
    return [action for action in parser._actions if not isinstance(action, hidden)]


def _usage(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the required arguments, then [options] if the command has options."""
    options = [action for action in _arguments(parser) if action.option_strings]
    for action in _arguments(parser):
        if not action.option_strings:
            yield _positional(action)
    yield from (f"{action.option_strings[0]} {_value(action)}" for action in options if action.required)
    if any(not action.required for action in options):
        yield "[options]"


def _positional(action: argparse.Action) -> str:
    name = _value(action)
    forms = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]", argparse.REMAINDER: name}
    return forms.get(str(action.nargs), name)


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return "|".join(str(choice) for choice in action.choices)
    return str(action.metavar or action.dest.upper())


def _table(parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = _arguments(parser)
    if not actions:
        return
    yield "| argument | meaning |"
    yield "|---|---|"
    for action in actions:
        name = _value(action) if not action.option_strings else ", ".join(action.option_strings)
        if action.option_strings and action.nargs != 0:
            name += f" {_value(action)}" + (" ..." if action.nargs in ("+", "*") else "")
        cells = (f"`{name}`", action.help or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
