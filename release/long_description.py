"""README.md as a package index shows it: links and pictures by their whole address, and the project's own addresses.

A hook of the build (hatchling). The address of the repository is asked of FOCUS_RAY_REPOSITORY, as in https://git.example/plant/focus-ray;
without it links into the repository become plain words, since they would lead nowhere, and pictures go.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "FOCUS_RAY_REPOSITORY"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def long_description(text: str, repository: str | None, version: str) -> str:
    """Markdown whose links into the repository lead to the files of a version's tag, on the host of the repository."""

    def replaced(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if not repository:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository.rstrip('/')}/{kind}/v{version}/{target})"

    return _LINK.sub(replaced, text)


class LongDescription(MetadataHookInterface):
    """Sets `readme` and `urls`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = os.environ.get(REPOSITORY)
        if repository and not re.fullmatch(r"https?://[^\s?#]+", repository):
            raise ValueError(
                f"{REPOSITORY}={repository!r}: expected an address, as in https://git.example/plant/focus-ray"
            )
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, repository, metadata["version"]),
        }
        if repository:
            base = repository.rstrip("/")
            metadata["urls"] = {"Repository": base, "Changelog": f"{base}/blob/v{metadata['version']}/CHANGELOG.md"}
