"""What the site adds to docs/: pages of files at the repository's top, and links between them that hold on both.

A page of docs/ links to ../../benchmarks/RESULTS.md, which a reader of the repository can follow; on the site it is a page
of its own.
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
    root = posixpath.dirname(config.docs_dir)
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=posixpath.join(root, source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository become links to their pages; what is no page of the site loses its link."""
    own = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == own and own != "index.md"), f"docs/{own}")

    def changed(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if inside is None:
            return words
        return f"[{words}]({posixpath.relpath(inside, posixpath.dirname(own) or '.')}{anchor})"

    return "".join(part if part.startswith("```") else _LINK.sub(changed, part) for part in _FENCE.split(markdown))
