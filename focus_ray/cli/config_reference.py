"""Writes the reference of all settings from the fields of the models, and the text of `focus-ray config explain`.

`python -m focus_ray.cli.config_reference > docs/reference/configuration.md` writes the page. Imports neither torch nor Ray.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import Config
from focus_ray.names import NAME_PATTERN, NAME_WORDS
from focus_ray.serving.settings import ServiceSettings
from focus_ray.settings.kinds import LazyRegistry
from focus_ray.settings.sections import select_user_fields
from focus_ray.sweep.settings import SweepConfig

COMMAND = "python -m focus_ray.cli.config_reference > docs/reference/configuration.md"


class ConfigKind(NamedTuple):
    """A kind of configuration. title: for people.  usage: the command that takes it, in Markdown."""

    title: str
    model: type[BaseModel]
    usage: str


CONFIG_KINDS = (
    ConfigKind(
        "a run",
        Config,
        "`focus-ray train CONFIG key=value ...` takes these settings; `focus-ray config list` lists the standard configurations.",
    ),
    ConfigKind(
        "a sweep",
        SweepConfig,
        "`focus-ray sweep CONFIG key=value ...` takes these settings ([sweeps](../use/sweeps.md)). Settings of the base "
        "configuration come after `base.`, as in `base.train.steps=5`.",
    ),
    ConfigKind(
        "the service",
        ServiceSettings,
        "`focus-ray serve PLACE key=value ...` takes these settings ([serving](../use/serving.md)).",
    ),
)


class SettingDescription(NamedTuple):
    """One setting. key: dotted; `[]` means each item of a list, KEY each key of a mapping.  default: YAML, or None if the
    setting is required."""

    key: str
    values: str
    default: str | None
    description: str


class SettingsSection(NamedTuple):
    """A section with its own settings, without inner sections. key: empty at the top of a configuration."""

    key: str
    description: str
    settings: tuple[SettingDescription, ...]


def iterate_sections(
    model: type[BaseModel], key: str = "", value: BaseModel | None = None, field_description: str | None = None
) -> Iterator[SettingsSection]:
    """Yields the section of a model, then its inner sections in the order of the fields.

    Args:
        key: dotted key of the section.  value: default of the section, if the field above has one.
        field_description: description of the field above.
    """
    prefix = f"{key}." if key else ""
    settings, inner = [], []
    for name, field in select_user_fields(model).items():
        default = getattr(value, name) if value is not None else field.get_default(call_default_factory=True)
        below, suffix = _find_section_model(field.annotation)
        description = field.description or _read_first_paragraph(below)
        if below is not None:
            inner_value = default if isinstance(default, BaseModel) else None
            inner.append((below, f"{prefix}{name}{suffix}", inner_value, field.description))
        if below is None or suffix or _allows_null(field.annotation):
            required = field.is_required()
            settings.append(
                SettingDescription(
                    prefix + name,
                    _describe_values(name, field),
                    None if required else _format_yaml(default),
                    description,
                )
            )
    yield SettingsSection(key, field_description or _read_first_paragraph(model), tuple(settings))
    for below, inner_key, inner_value, inner_description in inner:
        yield from iterate_sections(below, inner_key, inner_value, inner_description)


def _read_first_paragraph(model: type[BaseModel] | None) -> str:
    """Returns the first paragraph of a section's docstring."""
    docstring = "" if model is None else inspect.getdoc(model) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def _find_section_model(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Returns the section in a field's type and the suffix of its key: "" alone, "[]" in a list, ".KEY" in a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin: Any = get_origin(annotation)
    end = "[]" if origin is tuple else ".KEY" if origin is dict else ""
    for argument in get_args(annotation):
        section, inner = _find_section_model(argument)
        if section is not None:
            return section, end + inner
    return None, ""


def _allows_null(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


# the values of a setting, in words

_PLAIN = {bool: "true, false", int: "integer", float: "number", str: "text", type(None): "null", Any: "anything"}
_UNITS = {"px": "pixels", "s": "seconds", "mb": "MiB", "gib": "GiB", "deg": "degrees", "days": "days"}


def _describe_values(name: str, field: FieldInfo) -> str:
    """Returns the values of a setting in words, with the unit in its name, as in timeout_s and memory_gib_per_worker."""
    units = [_UNITS[word] for word in name.split("_")[1:] if word in _UNITS]
    return "; ".join([_describe_type(field.annotation, field.metadata), *units[:1]])


def _describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Returns the values that a type and its constraints allow, in words. In a union, the constraints do not apply to null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in annotation.__metadata__ for item in getattr(extra, "metadata", [extra])]
        return _describe_type(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        choices = [_describe_type(item, metadata if item is not type(None) else ()) for item in arguments]
        return (", or " if "," in "".join(choices) else " or ").join(choices)
    if origin is Literal:
        return ", ".join(_format_yaml(value) for value in arguments)
    limits = "".join(_describe_limits(metadata))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_pluralize(_describe_type(arguments[0]))}{limits}"
        return f"[{', '.join(_describe_type(item) for item in arguments)}]"
    if origin is dict:
        return f"mapping of {' to '.join(_pluralize(_describe_type(item)) for item in arguments)}{limits}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    kinds = next((table for table in map(_find_kinds, metadata) if table), None)
    if kinds is not None:
        return ", ".join(kinds)
    if any(getattr(item, "pattern", None) == NAME_PATTERN for item in metadata):
        return "name"
    return _PLAIN[annotation] + limits


def _pluralize(words: str) -> str:
    return {"section": "sections", "name": "names"}.get(words, f"({words})" if "," in words else words)


def _find_kinds(constraint: Any) -> LazyRegistry[Any] | None:
    """Returns the table of kinds whose names a validator allows, or None."""
    owner = getattr(getattr(constraint, "func", None), "__self__", None)
    return owner if isinstance(owner, LazyRegistry) else None


def _describe_limits(metadata: Sequence[Any]) -> Iterator[str]:
    """Yields the limits of a type in words, as in " from 0 to 1"."""

    def find_limit(constraint: str) -> Any:
        return next((value for item in metadata if (value := getattr(item, constraint, None)) is not None), None)

    limits = {name: value for name in ("ge", "gt", "le", "lt") if (value := find_limit(name)) is not None}
    words = {"ge": " from ", "gt": " above ", "le": " to ", "lt": " below "}
    if len(limits) == 2 and list(limits) != ["ge", "le"]:
        words.update(le=", up to ", lt=", below ")
    for name, value in limits.items():
        yield f"{words[name]}{int(value) if value == int(value) else value}"
    if (length := find_limit("min_length")) is not None:
        yield ", not empty" if length == 1 else f", {length} at least"
    if (pattern := find_limit("pattern")) is not None:
        yield f" of the form {pattern}"


def _format_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1000)).removesuffix("...\n").strip()


# the page


def render_markdown() -> str:
    """Returns the text of docs/reference/configuration.md."""
    lines = [
        "# Settings",
        "",
        "This page lists every setting of trainings, sweeps and the service, with its values, default and meaning. `focus-ray "
        "config explain KEY` prints one setting. `focus-ray config show CONFIG` prints a configuration with every default.",
        "",
        "In a YAML file each dot of a key opens a section: `train.steps` is `steps` below `train`. Put text that looks like a "
        'number, or like yes, no, true, false or null, into quotes: `name: "007"` in a file, `\'name="007"\'` in a shell. A key '
        "that appears twice in a section is an error.",
        "",
        "```bash",
        "focus-ray config explain calibration.target_fpr",
        "focus-ray config show default data.uri=data model.image_size_px=512",
        "```",
        "",
        f"`{COMMAND}` writes this page from the settings themselves, and a test fails if the page is out of date.",
        "",
        f"A name is {NAME_WORDS}. A limit after *from*, *to* or *up to* is allowed; a limit after *above* or *below* is not. "
        "[paper] is arXiv 2110.04538, [kin] its published relatives, [ours] a choice of this project.",
    ]
    for kind in CONFIG_KINDS:
        lines += ["", f"## Of {kind.title}", "", kind.usage]
        for section in iterate_sections(kind.model):
            if section.key:
                lines += ["", f"### `{section.key}`", "", section.description]
            if section.settings:
                lines += ["", "| key | value | default | meaning |", "|---|---|---|---|"]
            for setting in section.settings:
                default = f"`{setting.default}`" if setting.default else "to be set"
                cells = (f"`{setting.key}`", setting.values, default, setting.description)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# one key


def explain_key(key: str) -> str:
    """Explains a key or a section, for every configuration that has it. Returns plain text.

    Args:
        key: dotted; a leading `base.`, as in a sweep, is ignored.

    Raises: ConfigError: the key does not exist; the error names similar keys.
    """
    full_key = key.strip().strip(".").removeprefix("base.")
    explanations = [text for kind in CONFIG_KINDS for text in _iterate_explanations(kind, full_key)]
    if not explanations:
        near = _find_similar_keys(full_key)
        hint = f"did you mean {', '.join(near)}?" if near else "docs/reference/configuration.md has all there are"
        raise ConfigError(f"{key}: no such key; {hint}")
    return "\n\n".join(explanations)


def _iterate_explanations(kind: ConfigKind, key: str) -> Iterator[str]:
    """Yields the explanations of a key or a section in one configuration."""
    sections = list(iterate_sections(kind.model))
    settings = [setting for section in sections for setting in section.settings]
    for setting in settings:
        if setting.key == key:
            default = setting.default or "none: it must be set"
            head = f"{key} (of {kind.title})\n  value:   {setting.values}\n  default: {default}\n"
            yield f"{head}  {setting.description}"
    for section in sections:
        if section.key in (key, f"{key}[]", f"{key}.KEY"):
            inside = [setting for setting in settings if setting.key.startswith(f"{section.key}.")]
            width = max(len(setting.key) for setting in inside)
            lines = [f"{section.key} (a section of {kind.title}): {section.description}"]
            yield "\n".join([*lines, *(f"  {item.key:{width}}  {item.default or 'to be set'}" for item in inside)])


def _find_similar_keys(key: str) -> list[str]:
    """Returns up to four similar keys."""
    sections = [section for kind in CONFIG_KINDS for section in iterate_sections(kind.model)]
    keys = [name for section in sections for name in (section.key, *(item.key for item in section.settings)) if name]
    last_parts = {name: name.rpartition(".")[2] for name in keys}
    last = key.rpartition(".")[2]
    close_parts = difflib.get_close_matches(last, dict.fromkeys(last_parts.values()), n=1)
    same_end = [name for name in last_parts if last_parts[name] == last]
    close_end = [name for name in last_parts if last_parts[name] in close_parts]
    similar = difflib.get_close_matches(key, last_parts, n=3)
    return list(dict.fromkeys([*same_end, *similar, *close_end]))[:4]


if __name__ == "__main__":
    sys.stdout.buffer.write(render_markdown().encode())
