"""The standard configurations: the repository's configs/*.yaml, which a wheel holds too, found by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from focus_ray.errors import ConfigError

Kind = Literal["run", "sweep"]

_PACKAGE = Path(__file__).resolve().parent
COMMANDS: dict[Kind, str] = {"run": "train", "sweep": "sweep"}


def standard_folder() -> Path:
    """Where the standard configurations lie: in an installed package, or at the top of a checkout.

    Raises: ConfigError: in neither place, as in a package that was copied without them.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "default.yaml").is_file():
            return folder
    raise ConfigError(
        f"{_PACKAGE}: the standard configurations are not with the package: install it anew, or give the path of a YAML file"
    )


def standard_names(kind: Kind | None = None) -> list[str]:
    """Names of the standard configurations, sorted: of runs, of sweeps, or of both. Raises: ConfigError: as the folder's."""
    names = sorted(path.stem for path in standard_folder().glob("*.yaml"))
    return [name for name in names if kind in (None, kind_of(name))]


def kind_of(name: str) -> Kind:
    """What a standard configuration is for; those of sweeps are named so."""
    return "sweep" if name.startswith("sweep") else "run"


def standard_summary(name: str) -> str:
    """The first comment line of a standard configuration; empty where it has none."""
    text = (standard_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def find_config(text: str, kind: Kind | None = None) -> Path:
    """The file that a path or the bare name of a standard configuration stands for; a file comes first.

    Args:
        kind: what it is for; None takes both.

    Raises: ConfigError: neither is there, or the name is one of the other kind.
    """
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():  # a folder may have the name by chance: `make quickstart` makes one
        return path
    names = standard_names()
    if text in names:
        own = kind_of(text)
        if kind not in (None, own):
            raise ConfigError(f"{text} is a configuration for `focus-ray {COMMANDS[own]} {text}`: {_choose(kind)}")
        return standard_folder() / f"{text}.yaml"
    close = difflib.get_close_matches(path.stem, standard_names(kind), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    what = "a folder" if path.is_dir() else "no such file"
    raise ConfigError(
        f"{text}: cannot read the configuration: {what}, and no standard configuration of that name{hint}: {_choose(kind)}"
    )


def _choose(kind: Kind | None) -> str:
    return f"give the path of a YAML file, or one of {', '.join(standard_names(kind))}"
