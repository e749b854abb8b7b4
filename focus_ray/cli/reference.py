"""Writes the reference of all commands from the parser: `python -m focus_ray.cli.reference > docs/reference/cli.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from focus_ray.cli.main import build_parser

COMMAND = "python -m focus_ray.cli.reference > docs/reference/cli.md"
_INTRODUCTION = f"""# Commands

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


def list_subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Returns name -> (one-line help, parser) of each subcommand, in order."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            help_lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (help_lines[name], below) for name, below in action.choices.items()}
    return {}


def render_markdown() -> str:
    """Returns the text of docs/reference/cli.md."""
    parser = build_parser()
    lines = [_INTRODUCTION, "## For every command", "", *_iterate_argument_table_lines(parser)]
    for name, (help_line, below) in list_subcommands(parser).items():
        lines += ["", *_iterate_command_lines(f"focus-ray {name}", help_line, below, "##")]
    return "\n".join(lines) + "\n"


def _iterate_command_lines(name: str, help_line: str, parser: argparse.ArgumentParser, heading: str) -> Iterator[str]:
    """Yields the Markdown lines of a command and of its subcommands.

    Args:
        name: Full name of the command, for instance "focus-ray data remove".
        help_line: One-line help of the command.
        parser: Parser of the command.
        heading: Markdown mark of the heading, for instance "##".
    """
    yield f"{heading} `{name}`"
    yield ""
    yield _complete_sentence(help_line)
    if parser.description:
        yield f"\n{_complete_sentence(parser.description)}"
    inner = list_subcommands(parser)
    if not inner:
        yield f"\n```text\n{' '.join([name, *_iterate_usage_words(parser)])}\n```\n"
        yield from _iterate_argument_table_lines(parser)
    if parser.epilog:
        yield f"\n{_complete_sentence(parser.epilog)}"
    for action, (words, below) in inner.items():
        yield ""
        yield from _iterate_command_lines(f"{name} {action}", words, below, "###")


def _complete_sentence(text: str) -> str:
    """Returns the text with a capital first letter, unless it starts with `focus-ray`, and with a full stop."""
    start = text if text.startswith("focus-ray") else text[:1].upper() + text[1:]
    return start + ("" if text.endswith(".") else ".")


def _list_visible_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Returns the arguments of a parser, without --help, --version and subcommands."""
    hidden = (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
    return [action for action in parser._actions if not isinstance(action, hidden)]


def _iterate_usage_words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the words of the usage line: positional arguments, required options, and [options] for all other options."""
    options = [action for action in _list_visible_arguments(parser) if action.option_strings]
    for action in _list_visible_arguments(parser):
        if not action.option_strings:
            yield _format_positional_argument(action)
    yield from (f"{action.option_strings[0]} {_format_value_name(action)}" for action in options if action.required)
    if any(not action.required for action in options):
        yield "[options]"


def _format_positional_argument(action: argparse.Action) -> str:
    """Returns a positional argument as the usage line shows it: brackets mark an optional argument."""
    name = _format_value_name(action)
    forms = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]", argparse.REMAINDER: name}
    return forms.get(str(action.nargs), name)


def _format_value_name(action: argparse.Action) -> str:
    """Returns the name of an argument's value: its choices, its metavar, or its name in capitals."""
    if action.choices is not None:
        return "|".join(str(choice) for choice in action.choices)
    return str(action.metavar or action.dest.upper())


def _iterate_argument_table_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the lines of a Markdown table with one row per argument; nothing if there are no arguments."""
    actions = _list_visible_arguments(parser)
    if not actions:
        return
    yield "| argument | meaning |"
    yield "|---|---|"
    for action in actions:
        name = _format_value_name(action) if not action.option_strings else ", ".join(action.option_strings)
        if action.option_strings and action.nargs != 0:
            name += f" {_format_value_name(action)}" + (" ..." if action.nargs in ("+", "*") else "")
        cells = (f"`{name}`", action.help or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.buffer.write(render_markdown().encode())
