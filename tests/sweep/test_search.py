"""The search space and the proposals of a sweep: invalid spaces are refused early, and a seed always proposes the same points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import CONFIGS

from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import Config
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.settings import Domain, SweepConfig, grid_points, load_sweep, parse_sweep, setting_keys

SPACE = {"density.shrinkage": {"loguniform": [0.1, 10]}, "density.num_channels": [50, 100]}
BASE = {
    "data": {"uri": "x"},
    "density": {"reduction": "semi_orthogonal"},
}  # with this reduction, the shrinkage changes scores


def make_sweep(**keys: Any) -> SweepConfig:
    """Returns a sweep over SPACE with other settings in `keys`."""
    return parse_sweep({"base": BASE, "space": SPACE, "num_trials": 12, **keys})


def collect_proposals(proposer: Proposer) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number, point) of all proposals; the proposer is told the score of each."""
    proposals = []
    while (proposal := proposer.ask()) is not None:
        proposals.append(proposal)
        proposer.tell(*proposal, score_of(proposal[1]))
    return proposals


def score_of(point: dict[str, Any]) -> float:
    """Returns a score that is highest at a shrinkage of 1."""
    return -abs(float(np.log(point["density.shrinkage"])))


# Invalid spaces


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sapce": {}}, r"sapce: .*'space'"),
        ({"space": {"density.num_chanels": [1]}}, r"'density.num_channels'"),
        ({"space": {"num_channels": [1]}}, r"'density.num_channels'"),
        ({"space": {"xyz": [1]}}, r"space: xyz"),
        ({"space": {"density": [1]}}, r"density is a section.*density.kind, "),
        (
            {"space": {"data.uri": ["a"]}},
            r"data.uri .*base.data.uri",
        ),
        ({"space": {"selection.fraction": [0.1]}}, r"selection.fraction cannot be searched"),
        (
            {"space": {"density.shrinkage": {"uniform": [0, 1]}}},
            r"at density.shrinkage=0.0: .*greater than 0",
        ),
        (
            {"space": {"density.shrinkage": {"uniform": [1, 2000]}}},
            r"at density.shrinkage=2000.0: .*less than or equal",
        ),
        ({"space": {"density.window": [3, 4]}}, r"at density.window=4: .*1, 3 or 5"),
        ({"space": {"model.image_size_px": {"randint": [64, 80]}}}, r"image_size_px=65"),
        ({"space": {"density.shrinkage": {"grid": [1]}}}, r"grid: .*choice, lograndint,"),
        ({"space": {"density.shrinkage": {}}}, r"exactly one of choice.*none"),
        ({"space": {"density.shrinkage": {"uniform": [2, 1]}}}, r"uniform .*\[2.0, 1.0\]"),
        ({"space": {"density.shrinkage": {"loguniform": [0, 1]}}}, r"above 0.*\[0.0, 1.0\]"),
        ({"searcher": "grid"}, r"searcher=grid .*density.shrinkage"),
        (
            {"searcher": "grid", "space": {"density.window": [1, 3]}, "num_trials": 3},
            r"2 points and num_trials=3",
        ),
        (
            {"searcher": "grid", "space": {"density.num_channels": list(range(1, 10002))}, "num_trials": None},
            r"10001 points",
        ),
        ({"num_trials": None}, r"searcher=random .*num_trials"),
        ({"scope": "per_category", "race": {"enabled": True}}, r"race.enabled .*scope=all_categories"),
        ({"race": {"alfa": 0.1}}, r"race.alfa: .*'alpha'"),
        ({"race": {"order": ["a", "a"]}}, r"race.order: "),
        ({"base": {"data": {"uri": "x"}, "density": 3}}, r"density: 'density' holds a value|density: Input should be"),
        ({"base": {}}, r"data: missing"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_starts(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sweep(**keys)


def test_values_of_the_space_are_parsed_as_the_configuration_parses_them() -> None:
    base = {**BASE, "train": {"epochs": 1}}
    space = {"train.learning_rate": ["1e-3", "1e-4"], "density.layers": [["layer1", "layer2"]]}
    sweep = make_sweep(base=base, space=space)
    assert sweep.space["train.learning_rate"].choice == (0.001, 0.0001)  # text in YAML 1.1
    assert sweep.space["density.layers"].choice == (["layer1", "layer2"],)


def test_setting_keys_cover_every_key_of_the_configuration() -> None:
    keys = set(setting_keys())
    assert {"density.shrinkage", "model.image_alignment.group", "train.lambda_ica", "name"} <= keys
    assert not keys & set(Config.model_fields) - {"name", "storage", "trackers"}


# Files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweep*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    sweep = load_sweep(path, ["base.data.uri=s3://plant/parts"])
    assert sweep.config_at().data.uri == "s3://plant/parts"


def test_the_inline_base_and_overrides_replace_values_of_the_base_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {uri: a}\ntrain: {epochs: 3, seed: 5}\n")
    (tmp_path / "sweep.yaml").write_text(
        "base_file: base.yaml\nbase: {train: {epochs: 4}}\nspace: {density.window: [1, 3]}\nsearcher: grid\n"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", ["base.data.uri=b"])
    base = sweep.config_at()
    assert (base.data.uri, base.train.epochs, base.train.seed, sweep.base_file) == ("b", 4, 5, None)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"s\.yaml: .*list"):
        load_sweep(tmp_path / "s.yaml")


# Proposals


@given(low=st.integers(1, 50), span=st.integers(1, 50), seed=st.integers(0, 99), log=st.booleans())
def test_integers_are_drawn_from_a_range_that_includes_both_ends(low: int, span: int, seed: int, log: bool) -> None:
    kind = "lograndint" if log else "randint"
    domain = Domain.model_validate({kind: [low, low + span]})
    rng = np.random.default_rng(seed)
    drawn = {domain.draw(rng) for _ in range(100)}
    assert all(isinstance(value, int) and low <= value <= low + span for value in drawn)
    if span < 3:
        assert drawn == set(range(low, low + span + 1))


def test_a_grid_has_every_combination_once() -> None:
    sweep = make_sweep(searcher="grid", num_trials=None, space={"density.window": [1, 3], "density.shrinkage": [1, 2]})
    assert grid_points(sweep) == [
        {"density.window": w, "density.shrinkage": s} for w in (1, 3) for s in (1.0, 2.0)
    ]  # fmt: skip
    assert [number for number, _ in [Proposer(sweep).ask()] if number == 0] == [0]  # type: ignore[misc]


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_the_same_seed_proposes_the_same_points_and_another_seed_other_points(searcher: str) -> None:
    first, repeated, other_seed = (
        collect_proposals(Proposer(make_sweep(searcher=searcher, seed=seed))) for seed in (1, 1, 2)
    )
    assert first == repeated != other_seed
    assert [number for number, _ in first] == list(range(12))


def test_random_points_are_all_different_and_a_small_space_is_tried_once() -> None:
    points = [json.dumps(point) for _, point in collect_proposals(Proposer(make_sweep()))]
    assert len(set(points)) == 12
    small = make_sweep(space={"density.window": [1, 3, 5]}, num_trials=12)
    assert sorted(point["density.window"] for point in Proposer(small).points) == [1, 3, 5]
    assert small.planned_trials == 3


@pytest.mark.parametrize("searcher", ["random", "optuna"])
@pytest.mark.parametrize("num_done", [1, 6, 11])
def test_a_resumed_sweep_proposes_the_same_points_as_an_uninterrupted_one(searcher: str, num_done: int) -> None:
    sweep = make_sweep(searcher=searcher)
    all_proposals = collect_proposals(Proposer(sweep))
    resumed = Proposer(sweep)
    for number, point in all_proposals[:num_done]:
        resumed.tell(number, point, score_of(point))
    assert collect_proposals(resumed) == all_proposals[num_done:]


def test_the_parzen_estimator_proposes_points_near_the_best() -> None:
    space = {"density.shrinkage": {"loguniform": [0.01, 100]}}
    late_distances: list[float] = []
    for seed in range(5):  # a single sweep may have lucky first points
        points = [
            point
            for _, point in collect_proposals(
                Proposer(make_sweep(searcher="optuna", num_trials=40, space=space, seed=seed))
            )
        ]
        late_distances += [abs(np.log(point["density.shrinkage"])) for point in points[-15:]]
    assert np.median(late_distances) < 0.5 * (np.log(100) / 2)  # half of the median distance of random points


def test_a_failed_trial_is_not_proposed_again() -> None:
    proposer = Proposer(make_sweep(searcher="optuna"))
    failed = proposer.ask()
    assert failed is not None
    proposer.tell_failure(failed[0])
    following = proposer.ask()
    assert following is not None
    assert following[0] == 1
