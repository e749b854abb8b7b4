"""A sweep's space and proposals: what is refused before anything starts, and that the same seed proposes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import CONFIGS

from focus_ray.config import Config
from focus_ray.errors import ConfigError
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.settings import Domain, SweepConfig, grid_points, leaf_keys, load_sweep, parse_sweep

SPACE = {"density.shrinkage": {"loguniform": [0.1, 10]}, "density.num_channels": [50, 100]}
BASE = {"data": {"uri": "x"}, "density": {"reduction": "semi_orthogonal"}}  # its shrinkage counts


def sweep_of(**keys: Any) -> SweepConfig:
    return parse_sweep({"base": BASE, "space": SPACE, "num_trials": 12, **keys})


def drain(proposer: Proposer) -> list[tuple[int, dict[str, Any]]]:
    found = []
    while (asked := proposer.ask()) is not None:
        found.append(asked)
        proposer.tell(*asked, score_of(asked[1]))
    return found


def score_of(point: dict[str, Any]) -> float:
    return -abs(float(np.log(point["density.shrinkage"])))


# Refusals


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sapce": {}}, r"sapce: unknown key; did you mean 'space'\?"),
        ({"space": {"density.num_chanels": [1]}}, r"unknown key; did you mean 'density.num_channels'\?"),
        ({"space": {"num_channels": [1]}}, r"unknown key; did you mean 'density.num_channels'\?"),
        ({"space": {"xyz": [1]}}, r"space: xyz: unknown key: `focus-ray train` writes all keys there are"),
        ({"space": {"density": [1]}}, r"density is a section: name a key in it: density.kind, "),
        (
            {"space": {"data.uri": ["a"]}},
            r"data.uri cannot be searched: all trials must learn from .*set base.data.uri",
        ),
        ({"space": {"selection.fraction": [0.1]}}, r"all trials must be judged on the same images"),
        (
            {"space": {"density.shrinkage": {"uniform": [0, 1]}}},
            r"at density.shrinkage=0.0: .*greater than 0 \(got 0.0\)",
        ),
        (
            {"space": {"density.shrinkage": {"uniform": [1, 2000]}}},
            r"at density.shrinkage=2000.0: .*less than or equal",
        ),
        ({"space": {"density.window": [3, 4]}}, r"at density.window=4: density.window: Input should be 1, 3 or 5"),
        ({"space": {"model.image_size_px": {"randint": [64, 80]}}}, r"image_size_px=65 must be a multiple of 16"),
        ({"space": {"density.shrinkage": {"grid": [1]}}}, r"grid: unknown key; known keys: choice, lograndint,"),
        ({"space": {"density.shrinkage": {}}}, r"expected a list of values, or exactly one of choice.*; got none"),
        ({"space": {"density.shrinkage": {"uniform": [2, 1]}}}, r"uniform needs \[low, high\] with low below high"),
        ({"space": {"density.shrinkage": {"loguniform": [0, 1]}}}, r"with low below high above 0; got \[0.0, 1.0\]"),
        ({"searcher": "grid"}, r"searcher=grid needs lists of values; density.shrinkage has a range"),
        (
            {"searcher": "grid", "space": {"density.window": [1, 3]}, "num_trials": 3},
            r"the grid has 2 points and num_trials=3: leave num_trials out",
        ),
        (
            {"searcher": "grid", "space": {"density.num_channels": list(range(1, 10002))}, "num_trials": None},
            r"the grid has 10001 points, 10000 at most",
        ),
        ({"num_trials": None}, r"searcher=random needs num_trials"),
        ({"scope": "per_category", "race": {"enabled": True}}, r"race.enabled goes over categories"),
        ({"race": {"alfa": 0.1}}, r"race.alfa: unknown key; did you mean 'alpha'\?"),
        ({"race": {"order": ["a", "a"]}}, r"race.order: expected categories of the base, each once"),
        ({"base": {"data": {"uri": "x"}, "density": 3}}, r"density: 'density' holds a value|density: Input should be"),
        ({"base": {}}, r"data: missing; set it"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(**keys)


def test_values_are_what_the_configuration_makes_of_them() -> None:
    base = {**BASE, "train": {"epochs": 1}}
    space = {"train.learning_rate": ["1e-3", "1e-4"], "density.layers": [["layer1", "layer2"]]}
    sweep = sweep_of(base=base, space=space)
    assert sweep.space["train.learning_rate"].choice == (0.001, 0.0001)  # text in YAML 1.1
    assert sweep.space["density.layers"].choice == (["layer1", "layer2"],)


def test_every_key_of_the_configuration_is_known() -> None:
    keys = set(leaf_keys())
    assert {"density.shrinkage", "model.image_alignment.group", "train.lambda_ica", "name"} <= keys
    assert not keys & set(Config.model_fields) - {"name", "storage", "trackers"}


# Files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweep*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_is_read(path: Path) -> None:
    sweep = load_sweep(path, ["base.data.uri=s3://plant/parts"])
    assert sweep.base_config().data.uri == "s3://plant/parts"


def test_a_base_file_is_joined_under_the_inline_base_and_overrides_reach_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {uri: a}\ntrain: {epochs: 3, seed: 5}\n")
    (tmp_path / "sweep.yaml").write_text(
        "base_file: base.yaml\nbase: {train: {epochs: 4}}\nspace: {density.window: [1, 3]}\nsearcher: grid\n"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", ["base.data.uri=b"])
    base = sweep.base_config()
    assert (base.data.uri, base.train.epochs, base.train.seed, sweep.base_file) == ("b", 4, 5, None)


def test_a_file_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"s\.yaml: expected a mapping of sections at the top, got list"):
        load_sweep(tmp_path / "s.yaml")


# Proposals


@given(low=st.integers(1, 50), span=st.integers(1, 50), seed=st.integers(0, 99), log=st.booleans())
def test_integers_are_drawn_from_the_range_with_both_its_ends(low: int, span: int, seed: int, log: bool) -> None:
    kind = "lograndint" if log else "randint"
    domain = Domain.model_validate({kind: [low, low + span]})
    rng = np.random.default_rng(seed)
    drawn = {domain.draw(rng) for _ in range(100)}
    assert all(isinstance(value, int) and low <= value <= low + span for value in drawn)
    if span < 3:
        assert drawn == set(range(low, low + span + 1))


def test_a_grid_is_every_combination_once() -> None:
    sweep = sweep_of(searcher="grid", num_trials=None, space={"density.window": [1, 3], "density.shrinkage": [1, 2]})
    assert grid_points(sweep) == [
        {"density.window": w, "density.shrinkage": s} for w in (1, 3) for s in (1.0, 2.0)
    ]  # fmt: skip
    assert [number for number, _ in [Proposer(sweep).ask()] if number == 0] == [0]  # type: ignore[misc]


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_the_same_seed_proposes_the_same_and_another_does_not(searcher: str) -> None:
    first, again, other = (drain(Proposer(sweep_of(searcher=searcher, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert [number for number, _ in first] == list(range(12))


def test_random_points_are_all_different_and_a_small_space_is_gone_through_once() -> None:
    points = [json.dumps(point) for _, point in drain(Proposer(sweep_of()))]
    assert len(set(points)) == 12
    small = sweep_of(space={"density.window": [1, 3, 5]}, num_trials=12)
    assert sorted(point["density.window"] for point in Proposer(small).known) == [1, 3, 5]
    assert small.planned_trials == 3


@pytest.mark.parametrize("searcher", ["random", "optuna"])
@pytest.mark.parametrize("done", [1, 6, 11])
def test_a_sweep_taken_up_again_proposes_what_it_would_have_proposed(searcher: str, done: int) -> None:
    sweep = sweep_of(searcher=searcher)
    whole = drain(Proposer(sweep))
    later = Proposer(sweep)
    for number, point in whole[:done]:
        later.tell(number, point, score_of(point))
    assert drain(later) == whole[done:]


def test_the_parzen_estimator_gathers_about_the_best() -> None:
    space = {"density.shrinkage": {"loguniform": [0.01, 100]}}
    late: list[float] = []
    for seed in range(5):  # one sweep of forty may be lucky at its start
        points = [
            point for _, point in drain(Proposer(sweep_of(searcher="optuna", num_trials=40, space=space, seed=seed)))
        ]
        late += [abs(np.log(point["density.shrinkage"])) for point in points[-15:]]
    assert np.median(late) < 0.5 * (np.log(100) / 2)  # half of what points drawn at random come to


def test_a_failed_trial_gives_nothing_to_learn_from_and_is_not_asked_again() -> None:
    proposer = Proposer(sweep_of(searcher="optuna"))
    asked = proposer.ask()
    assert asked is not None
    proposer.fail(asked[0])
    following = proposer.ask()
    assert following is not None
    assert following[0] == 1
