"""Adds files at the top of the repository to the site as pages, and adapts links between pages.

A page of docs/ links to ../../benchmarks/RESULTS.md, which works in the repository. On the site this file is its own page.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {  # file of the repository -> page of the site
    "benchmarks/RESULTS.md": "project/results.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of PAGES."""
    root = posixpath.dirname(config.docs_dir)
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replaces links to files by links to their pages. A link to a file without a page becomes plain text."""
    page_path = page.file.src_uri
    source = next(
        (name for name, target in PAGES.items() if target == page_path and page_path != "index.md"), f"docs/{page_path}"
    )

    def replace_link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if inside is None:
            return words
        return f"[{words}]({posixpath.relpath(inside, posixpath.dirname(page_path) or '.')}{anchor})"

    return "".join(part if part.startswith("```") else _LINK.sub(replace_link, part) for part in _FENCE.split(markdown))
