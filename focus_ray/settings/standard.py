"""Finds the standard configurations by name. They are the files configs/*.yaml of the repository, which a wheel also contains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from focus_ray.errors import ConfigError
from focus_ray.names import suggest_similar_name

ConfigKind = Literal["run", "sweep"]

_PACKAGE = Path(__file__).resolve().parents[1]
COMMANDS: dict[ConfigKind, str] = {"run": "train", "sweep": "sweep"}


def find_standard_config_folder() -> Path:
    """Returns the folder of the standard configurations: inside an installed package, or at the top of a checkout.

    Raises: ConfigError: neither folder exists, for instance because the package was copied without the configurations.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "default.yaml").is_file():
            return folder
    raise ConfigError(
        f"{_PACKAGE}: the standard configurations are missing in the package: install it again, or give the path of a YAML file"
    )


def list_standard_configs(kind: ConfigKind | None = None) -> list[str]:
    """Returns the sorted names of the standard configurations.

    Args: kind: only configurations for this command; None returns all.

    Raises: ConfigError: the folder of the standard configurations does not exist.
    """
    names = sorted(path.stem for path in find_standard_config_folder().glob("*.yaml"))
    return [name for name in names if kind in (None, get_config_kind(name))]


def get_config_kind(name: str) -> ConfigKind:
    """Returns whether a standard configuration is for a run or for a sweep. Names for sweeps start with "sweep"."""
    return "sweep" if name.startswith("sweep") else "run"


def read_config_summary(name: str) -> str:
    """Returns the first comment line of a standard configuration, or an empty text if it has no comment."""
    text = (find_standard_config_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")


def find_config_file(text: str, kind: ConfigKind | None = None) -> Path:
    """Returns the configuration file for a path or for the name of a standard configuration. An existing file comes first.

    Args:
        text: a path, or a name.
        kind: the command that needs the configuration; None accepts configurations of both commands.

    Raises: ConfigError: there is no such file and no such name, or the standard configuration is for the other command.
    """
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():  # a folder may have the same name by chance: `make quickstart` creates one
        return path
    names = list_standard_configs()
    if text in names:
        kind_of_text = get_config_kind(text)
        if kind not in (None, kind_of_text):
            command = f"focus-ray {COMMANDS[kind_of_text]} {text}"
            raise ConfigError(f"{text} is a configuration for `{command}`: {_describe_config_choices(kind)}")
        return find_standard_config_folder() / f"{text}.yaml"
    suggestion = suggest_similar_name(path.stem, list_standard_configs(kind))
    hint = f" ({suggestion})" if suggestion else ""
    problem = "a folder" if path.is_dir() else "no such file"
    raise ConfigError(
        f"{text}: cannot read the configuration: {problem}, and no standard configuration of that name{hint}: "
        f"{_describe_config_choices(kind)}"
    )


def _describe_config_choices(kind: ConfigKind | None) -> str:
    """Returns the advice at the end of an error message, with the available names."""
    return f"give the path of a YAML file, or one of {', '.join(list_standard_configs(kind))}"
