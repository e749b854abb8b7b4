"""What requirements.lock has for this Python, and the programs of the development environment."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import REPOSITORY


def locked() -> dict[str, str]:
    """Name -> version of what requirements.lock has for this Python."""
    text = (REPOSITORY / "requirements.lock").read_text()
    lines = (Requirement(line.removesuffix(" \\")) for line in text.splitlines() if not line.startswith(" "))
    return {
        line.name: str(next(iter(line.specifier)).version)
        for line in lines
        if line.marker is None or line.marker.evaluate()
    }


def program(name: str) -> str:
    """A program of the development environment; skips the test where there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: install it")
    return found


def copy_as_the_build_does(folder: Path) -> Path:
    """What the Dockerfile copies from the checkout, and nothing else, into a new folder."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            place = folder / (f"{target}/{source}" if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / source, place)
    return folder
