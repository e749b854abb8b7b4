"""Sections of a configuration: frozen models that refuse unknown keys. Reads YAML with overrides, writes resolved YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

from focus_ray.errors import ConfigError
from focus_ray.names import suggest_similar_name
from focus_ray.settings.yaml_text import load_yaml

Layer = Literal["layer1", "layer2", "layer3"]
Precision = Literal["auto", "fp32", "bf16"]
LAYERS: tuple[str, ...] = get_args(Layer)


class ConfigSection(BaseModel):
    """Base class of all sections: frozen, without unknown keys.

    Attributes:
        FIXED: setting of an earlier version -> the value that it always has now. A configuration may contain it with this value.
        FIXED_FOR_SCORES: keys of `FIXED` that change the scores of a fitted model. The other keys only change how a model is
            fitted, so a bundle that was fitted with another value is still read.
        STORED: fields that a user cannot change. They are fields, because a bundle that was fitted with another value keeps it.
            A class adds its fields to those of its base classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    FIXED: ClassVar[Mapping[str, Any]] = {}
    FIXED_FOR_SCORES: ClassVar[frozenset[str]] = frozenset()
    STORED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def stored_fields(cls) -> frozenset[str]:
        """Returns `STORED` of this class and of all its base classes."""
        return frozenset().union(*(vars(base).get("STORED", ()) for base in cls.__mro__))

    @classmethod
    def derive_stored_values(cls, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the value of each field in `STORED` for the settings of a user: name of the field -> value.

        Args: tree: the settings of the section, not validated.
        """
        return {name: cls.model_fields[name].default for name in cls.stored_fields()}

    @model_validator(mode="before")
    @classmethod
    def _drop_fixed_settings(cls, value: Any, info: ValidationInfo) -> Any:
        """Drops fixed settings that have their value; for a bundle, keeps stored values and drops harmless other values.

        Raises: ValueError: a setting that a user cannot change has another value.
        """
        if not isinstance(value, dict):
            return value
        is_fitted = bool(info.context and info.context.get("is_fitted"))
        stored_values = cls.derive_stored_values(value)
        for key, fixed in {**cls.FIXED, **stored_values}.items():
            is_harmless = is_fitted and key not in cls.FIXED_FOR_SCORES
            if key in value and _to_lists(value[key]) != _to_lists(fixed) and not is_harmless:
                raise ValueError(
                    f"{key} is always {_to_lists(fixed)!r} in this version (got {value[key]!r}): leave it out"
                )
        if not is_fitted:
            value = {**value, **stored_values}
        return {**stored_values, **{key: setting for key, setting in value.items() if key not in cls.FIXED}}


def _to_lists(value: Any) -> Any:
    """Returns a list instead of a tuple, so that a default equals the same value from YAML."""
    return list(value) if isinstance(value, tuple) else value


M = TypeVar("M", bound=BaseModel)


def read_config_tree(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the mapping that `load_config` validates: the file with the overrides applied. Raises: ConfigError: see there."""
    return apply_overrides(read_yaml_mapping(path), overrides)


def apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Applies ``key.sub=value`` overrides in place and returns the tree. Raises: ConfigError: an override has another form."""
    for override in overrides:
        apply_override(tree, override)
    return tree


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Reads the top mapping of a YAML file. Raises: ConfigError: the file cannot be read, or has no mapping at the top."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    return parse_yaml_mapping(text, str(path))


def parse_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """Parses the top mapping of a YAML text. Raises: ConfigError: the text is not YAML, or has no mapping at the top."""
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of sections at the top, got {type(tree).__name__}")
    return tree


def validate_section(model: type[M], tree: Any, source: str, is_fitted: bool = False) -> M:
    """Validates a plain mapping against a model.

    Args:
        source: where the mapping comes from, for the error message.
        is_fitted: whether the configuration belongs to a fitted model (`ConfigSection.FIXED_FOR_SCORES`).

    Raises: ConfigError: a value is wrong; the error names key, value and expected values.
    """
    try:
        return model.model_validate(tree, context={"is_fitted": is_fitted})
    except ValidationError as error:
        raise ConfigError(
            f"{source}: " + "; ".join(_describe_validation_error(item, model) for item in error.errors())
        ) from None


def config_to_yaml(config: BaseModel) -> str:
    """Returns the resolved configuration as YAML, with every default, but without the fields that a user cannot change."""
    return yaml.safe_dump(dump_settings(config), sort_keys=False)


def dump_settings(section: BaseModel) -> dict[str, Any]:
    """Returns the settings of a section and of its inner sections as JSON types, without the fields in `STORED`."""
    inner = {name: dump_settings(value) for name, value in section if isinstance(value, BaseModel)}
    tree = {**section.model_dump(mode="json"), **inner}
    return {name: tree[name] for name in select_user_fields(type(section))}


def select_user_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the fields of a section that a user can set, without the fields in `STORED`: name -> field."""
    stored = model.stored_fields() if issubclass(model, ConfigSection) else frozenset()
    return {name: field for name, field in model.model_fields.items() if name not in stored}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Applies one ``key.sub=value`` to a plain mapping, in place. Raises: ConfigError: the override has another form."""
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, for instance train.steps=10")
    try:
        value = load_yaml(raw) if raw else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    for part in parts[:-1]:
        if tree.get(part) is None:
            tree[part] = {}  # an empty section of the file is null
        child = tree[part]
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
        tree = child
    tree[parts[-1]] = value


def iterate_setting_keys(model: type[BaseModel], prefix: str = "", with_sections: bool = False) -> Iterator[str]:
    """Yields the dotted keys of all settings of a model. An optional section gives its own key and the keys of its settings.

    Args: with_sections: also yield the keys of all other sections.
    """
    for name, field in select_user_fields(model).items():
        key, annotation = f"{prefix}{name}", field.annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if with_sections or not is_section:
            yield key
        if get_origin(annotation) is dict:  # the keys of a dict are names that the user chooses
            continue
        for part in (annotation, *get_args(annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from iterate_setting_keys(part, f"{key}.", with_sections)


def _describe_validation_error(item: Any, model: type[BaseModel]) -> str:
    """Returns an error of pydantic as one sentence with key, problem and remedy."""
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        field_names = _list_valid_keys(item["loc"], model)
        hint = suggest_similar_name(str(item["loc"][-1]), field_names) or f"known keys: {', '.join(field_names)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: missing; set it"
    if item["type"] == "string_type" and not isinstance(item["input"], (dict, list)):
        return f"{where}: {_explain_yaml_quoting(item['loc'], item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{where}: {message}{shown}"


def _explain_yaml_quoting(loc: tuple[Any, ...], value: Any) -> str:
    """Says how to quote text that YAML reads as another type. value: the value that YAML read."""
    kinds = {type(None): "an empty value", bool: "true or false", int: "a number", float: "a number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    text = '"TEXT"' if value is None or isinstance(value, bool) else f'"{value}"'
    key, entry = ".".join(str(part) for part in loc if isinstance(part, str)), text
    if isinstance(loc[-1], int):
        entry = f"[{text}]"
    return (
        f"expected text, and YAML reads {kind} (got {value!r}): put quotes around the text, as in {entry}; in a shell "
        f"'{key}={entry}'"
    )


def _list_valid_keys(loc: tuple[Any, ...], model: Any) -> list[str]:
    """Returns the valid keys of the section in which an unknown key was found."""
    for part in loc[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel):
            annotation: Any = model.model_fields[part].annotation if part in model.model_fields else None
        else:  # a mapping of names to models
            annotation = get_args(model)[1]
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not is_model and get_origin(annotation) is not dict:
            return []
        model = annotation
    return sorted(select_user_fields(model))
