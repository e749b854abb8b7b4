"""Reads requirements.lock, finds programs of the development environment, and copies files as the Dockerfile does."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import REPOSITORY


def read_locked_versions() -> dict[str, str]:
    """Returns name -> version of the packages in requirements.lock that apply to this Python version."""
    text = (REPOSITORY / "requirements.lock").read_text()
    lines = (Requirement(line.removesuffix(" \\")) for line in text.splitlines() if not line.startswith(" "))
    return {
        line.name: str(next(iter(line.specifier)).version)
        for line in lines
        if line.marker is None or line.marker.evaluate()
    }


def find_program(name: str) -> str:
    """Returns the path of a program of the development environment; skips the test if it is not installed."""
    sibling = Path(sys.executable).parent / name
    path = str(sibling) if sibling.is_file() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def copy_build_files(folder: Path) -> Path:
    """Copies the files that the Dockerfile copies from the checkout to a new folder, and returns the folder."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            path = folder / (f"{target}/{source}" if target == "./" else target)
            path.parent.mkdir(parents=True, exist_ok=True)
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, path, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / source, path)
    return folder
