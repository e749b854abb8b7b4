"""Where the repository's own files are, and the real images and weights beside it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "focus_ray"
CONFIGS = REPOSITORY / "configs"
SHARED = REPOSITORY.parent / "shared"
