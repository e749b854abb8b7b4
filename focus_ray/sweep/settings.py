"""A sweep's configuration: what is searched, by what searcher, and what a trial is judged by. No Ray, no torch.

Every point of the space is held against `Config` before anything starts; the same seed proposes the same points again.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, model_validator

from focus_ray.config import Config, Section, apply_override, parse_config, parse_model, read_mapping
from focus_ray.errors import ConfigError
from focus_ray.kinds import METRICS
from focus_ray.names import NAME_PATTERN

Point = dict[str, Any]  # dotted key of Config -> value


def metric_of(objective: str) -> str | None:
    """The metric's key that an objective stands for; None for the label-free validation."""
    return None if objective == "validation" else "aupro_0.3" if objective == "aupro" else objective


def _check_objective(name: str) -> str:
    key = metric_of(name)
    if key is not None and (key not in METRICS.import_paths or not METRICS[key].higher_is_better):
        known = [key for key in METRICS if METRICS[key].higher_is_better]
        raise ValueError(f"objective {name!r} is not known: choose validation, aupro or one of {', '.join(known)}")
    return name


Objective = Annotated[str, AfterValidator(_check_objective)]
_MAX_GRID = 10_000
_MAX_INTEGERS = 4096  # of a range: so many are checked one by one, of longer ones the ends
_REFUSED = {  # what a space may not hold, and why
    "name": "it names the run's folder",
    "storage": "it says where the results go",
    "data": "all trials must learn from and be judged on the same images",
    "calibration": "it does not change the score",
    "cluster": "it does not change the score",
    "trackers": "they do not change the score",
    "selection.fraction": "all trials must be judged on the same images",
    "selection.max_images": "all trials must be judged on the same images",
}


def inert_keys(config: Config) -> dict[str, str]:
    """Keys, or sections ending in a dot, that change no score under a configuration -> why."""
    model, density, train = config.model, config.density, config.train
    alignment = model.image_alignment
    found: dict[str, str] = {}
    if not train.epochs:
        why = "nothing is trained (train.epochs is 0)"
        found.update({key: why for key in leaf_keys() if key.startswith("train.") and key not in _NOT_TRAINING})
        found.update(dict.fromkeys(("model.projector_width", "model.predictor", "model.predictor_width"), why))
    elif not train.lambda_fine:
        why = "train.lambda_fine is 0"
        found.update(dict.fromkeys(("model.projector_width", "model.predictor", "model.predictor_width"), why))
    elif not model.predictor:
        found["model.predictor_width"] = "model.predictor is false"
    if alignment.method == "congealing" or alignment.group == "none":
        why = "no gradient moves the image aligner (model.image_alignment.method is congealing, or its group none)"
        found.update(dict.fromkeys(("train.lambda_ica", "train.learning_rate_image_alignment"), why))
    if alignment.method == "localisation":
        why = "model.image_alignment.method is localisation"
        found.update(dict.fromkeys(("model.image_alignment.min_drop", "model.image_alignment.max_images"), why))
    if alignment.group == "none":
        why = "model.image_alignment.group is none"
        keys = ("method", "min_drop", "max_images", "max_translation", "max_scale", "padding")
        found.update({f"model.image_alignment.{key}": why for key in keys})
    if density.kind == "nearest":
        found["density.pooling"] = "density.kind is nearest"
        if density.reduction == "discriminant":
            why = "density.reduction is discriminant: what it learns is the metric, and nothing is whitened"
            found.update(dict.fromkeys(("density.shrinkage", "density.shrinkage_unit"), why))
    if density.kind == "gaussian":
        of_nearest = ("density.max_images", "density.per_place", "density.coreset", "density.coreset_channels")
        found.update(dict.fromkeys(of_nearest, "density.kind is gaussian"))
        if density.reduction != "discriminant":
            found["density.window"] = "density.kind is gaussian"
    elif not density.coreset:
        found["density.coreset_channels"] = "density.coreset is 0"
    if density.reduction != "discriminant":
        found["density.metric"] = "density.reduction is not discriminant"
    if density.reduction == "none":
        found["density.num_channels"] = "density.reduction is none"
    return found


_NOT_TRAINING = ("train.epochs", "train.seed", "train.batch_size_per_worker")


class Domain(Section):
    """What one key may be: exactly one of these. Ranges include both ends."""

    choice: tuple[Any, ...] | None = Field(
        default=None, min_length=1, description="One of these values; a bare list means the same."
    )
    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]: any number between, all alike.")
    loguniform: tuple[float, float] | None = Field(
        default=None, description="[low, high]: any number between, all orders of magnitude alike."
    )
    randint: tuple[int, int] | None = Field(default=None, description="[low, high]: any integer between, all alike.")
    lograndint: tuple[int, int] | None = Field(
        default=None, description="[low, high]: any integer between, all orders of magnitude alike."
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_choice(cls, value: Any) -> Any:
        return {"choice": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Domain:
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"expected a list of values, or exactly one of {kinds}; got {', '.join(given) or 'none'}")
        if self.choice is None:
            low, high = self.ends
            if not low < high or (self.is_log and low <= 0):
                above = " above 0" if self.is_log else ""
                raise ValueError(f"{given[0]} needs [low, high] with low below high{above}; got [{low}, {high}]")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """Of a range. Raises: AssertionError: a choice has none."""
        bounds = self.uniform or self.loguniform or self.randint or self.lograndint
        assert bounds is not None
        return bounds

    @property
    def is_log(self) -> bool:
        return self.loguniform is not None or self.lograndint is not None

    @property
    def is_integer(self) -> bool:
        return self.randint is not None or self.lograndint is not None

    def samples(self) -> list[Any]:
        """The values that stand for all: every choice, every integer of a range that is not too long, else both ends."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.ends
        if self.is_integer and high - low < _MAX_INTEGERS:
            return list(range(int(low), int(high) + 1))
        return [low, high]

    def draw(self, rng: np.random.Generator) -> Any:
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        low, high = self.ends
        if self.randint is not None:
            return int(rng.integers(int(low), int(high) + 1))
        if self.lograndint is not None:  # every integer stands for what rounds to it
            value = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return int(min(max(round(value), low), high))
        if self.loguniform is not None:
            return float(math.exp(rng.uniform(math.log(low), math.log(high))))
        return float(rng.uniform(low, high))


class SchedulerConfig(Section):
    """Ends trials early that lose to others at the same point of their training."""

    kind: Literal["none", "asha"] = Field(
        default="none",
        description="asha: asynchronous successive halving (arXiv 1810.05934) over (category, epoch): at rungs, only the "
        "best of every reduction_factor trials seen there go on.",
    )
    grace_epochs: int = Field(
        default=1, ge=1, description="Epochs, over all categories, that every trial gets before the first rung."
    )
    reduction_factor: int = Field(
        default=3,
        ge=2,
        le=100,
        description="At a rung one of this many trials goes on; each rung lies this many times further than the one before.",
    )


class RaceConfig(Section):
    """Ends a trial once the first categories show that it loses; docs/use/sweeps.md has the rule [ours, after irace]."""

    enabled: bool = Field(default=False, description="Whether trials race; only for scope=all_categories.")
    order: tuple[str, ...] | None = Field(
        default=None, description="Order in which trials go through the categories; null as they are trained."
    )
    grace_categories: int = Field(
        default=1, ge=1, description="Categories that every trial gets before it may be ended."
    )
    alpha: float = Field(
        default=0.05, gt=0.0, lt=0.5, description="Risk, at each look, of ending a trial that is as good as the best."
    )
    prior_sd: float = Field(
        default=0.03,
        gt=0.0,
        le=1.0,
        description="How far the gap between two settings is expected, before anything is seen, to differ between "
        "categories.",
    )


class SweepConfig(Section):
    """Everything that decides what a sweep tries and finds."""

    name: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Name of the sweep's folder; null makes one up from base.cluster.team, base.name, date and a random "
        "part.",
    )
    base_file: str | None = Field(
        default=None, description="YAML file of the configuration that all trials start from, beside this one."
    )
    base: dict[str, Any] = Field(
        default={}, description="The same configuration inline; what stands here goes over base_file's."
    )
    space: dict[str, Domain] = Field(
        min_length=1, description="What is tried: a dotted key of the configuration, and its list of values or range."
    )
    scope: Literal["all_categories", "per_category"] = Field(
        default="all_categories",
        description="all_categories looks for one setting for all categories, per_category for the best one of each.",
    )
    objective: Objective = Field(
        default="validation",
        description="validation: the label-free score of docs/learn/selection.md. aupro, or a metric of docs/learn/evaluation.md "
        "that is better the higher it is: these look at the labelled test images; what they choose "
        "is no longer a fair test of those images.",
    )
    searcher: Literal["grid", "random", "optuna"] = Field(
        default="random",
        description="Who proposes settings. grid: all combinations. random: drawn. optuna: its tree-structured Parzen "
        "estimator (TPE).",
    )
    num_trials: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_GRID,
        description="How many settings are tried, for each category with scope=per_category; a grid needs none.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the searcher: the same seed proposes the same settings."
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    race: RaceConfig = RaceConfig()
    share_work: bool = Field(
        default=True,
        description="Whether decoded images, and features that no trial changes, are made once for all trials.",
    )
    shared_budget_mb: float | None = Field(
        default=None,
        ge=0.0,
        description="MiB of Ray's object stores that shared work may fill; null takes half of them.",
    )
    cluster_share: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Share of the cluster that trials may fill; for teams that sweep at once.",
    )
    max_concurrent_trials: int | None = Field(
        default=None, ge=1, description="Trials side by side; null takes as many as fit the share."
    )

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        ranges = [key for key, domain in self.space.items() if domain.choice is None]
        if self.searcher == "grid":
            if ranges:
                raise ValueError(f"searcher=grid needs lists of values; {', '.join(ranges)} has a range")
            size = math.prod(len(domain.choice or ()) for domain in self.space.values())
            if size > _MAX_GRID:
                raise ValueError(f"the grid has {size} points, {_MAX_GRID} at most: use searcher=random or optuna")
            if self.num_trials not in (None, size):
                raise ValueError(
                    f"the grid has {size} points and num_trials={self.num_trials}: leave num_trials out, or use "
                    "searcher=random or optuna"
                )
        elif self.num_trials is None:
            raise ValueError(f"searcher={self.searcher} needs num_trials")
        if self.race.enabled and self.scope == "per_category":
            raise ValueError("race.enabled goes over categories: it needs scope=all_categories")
        return self

    @property
    def planned_trials(self) -> int:
        """A category, if scope=per_category; a space of fewer points than num_trials is tried once through."""
        size = math.inf
        if all(domain.choice is not None for domain in self.space.values()):
            size = math.prod(len(domain.choice or ()) for domain in self.space.values())
        wanted = size if self.num_trials is None else self.num_trials
        return int(wanted if self.searcher == "optuna" else min(size, wanted))

    @property
    def max_epochs(self) -> int:
        """The most that any trial trains."""
        domain = self.space.get("train.epochs")
        return self.base_config().train.epochs if domain is None else int(max(domain.samples()))

    def base_config(self, point: Mapping[str, Any] | None = None) -> Config:
        """The configuration that trials start from, with a point's values in it. Raises: ConfigError."""
        tree = json.loads(json.dumps(self.base))
        for key, value in (point or {}).items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise ConfigError(f"space: {key}: {parent!r} holds a value in the base, not a section")
            section[last] = value
        where = ", ".join(f"{key}={value!r}" for key, value in (point or {}).items())
        return parse_config(tree, source=f"space: at {where}" if where else "base")


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep's YAML, applies ``key.sub=value`` overrides and checks the whole space.

    Keys of the configuration are overridden below `base`, as in ``base.data.uri=s3://plant/parts``. A relative
    `base_file` lies beside the YAML.

    Returns: resolved: `base` is complete, `base_file` null.

    Raises: ConfigError: a file cannot be read, or a key, a value or a point of the space does not fit.
    """
    path = Path(path).expanduser()
    tree = read_mapping(path)
    for override in overrides:
        apply_override(tree, override)
    base_file = tree.get("base_file")
    if isinstance(base_file, str):
        above = read_mapping(path.parent / Path(base_file).expanduser())
        tree["base"] = _joined(above, tree.get("base") or {})
        tree["base_file"] = None
    return parse_sweep(tree, source=str(path))


def parse_sweep(tree: Mapping[str, Any], source: str = "sweep") -> SweepConfig:
    """Validates a plain mapping, and every point of its space. Raises: ConfigError."""
    sweep = parse_model(SweepConfig, tree, source)
    try:
        _check_space(sweep)
        base = sweep.base_config()
        order, categories = sweep.race.order, base.data.categories
        if order is not None and (len(set(order)) != len(order) or (categories and set(order) - set(categories))):
            raise ConfigError(f"race.order: expected categories of the base, each once; got {list(order)}")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    # what a value means is what Config makes of it: 1e-3 is text in YAML 1.1
    space = {}
    for key, domain in sweep.space.items():
        if domain.choice is not None:
            values = [_plain(value_of(sweep.base_config({key: value}), key)) for value in domain.choice]
            domain = Domain(choice=tuple(values))
        space[key] = domain
    return sweep.model_copy(update={"base": base.model_dump(mode="json"), "base_file": None, "space": space})


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def leaf_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values of a configuration; a section that may be null is a value too."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaf_keys(field.annotation, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}"
        if get_origin(field.annotation) is dict:  # its keys are names
            continue
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from leaf_keys(part, f"{prefix}{name}.")


def grid_points(sweep: SweepConfig) -> list[Point]:
    """All points of a space of lists, the last key moving fastest."""
    values = [domain.choice or () for domain in sweep.space.values()]
    return [dict(zip(sweep.space, chosen, strict=True)) for chosen in itertools.product(*values)]


def _check_space(sweep: SweepConfig) -> None:
    """Raises: ConfigError: an unknown or refused key, or a value that its field does not take."""
    known = list(leaf_keys())
    for key in sweep.space:
        if key not in known:
            if any(name.startswith(f"{key}.") for name in known):
                inside = ", ".join(name for name in known if name.startswith(f"{key}."))
                raise ConfigError(f"space: {key} is a section: name a key in it: {inside}")
            close = difflib.get_close_matches(key, known, n=1)
            same_end = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
            guess = (same_end or close)[:1]
            hint = f"; did you mean {guess[0]!r}?" if guess else ": `focus-ray train` writes all keys there are"
            raise ConfigError(f"space: {key}: unknown key{hint}")
        if key.startswith(("model.tiling", "model.resize")):
            raise ConfigError(
                f"space: {key} cannot be searched: a sweep looks at images that are stretched, and scored whole; train with each "
                "value instead"
            )
        for refused, why in _REFUSED.items():
            if key == refused or key.startswith(f"{refused}."):
                raise ConfigError(f"space: {key} cannot be searched: {why}; set base.{key} instead")
    of_base = inert_keys(sweep.base_config())
    points = [{key: value} for key, domain in sweep.space.items() for value in domain.samples()]
    # what is inert at every value of the others changes nothing anywhere
    inert = [inert_keys(sweep.base_config(point)) for point in points]
    for key in sweep.space:
        of_others = [found for point, found in zip(points, inert, strict=True) if key not in point]
        if all(key in found for found in [of_base, *of_others]):
            raise ConfigError(f"space: {key} changes no score here: {of_base[key]}; take it out, or change that")
    if sweep.searcher == "grid":
        for point in grid_points(sweep):
            sweep.base_config(point)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined, those above over those below."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _joined(result[key], value) if both else value
    return result
