"""The reference of all settings, from the models' own fields, and what `focus-ray config explain` says.

`python -m focus_ray.config_reference docs/reference/configuration.md` writes the page anew. No torch, no Ray.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from focus_ray.config import Config
from focus_ray.errors import ConfigError
from focus_ray.kinds import Kinds
from focus_ray.names import NAME_PATTERN, NAME_WORDS
from focus_ray.serving.settings import Settings
from focus_ray.sweep.settings import SweepConfig

COMMAND = "python -m focus_ray.config_reference docs/reference/configuration.md"


@dataclass(frozen=True)
class Root:
    """A kind of configuration.  title: whose, for people.  told: what takes it, in Markdown."""

    title: str
    model: type[BaseModel]
    told: str


ROOTS = (
    Root(
        "a run",
        Config,
        "What `focus-ray train CONFIG key=value ...` takes; `focus-ray config list` has the standard ones.",
    ),
    Root(
        "a sweep",
        SweepConfig,
        "What `focus-ray sweep CONFIG key=value ...` takes ([sweeps](../use/sweeps.md)). Settings of the run that trials start "
        "from stand below `base`, as in `base.train.epochs=5`.",
    ),
    Root("the service", Settings, "What `focus-ray serve PLACE key=value ...` takes ([serving](../use/serving.md))."),
)


@dataclass(frozen=True)
class Setting:
    """One key. key: dotted; `[]` stands for each item of a list, KEY for each key of a mapping.  default: YAML; None where
    it must be set."""

    key: str
    values: str
    default: str | None
    description: str


@dataclass(frozen=True)
class Part:
    """A section: its settings, not those of the sections in it. key: empty at the top of a configuration."""

    key: str
    description: str
    settings: tuple[Setting, ...]


def parts_of(
    model: type[BaseModel], key: str = "", given: BaseModel | None = None, told_above: str | None = None
) -> Iterator[Part]:
    """The sections of a model, itself first, in the order of their fields.

    Args:
        key: the dotted key of this one.  given: what it is where it is not set, if that is known.
        told_above: what the field that holds it says of it.
    """
    prefix = f"{key}." if key else ""
    settings, inner = [], []
    for name, field in model.model_fields.items():
        default = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        below, suffix = _model_in(field.annotation)
        told = field.description or _first_words(below)
        if below is not None:
            known = default if isinstance(default, BaseModel) else None
            inner.append((below, f"{prefix}{name}{suffix}", known, field.description))
        if below is None or suffix or _takes_null(field.annotation):
            required = field.is_required()
            settings.append(Setting(prefix + name, _values(name, field), None if required else _yaml(default), told))
    yield Part(key, told_above or _first_words(model), tuple(settings))
    for below, inner_key, known, description in inner:
        yield from parts_of(below, inner_key, known, description)


def _first_words(model: type[BaseModel] | None) -> str:
    """The first paragraph of a section's own description."""
    own = "" if model is None else inspect.getdoc(model) or ""
    return " ".join(own.split("\n\n")[0].split())


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, alone, in a list or in a mapping, and what its key then ends in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin: Any = get_origin(annotation)
    end = "[]" if origin is tuple else ".KEY" if origin is dict else ""
    for argument in get_args(annotation):
        found, inner = _model_in(argument)
        if found is not None:
            return found, end + inner
    return None, ""


def _takes_null(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


# what a setting may be, in words

_PLAIN = {bool: "true, false", int: "integer", float: "number", str: "text", type(None): "null", Any: "anything"}
_UNITS = {"px": "pixels", "s": "seconds", "mb": "MiB", "gib": "GiB", "deg": "degrees", "days": "days"}


def unit_of(name: str) -> str | None:
    """The unit that a field's name says, as in timeout_s and memory_gib_per_worker."""
    words = name.split("_")[1:]
    return next((_UNITS[word] for word in words if word in _UNITS), None)


def _values(name: str, field: FieldInfo) -> str:
    text = _words(field.annotation, field.metadata)
    unit = unit_of(name)
    return f"{text}; {unit}" if unit else text


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type and its constraints allow, in words; constraints count for whatever of a union is not null or a word."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in annotation.__metadata__ for item in getattr(extra, "metadata", [extra])]
        return _words(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        told = [_words(item, metadata if item is not type(None) else ()) for item in arguments]
        return (", or " if "," in "".join(told) else " or ").join(told)
    if origin is Literal:
        return ", ".join(_yaml(value) for value in arguments)
    limits = "".join(_limits(metadata))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_plural(_words(arguments[0]))}{limits}"
        return f"[{', '.join(_words(item) for item in arguments)}]"
    if origin is dict:
        return f"mapping of {' to '.join(_plural(_words(item)) for item in arguments)}{limits}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    kinds = next((known for known in map(_kinds_in, metadata) if known), None)
    if kinds is not None:
        return ", ".join(kinds)
    if any(getattr(item, "pattern", None) == NAME_PATTERN for item in metadata):
        return "name"
    return _PLAIN[annotation] + limits


def _plural(words: str) -> str:
    return {"section": "sections", "name": "names"}.get(words, f"({words})" if "," in words else words)


def _kinds_in(constraint: Any) -> Kinds[Any] | None:
    """The table of kinds that a validator holds a name against."""
    owner = getattr(getattr(constraint, "func", None), "__self__", None)
    return owner if isinstance(owner, Kinds) else None


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    """What constraints add to a type, as in " from 0 to 1"."""

    def told(constraint: str) -> Any:
        return next((value for item in metadata if (value := getattr(item, constraint, None)) is not None), None)

    limits = {name: value for name in ("ge", "gt", "le", "lt") if (value := told(name)) is not None}
    words = {"ge": " from ", "gt": " above ", "le": " to ", "lt": " below "}
    if len(limits) == 2 and list(limits) != ["ge", "le"]:
        words.update(le=", up to ", lt=", below ")
    for name, value in limits.items():
        yield f"{words[name]}{int(value) if value == int(value) else value}"
    if (length := told("min_length")) is not None:
        yield ", not empty" if length == 1 else f", {length} at least"
    if (pattern := told("pattern")) is not None:
        yield f" of the form {pattern}"


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1000)).removesuffix("...\n").strip()


# the page


def markdown() -> str:
    """All of docs/reference/configuration.md."""
    lines = [
        "# Settings",
        "",
        "This page lists every setting of trainings, sweeps and the service: what it may be, its default, and what it does.",
        "`focus-ray config explain KEY` says the same of one key in the terminal, and `focus-ray config show CONFIG` writes a",
        "configuration with every default. In a YAML file a dotted key is a section: `train.epochs` is `epochs` below `train`.",
        'Put text that looks like a number or like yes, no, true, false or null into quotes: `name: "007"` in a file,',
        "`'name=\"007\"'` in a shell. A key that appears twice in a section is an error.",
        "",
        "```bash",
        "focus-ray config explain calibration.target_fpr",
        "focus-ray config show default data.uri=data model.image_size_px=512",
        "```",
        "",
        f"A test fails where this page is out of date; `{COMMAND}` writes it from the fields' own descriptions.",
        "",
        f"A name is {NAME_WORDS}. A limit told with *from*, *to* or *up to* is itself allowed, one with *above* or *below* is "
        "not. [paper] is arXiv 2110.04538, [kin] its published relatives, [ours] a choice of this project.",
    ]
    for root in ROOTS:
        lines += ["", f"## Of {root.title}", "", root.told]
        for part in parts_of(root.model):
            if part.key:
                lines += ["", f"### `{part.key}`", "", part.description]
            if part.settings:
                lines += ["", "| key | value | default | meaning |", "|---|---|---|---|"]
                lines += [_row(setting) for setting in part.settings]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    default = "to be set" if setting.default is None else f"`{setting.default}`"
    cells = (f"`{setting.key}`", setting.values, default, setting.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# one key


def explain(key: str) -> str:
    """What there is to say of a key or of a section, of every configuration that has it.

    Args:
        key: dotted; `base.` before a key of a run, as sweeps write it, may stand or not.

    Raises: ConfigError: there is none; it names the nearest.
    """
    wanted = key.strip().strip(".")
    if wanted.startswith("base."):
        wanted = wanted.removeprefix("base.")
    found = [text for root in ROOTS for text in _explained(root, wanted)]
    if not found:
        near = _nearest(wanted)
        hint = f"did you mean {', '.join(near)}?" if near else "docs/reference/configuration.md has all there are"
        raise ConfigError(f"{key}: no such key; {hint}")
    return "\n\n".join(found)


def _explained(root: Root, key: str) -> Iterator[str]:
    parts = list(parts_of(root.model))
    settings = [setting for part in parts for setting in part.settings]
    yield from (_explain_setting(root, setting) for setting in settings if setting.key == key)
    for part in parts:
        if part.key in (key, f"{key}[]", f"{key}.KEY"):
            inside = [item for item in settings if item.key.startswith(f"{part.key}.")]
            yield _explain_part(root, part, inside)


def _explain_setting(root: Root, setting: Setting) -> str:
    default = "none: it must be set" if setting.default is None else setting.default
    lines = [
        f"{setting.key} (of {root.title})",
        f"  value:   {setting.values}",
        f"  default: {default}",
        f"  {setting.description}",
    ]
    return "\n".join(lines)


def _explain_part(root: Root, part: Part, settings: Sequence[Setting]) -> str:
    width = max(len(setting.key) for setting in settings)
    lines = [f"{part.key} (a section of {root.title}): {part.description}"]
    lines += [f"  {item.key:{width}}  {'to be set' if item.default is None else item.default}" for item in settings]
    return "\n".join(lines)


def _nearest(wanted: str) -> list[str]:
    keys = dict.fromkeys(key for root in ROOTS for part in parts_of(root.model) for key in _keys(part))
    last = wanted.rpartition(".")[2]
    same_end = [key for key in keys if key.rpartition(".")[2] == last]
    ends = dict.fromkeys(key.rpartition(".")[2] for key in keys)
    close_ends = difflib.get_close_matches(last, ends, n=1)
    close = [key for key in keys if key.rpartition(".")[2] in close_ends]
    similar = difflib.get_close_matches(wanted, keys, n=3)
    return list(dict.fromkeys([*same_end, *similar, *close]))[:4]


def _keys(part: Part) -> Iterator[str]:
    if part.key:
        yield part.key
    yield from (setting.key for setting in part.settings)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
