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
from focus_ray.sweep.proposer import SettingsProposer
from focus_ray.sweep.settings import SearchDomain, SweepConfig, list_grid_points, load_sweep_config, parse_sweep_config

SPACE = {"density.shrinkage": {"loguniform": [0.1, 10]}, "density.num_channels": [50, 100]}
BASE = {"data": {"uri": "x"}, "density": {"reduction": "semi_orthogonal"}}  # with it, the shrinkage changes scores


def make_sweep(**keys: Any) -> SweepConfig:
    """Returns a sweep over SPACE with other settings in `keys`."""
    return parse_sweep_config({"base": BASE, "space": SPACE, "num_trials": 12, **keys})


def make_shrinkage_space(**kinds: Any) -> dict[str, Any]:
    """Returns the keys of a sweep over the shrinkage in a domain."""
    return {"space": {"density.shrinkage": kinds}}


def collect_proposals(proposer: SettingsProposer) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number, point) of all proposals; the proposer is told the score of each."""
    proposals = []
    while (proposal := proposer.propose_trial()) is not None:
        proposals.append(proposal)
        proposer.record_result(*proposal, compute_score(proposal[1]))
    return proposals


def compute_score(point: dict[str, Any]) -> float:
    """Returns a score that is highest at a shrinkage of 1."""
    return -abs(float(np.log(point["density.shrinkage"])))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sapce": {}}, "sapce: .*'space'"),
        ({"space": {"density.num_chanels": [1]}}, "'density.num_channels'"),
        ({"space": {"num_channels": [1]}}, "'density.num_channels'"),
        ({"space": {"xyz": [1]}}, "space: xyz"),
        ({"space": {"density": [1]}}, "density: .* is a section.*density.kind, "),
        ({"space": {"data.uri": ["a"]}}, "data.uri cannot be searched.*base.data"),
        ({"space": {"selection.fraction": [0.1]}}, "selection.fraction cannot be searched"),
        ({"space": {"model.tiling.density": ["shared"]}}, "model.tiling.density cannot be searched"),
        ({"space": {"train.lambda_ica": [0.1]}}, "train.lambda_ica changes no score: .*no gradient"),
        (make_shrinkage_space(uniform=[0, 1]), "at density.shrinkage=0.0: .*above 0"),
        (make_shrinkage_space(uniform=[1, 2000]), "at density.shrinkage=2000.0: .*up to 1000"),
        ({"space": {"density.window": [3, 4]}}, "at density.window=4: .*1, 3 or 5"),
        ({"space": {"model.image_size_px": {"randint": [64, 80]}}}, "image_size_px=65"),
        (make_shrinkage_space(grid=[1]), "grid: .*choice, lograndint,"),
        (make_shrinkage_space(), "exactly one of choice"),
        (make_shrinkage_space(uniform=[2, 1]), r"uniform .*\[2.0, 1.0\]"),
        (make_shrinkage_space(loguniform=[0, 1]), r"above 0.*\[0.0, 1.0\]"),
        ({"searcher": "grid"}, "searcher=grid .*density.shrinkage"),
        ({"searcher": "grid", "space": {"density.window": [1, 3]}, "num_trials": 3}, "2 points.*num_trials=3"),
        ({"searcher": "grid", "space": {"density.num_channels": list(range(1, 10002))}, "num_trials": None}, "10001"),
        ({"num_trials": None}, "searcher=random .*num_trials"),
        ({"scope": "per_category", "race": {"enabled": True}}, "race.enabled .*scope=all_categories"),
        ({"race": {"alfa": 0.1}}, "race.alfa: .*'alpha'"),
        ({"race": {"order": ["a", "a"]}}, "race.order: "),
        ({"base": {"data": {"uri": "x"}, "density": 3}}, "density: 'density' holds a value|density: Input should be"),
        ({"base": {}}, "data: missing"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_starts(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sweep(**keys)


def test_values_of_the_space_are_parsed_as_the_configuration_parses_them() -> None:
    space = {"train.learning_rate": ["1e-3", "1e-4"]}
    sweep = make_sweep(base={**BASE, "train": {"steps": 1}}, space=space)
    assert sweep.space["train.learning_rate"].choice == (0.001, 0.0001)  # text in YAML 1.1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweep*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    assert (
        load_sweep_config(path, ["base.data.uri=s3://plant/parts"]).make_trial_config().data.uri == "s3://plant/parts"
    )


def test_the_inline_base_and_overrides_replace_values_of_the_base_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {uri: a}\ntrain: {steps: 3, seed: 5}\n")
    (tmp_path / "sweep.yaml").write_text(
        "base_file: base.yaml\nbase: {train: {steps: 4}}\nspace: {density.window: [1, 3]}\nsearcher: grid\n"
    )
    base = load_sweep_config(tmp_path / "sweep.yaml", ["base.data.uri=b"]).make_trial_config()
    assert (base.data.uri, base.train.steps, base.train.seed) == ("b", 4, 5)


# Proposals


@given(low=st.integers(1, 50), span=st.integers(1, 50), seed=st.integers(0, 99), log=st.booleans())
def test_integers_are_drawn_from_a_range_that_includes_both_ends(low: int, span: int, seed: int, log: bool) -> None:
    domain = SearchDomain.model_validate({"lograndint" if log else "randint": [low, low + span]})
    rng = np.random.default_rng(seed)
    drawn = {domain.draw_value(rng) for _ in range(100)}
    assert drawn <= set(range(low, low + span + 1))
    if span < 3:
        assert drawn == set(range(low, low + span + 1))


def test_a_grid_has_every_combination_once() -> None:
    sweep = make_sweep(searcher="grid", num_trials=None, space={"density.window": [1, 3], "density.shrinkage": [1, 2]})
    expected = [{"density.window": w, "density.shrinkage": s} for w in (1, 3) for s in (1.0, 2.0)]
    assert list_grid_points(sweep) == [point for _, point in collect_proposals(SettingsProposer(sweep))] == expected


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_the_same_seed_proposes_the_same_points_also_when_it_is_resumed(searcher: str) -> None:
    first, other_seed = (
        collect_proposals(SettingsProposer(make_sweep(searcher=searcher, seed=seed))) for seed in (1, 2)
    )
    assert first != other_seed
    assert [number for number, _ in first] == list(range(12))
    for num_done in (0, 1, 6, 11):
        resumed = SettingsProposer(make_sweep(searcher=searcher, seed=1))
        for number, point in first[:num_done]:
            resumed.record_result(number, point, compute_score(point))
        assert collect_proposals(resumed) == first[num_done:]


def test_random_points_are_all_different_and_a_small_space_is_tried_once() -> None:
    assert len({json.dumps(point) for point in SettingsProposer(make_sweep()).points}) == 12
    small = make_sweep(space={"density.window": [1, 3, 5]}, num_trials=12)
    assert sorted(point["density.window"] for point in SettingsProposer(small).points) == [1, 3, 5]
    assert small.num_planned_trials == 3


def test_the_parzen_estimator_proposes_points_near_the_best() -> None:
    late_distances: list[float] = []
    for seed in range(5):  # a single sweep may have lucky first points
        sweep = make_sweep(searcher="optuna", num_trials=40, seed=seed, **make_shrinkage_space(loguniform=[0.01, 100]))
        late_distances += [-compute_score(point) for _, point in collect_proposals(SettingsProposer(sweep))[-15:]]
    assert np.median(late_distances) < 0.5 * (np.log(100) / 2)  # half of the median distance of random points


def test_a_failed_trial_is_not_proposed_again() -> None:
    proposer = SettingsProposer(make_sweep(searcher="optuna"))
    failed = proposer.propose_trial()
    assert failed is not None
    proposer.record_result(*failed, None, failed=True)
    assert [number for number, _ in collect_proposals(proposer)] == list(range(1, 12))
