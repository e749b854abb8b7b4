"""The reference of commands is up to date and describes every argument."""

from __future__ import annotations

import re

from places import REPOSITORY

from focus_ray.cli.main import build_parser
from focus_ray.cli.reference import COMMAND, list_subcommands, render_markdown


def test_the_page_is_up_to_date() -> None:
    page = (REPOSITORY / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert page == render_markdown(), f"docs/reference/cli.md is out of date with the commands: run `{COMMAND}`"


def test_every_command_has_its_heading() -> None:
    assert [
        name for name in list_subcommands(build_parser()) if f"\n## `focus-ray {name}`\n" not in render_markdown()
    ] == []


def test_every_argument_has_a_description() -> None:
    assert re.findall(r"^\| (`[^|]+`) \|\s*\|$", render_markdown(), re.MULTILINE) == []
