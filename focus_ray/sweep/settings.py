"""The configuration of a sweep: the search space, the searcher and the objective (the score to maximize). Without Ray and torch.

The search space (the values that each setting may get) is validated before anything starts. The same seed proposes the same
points (choices of settings), unless the searcher is `optuna`, which also depends on the scores.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from focus_ray.density.registry import DENSITIES
from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.metrics.registry import METRICS
from focus_ray.names import NAME_PATTERN, suggest_similar_name
from focus_ray.settings.sections import (
    ConfigSection,
    apply_override,
    dump_settings,
    iterate_setting_keys,
    read_yaml_mapping,
    validate_section,
)

Point = dict[str, Any]  # dotted key of Config -> value


def get_objective_metric(objective: str) -> str | None:
    """Returns the key in `METRICS` of the metric that a sweep maximizes; None for the label-free validation score.

    Args: objective: Value of `SweepConfig.objective`.
    """
    return None if objective == "validation" else "aupro_0.3" if objective == "aupro" else objective


def _check_objective(name: str) -> str:
    """Checks the name of the objective (the score that a sweep maximizes), and returns it unchanged.

    Raises:
        ValueError: The name is neither `validation` nor `aupro` nor the key of a metric for which higher is better.
    """
    key = get_objective_metric(name)
    if key is not None and (key not in METRICS.import_paths or not METRICS[key].higher_is_better):
        allowed = [key for key in METRICS if METRICS[key].higher_is_better]
        raise ValueError(f"objective {name!r} is unknown: choose validation, aupro or one of {', '.join(allowed)}")
    return name


Objective = Annotated[str, AfterValidator(_check_objective)]
_MAX_GRID = 10_000
_MAX_CHECKED_INTEGERS = 4096  # every integer of a range up to this length is checked; of a longer range only both ends
_WHOLE_IMAGES = "a sweep only scores whole, stretched images: run `focus-ray train` with each value instead"
_REFUSED = {  # key or section that cannot be searched -> reason and advice
    "name": "it names the run's folder: set base.name instead",
    "storage": "it says where the results go: set base.storage instead",
    "data": "all trials must learn from and be judged on the same images: set it in base.data instead",
    "calibration": "it does not change the score: set it in base.calibration instead",
    "cluster": "it does not change the score: set it in base.cluster instead",
    "trackers": "they do not change the score: set base.trackers instead",
    "selection.fraction": "all trials must be judged on the same images: set base.selection.fraction instead",
    "model.tiling": _WHOLE_IMAGES,
    "model.resize": _WHOLE_IMAGES,
}


def find_settings_without_effect(config: Config) -> dict[str, str]:
    """Returns the settings that change no score under a configuration: dotted key -> the reason."""
    model, density, train = config.model, config.density, config.train
    alignment = model.image_alignment
    training_keys = [
        key for key in iterate_setting_keys(Config) if key.startswith("train.") and key not in _USED_WITHOUT_TRAINING
    ]
    rules = [  # (whether the rule holds, keys without effect, reason); of several rules for a key, the last gives the reason
        (not train.lambda_fine, ["model.predictor_width"], "train.lambda_fine is 0"),
        (not train.steps, [*training_keys, "model.predictor_width"], "nothing is trained (train.steps is 0)"),
        (
            alignment.method == "congealing" or alignment.group == "none",
            ["train.lambda_ica"],
            "no gradient moves the image aligner (model.image_alignment.method is congealing, or its group none)",
        ),
        (alignment.group == "none", ["model.image_alignment.method"], "model.image_alignment.group is none"),
        *(
            (True, [f"density.{key}"], why)
            for key, why in DENSITIES[density.kind].find_unused_settings(density).items()
        ),
        (density.reduction != "discriminant", ["density.metric"], "density.reduction is not discriminant"),
        (density.reduction == "none", ["density.num_channels"], "density.reduction is none"),
    ]
    return {key: why for holds, keys, why in rules if holds for key in keys}


_USED_WITHOUT_TRAINING = ("train.steps", "train.seed")


class SearchDomain(ConfigSection):
    """The values that a search may give to one setting: a list or a range. Exactly one field is set.

    A range includes both ends.
    """

    choice: tuple[Any, ...] | None = Field(
        default=None, min_length=1, description="One of these values; a list without a key means the same."
    )
    uniform: tuple[float, float] | None = Field(
        default=None, description="[low, high]: a number in this range, uniformly distributed."
    )
    loguniform: tuple[float, float] | None = Field(
        default=None, description="[low, high]: a number in this range, uniformly distributed on a logarithmic scale."
    )
    randint: tuple[int, int] | None = Field(
        default=None, description="[low, high]: an integer in this range, uniformly distributed."
    )
    lograndint: tuple[int, int] | None = Field(
        default=None, description="[low, high]: an integer in this range, uniformly distributed on a logarithmic scale."
    )

    @model_validator(mode="before")
    @classmethod
    def _convert_list_to_choice(cls, value: Any) -> Any:
        """Turns a list without a key into the field `choice`."""
        return {"choice": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check_single_kind(self) -> SearchDomain:
        """Checks that exactly one field is set, and that the low end of a range is below its high end.

        Raises:
            ValueError: This is not the case, or a logarithmic range does not begin above 0.
        """
        kinds_set = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(kinds_set) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"expected a list of values, or exactly one of {kinds}; got {kinds_set}")
        if self.choice is None and (
            not self.bounds[0] < self.bounds[1] or (self.is_logarithmic and self.bounds[0] <= 0)
        ):
            bound = " above 0" if self.is_logarithmic else ""
            raise ValueError(f"{kinds_set[0]} needs [low, high] with low below high{bound}; got {list(self.bounds)}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The low and the high end of the range. A domain that is a list has no ends."""
        bounds = self.uniform or self.loguniform or self.randint or self.lograndint
        assert bounds is not None  # the domain is a range
        return bounds

    @property
    def is_logarithmic(self) -> bool:
        """Whether the domain is a range that is drawn on a logarithmic scale."""
        return self.loguniform is not None or self.lograndint is not None

    @property
    def is_integer(self) -> bool:
        """Whether the domain is a range of integers."""
        return self.randint is not None or self.lograndint is not None

    def list_checked_values(self) -> list[Any]:
        """Returns the values that a sweep checks: all listed values, all integers of a short range, or the ends of a range."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.bounds
        if self.is_integer and high - low < _MAX_CHECKED_INTEGERS:
            return list(range(int(low), int(high) + 1))
        return [low, high]

    def draw_value(self, rng: np.random.Generator) -> Any:
        """Returns a random value of the list or the range."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        low, high = self.bounds
        if self.randint is not None:
            return int(rng.integers(int(low), int(high) + 1))
        if self.lograndint is not None:
            # Draw a number and round it: every integer gets its share of the logarithmic scale.
            value = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return int(min(max(round(value), low), high))
        if self.loguniform is not None:
            return float(math.exp(rng.uniform(math.log(low), math.log(high))))
        return float(rng.uniform(low, high))


class SchedulerConfig(ConfigSection):
    """Prunes trials that have a low score compared with other trials at the same point of their training."""

    FIXED: ClassVar[Mapping[str, Any]] = {"grace_epochs": 1}

    kind: Literal["none", "asha"] = Field(
        default="none",
        description="asha: asynchronous successive halving (arXiv 1810.05934) over categories and steps. At each rung, only the "
        "best of every reduction_factor trials go on.",
    )
    grace_steps: int = Field(
        default=50,
        ge=1,
        description="Number of steps over all categories that every trial may train before the first rung.",
    )
    reduction_factor: int = Field(
        default=3,
        ge=2,
        le=100,
        description="At a rung, one of this many trials goes on. Each rung has this many times the steps of the rung before.",
    )


class RaceConfig(ConfigSection):
    """Prunes trials by a race: a trial ends if the best trial is significantly better on the first categories.

    docs/use/sweeps.md describes the test [ours, after irace].
    """

    enabled: bool = Field(default=False, description="Whether trials race; only with scope=all_categories.")
    order: tuple[str, ...] | None = Field(
        default=None,
        description="Order in which trials go through the categories; null takes the order of the training.",
    )
    grace_categories: int = Field(
        default=1, ge=1, description="Number of categories that every trial finishes before it may be pruned."
    )
    alpha: float = Field(
        default=0.05, gt=0.0, lt=0.5, description="Risk at each test of pruning a trial that is as good as the best."
    )
    prior_sd: float = Field(
        default=0.03,
        gt=0.0,
        le=1.0,
        description="Expected standard deviation, over the categories, of the score gap between two trials.",
    )


class SweepConfig(ConfigSection):
    """The configuration of a sweep: a search for the settings with the best score."""

    name: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Name of the sweep's folder; null makes a name from base.cluster.team, base.name, the date and random "
        "characters.",
    )
    base_file: str | None = Field(
        default=None, description="YAML file of the base configuration of all trials, relative to this file."
    )
    base: dict[str, Any] = Field(
        default={}, description="The base configuration of all trials; its values replace those of base_file."
    )
    space: dict[str, SearchDomain] = Field(
        min_length=1, description="The search space: dotted key of the configuration -> list of values, or range."
    )
    scope: Literal["all_categories", "per_category"] = Field(
        default="all_categories",
        description="all_categories searches for one setting for all categories, per_category for the best setting of each.",
    )
    objective: Objective = Field(
        default="validation",
        description="validation: the label-free score of docs/learn/selection.md. aupro, or a metric of docs/learn/evaluation.md "
        "for which higher is better: these use the labelled test images, which are then no fair test of the "
        "chosen settings any more.",
    )
    searcher: Literal["grid", "random", "optuna"] = Field(
        default="random",
        description="How settings are proposed. grid: all combinations. random: random points. optuna: a tree-structured "
        "Parzen estimator (TPE).",
    )
    num_trials: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_GRID,
        description="Number of trials, of each category with scope=per_category; not needed for a grid.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the searcher: the same seed proposes the same settings."
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    race: RaceConfig = RaceConfig()
    share_work: bool = Field(
        default=True,
        description="Whether decoded images, and features that no trial changes, are computed once for all trials.",
    )
    shared_budget_mb: float | None = Field(
        default=None,
        ge=0.0,
        description="MiB of Ray's object stores that shared images and features may take; null takes half of the stores.",
    )
    cluster_share: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Share of the cluster that the trials may use; for teams that run sweeps at the same time.",
    )
    max_concurrent_trials: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of trials that run at once; null takes as many as fit into cluster_share.",
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> SweepConfig:
        """Checks settings that depend on each other, such as the searcher and the number of trials.

        Raises:
            ValueError: Two settings contradict each other, or a required setting is missing.
        """
        ranges = [key for key, domain in self.space.items() if domain.choice is None]
        if self.searcher == "grid":
            if ranges:
                raise ValueError(f"searcher=grid needs lists of values; {', '.join(ranges)} has a range")
            if self.num_points > _MAX_GRID or self.num_trials not in (None, self.num_points):
                raise ValueError(
                    f"the grid has {self.num_points} points, {_MAX_GRID} at most, and num_trials={self.num_trials}: leave "
                    "num_trials out, or use searcher=random or optuna"
                )
        elif self.num_trials is None:
            raise ValueError(f"searcher={self.searcher} needs num_trials")
        if self.race.enabled and self.scope == "per_category":
            raise ValueError("race.enabled compares categories: it needs scope=all_categories")
        return self

    @property
    def num_points(self) -> float:
        """The number of combinations of values in the search space; infinite if a setting has a range."""
        return math.prod(len(domain.choice) if domain.choice else math.inf for domain in self.space.values())

    @property
    def num_planned_trials(self) -> int:
        """The number of trials, of each category with scope=per_category.

        The searchers `grid` and `random` try each combination of values at most once.
        """
        limit = self.num_points if self.num_trials is None else self.num_trials
        return int(limit if self.searcher == "optuna" else min(self.num_points, limit))

    def list_setting_values(self, key: str) -> list[Any]:
        """Returns values that trials give to a setting: the checked values if it is searched, else the value of the base.

        Args: key: Dotted key of the setting.
        """
        domain = self.space.get(key)
        return [operator.attrgetter(key)(self.make_trial_config())] if domain is None else domain.list_checked_values()

    @property
    def max_steps(self) -> int:
        """The largest number of training steps of any trial."""
        return int(max(self.list_setting_values("train.steps")))

    @property
    def largest_image_config(self) -> Config:
        """The base configuration of all trials, with the largest image size of all trials, for synthetic defects.

        Defects are drawn at this size, and scaled down for smaller sizes.
        """
        return self.make_trial_config({"model.image_size_px": max(self.list_setting_values("model.image_size_px"))})

    def list_single_setting_points(self) -> list[Point]:
        """Returns points with one setting each, to check each value of `SearchDomain.list_checked_values` alone."""
        return [{key: value} for key, domain in self.space.items() for value in domain.list_checked_values()]

    def make_trial_config(self, point: Mapping[str, Any] | None = None) -> Config:
        """Returns the configuration of a trial: the base configuration with the values of a point of the search space.

        Args:
            point: Dotted key -> value; None returns the base configuration.

        Raises:
            ConfigError: The configuration is not valid.
        """
        tree = copy.deepcopy(self.base)
        for key, value in (point or {}).items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise ConfigError(f"space: {key}: {parent!r} is a value in the base configuration, not a section")
            section[last] = value
        return parse_config(tree, source=f"space: at {describe_point(point)}" if point else "base")


def describe_point(point: Mapping[str, Any]) -> str:
    """Returns the settings of a point of the search space as text, such as "density.window=3, train.steps=5"."""
    return ", ".join(f"{key}={value!r}" for key, value in point.items())


def load_sweep_config(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads the YAML file of a sweep, applies overrides and checks the configuration as `parse_sweep_config` does.

    Args:
        path: YAML file. A relative `base_file` is relative to its folder.
        overrides: Texts "key.sub=value". Keys of the base configuration begin with `base.`: "base.data.uri=s3://plant/parts".

    Returns:
        The configuration, with the complete `base` and without `base_file`.

    Raises:
        ConfigError: A file cannot be read, or a key, a value or a combination in the search space is not valid.
    """
    path = Path(path).expanduser()
    tree = read_yaml_mapping(path)
    for override in overrides:
        apply_override(tree, override)
    base_file = tree.pop("base_file", None)
    if base_file is not None:
        base_tree = read_yaml_mapping(path.parent / Path(str(base_file)).expanduser())
        tree["base"] = _merge_nested_dicts(base_tree, tree.get("base") or {})
    return parse_sweep_config(tree, source=str(path))


def parse_sweep_config(tree: Mapping[str, Any], source: str = "sweep") -> SweepConfig:
    """Checks the configuration of a sweep and its search space, and returns it with a complete base configuration.

    Checks each listed value alone. Of a range, checks both ends, or every integer if the range is short. Checks combinations of
    values only for the searcher `grid`.

    Args:
        tree: The configuration of the sweep as nested dicts.
        source: Name of the file for error messages.

    Raises:
        ConfigError: The configuration is not valid.
    """
    sweep = validate_section(SweepConfig, tree, source)
    try:
        _check_search_space(sweep)
        base = sweep.make_trial_config()
        order, categories = sweep.race.order, base.data.categories
        if order is not None and (len(set(order)) != len(order) or (categories and set(order) - set(categories))):
            raise ConfigError(
                f"race.order: expected categories of the base configuration, each once; got {list(order)}"
            )
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    # Take the values as `Config` parses them: for instance, 1e-3 is a text in YAML 1.1.
    space = dict(sweep.space)
    for key, domain in space.items():
        if domain.choice is not None:
            parsed = [operator.attrgetter(key)(sweep.make_trial_config({key: value})) for value in domain.choice]
            space[key] = SearchDomain(choice=tuple(TypeAdapter(Any).dump_python(parsed, mode="json")))
    return sweep.model_copy(update={"base": dump_settings(base), "base_file": None, "space": space})


def list_grid_points(sweep: SweepConfig) -> list[Point]:
    """Returns all combinations of the listed values of a search space; the last key changes fastest. Ranges are not allowed."""
    values = [domain.choice or () for domain in sweep.space.values()]
    return [dict(zip(sweep.space, combination, strict=True)) for combination in itertools.product(*values)]


def _check_search_space(sweep: SweepConfig) -> None:
    """Checks every key of the search space and its checked values; for the searcher `grid`, every combination.

    Raises:
        ConfigError: A key is unknown, cannot be searched or changes no score, or a value or combination is not valid.
    """
    all_keys = list(iterate_setting_keys(Config))
    for key in sweep.space:
        if key not in all_keys:
            keys_inside = [name for name in all_keys if name.startswith(f"{key}.")]
            same_last_part = [name for name in all_keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = f"it is a section: name a key in it: {', '.join(keys_inside)}" if keys_inside else ""
            hint = hint or suggest_similar_name(same_last_part[0] if same_last_part else key, all_keys)
            raise ConfigError(f"space: {key}: unknown key; {hint or '`focus-ray config explain` lists the keys'}")
        for refused, why in _REFUSED.items():
            if f"{key}.".startswith(f"{refused}."):
                raise ConfigError(f"space: {key} cannot be searched: {why}")
    base_reasons = find_settings_without_effect(sweep.make_trial_config())
    # A key is refused if it is inert at every value of all other keys.
    reasons_by_point = [
        (point, find_settings_without_effect(sweep.make_trial_config(point)))
        for point in sweep.list_single_setting_points()
    ]
    for key in sweep.space:
        if key in base_reasons and all(key in point or key in reasons for point, reasons in reasons_by_point):
            raise ConfigError(
                f"space: {key} changes no score: {base_reasons[key]}; remove the key from the space, or change this setting"
            )
    if sweep.searcher == "grid":
        for point in list_grid_points(sweep):
            sweep.make_trial_config(point)


def _merge_nested_dicts(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two nested dicts. Values of `upper` replace values of `lower`. Returns a new dict."""
    merged = dict(lower)
    for key, value in upper.items():
        are_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge_nested_dicts(merged[key], value) if are_mappings else value
    return merged
