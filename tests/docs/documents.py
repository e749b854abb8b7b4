"""Reads the code blocks of the documents, and the commands in shell blocks."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from places import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
KINDS = ("bash", "python", "yaml", "json", "text")
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block. page: path of the document in the repository.  kind: the word after the fence, such as bash."""

    page: str
    kind: str
    text: str


def find_code_blocks(*kinds: str) -> list[Block]:
    """Returns all blocks of the given kinds, or of every kind, in the order of the pages."""
    texts = ((page.relative_to(REPOSITORY).as_posix(), page.read_text(encoding="utf-8")) for page in PAGES)
    blocks = [Block(page, *match.groups()) for page, text in texts for match in _FENCE.finditer(text)]
    return [block for block in blocks if not kinds or block.kind in kinds]


def read_shell_commands(block: Block) -> list[str]:
    """Returns the commands of a shell block. Continued lines are joined; comments and the lines of loops are removed."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    commands = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in ("for", "done"):
            continue
        line = re.sub(r"\s+#\s.*$", "", line)  # comment
        line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)  # the command inside eval
        commands.append(re.sub(r"\s+>\s+\S+$|&$", "", line).strip())
    return commands


def split_command_words(command: str) -> list[str]:
    return shlex.split(command, comments=True)
