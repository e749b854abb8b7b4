"""Exit statuses, and what is said on standard error."""

from __future__ import annotations

import sys

EXIT_ERROR = 1
EXIT_REJECTS = 3


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
