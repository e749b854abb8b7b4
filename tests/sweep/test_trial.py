"""One trial: shared features do not change the scores, all trials see the same images, and a diverging trial is pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_set import NUM_TEST, small_config

from focus_ray.data.read import decode_rows
from focus_ray.errors import DataError
from focus_ray.fitting.selection import DEFECTS_PER_IMAGE
from focus_ray.fitting.settings import Config
from focus_ray.sweep.settings import Objective
from focus_ray.sweep.trial import CategoryResult, clear_trial_caches, score_category
from focus_ray.sweep.trial_inputs import (
    CategoryImages,
    compute_feature_bytes,
    compute_frozen_features,
    compute_image_bytes,
    load_category_images,
    make_features_key,
    split_for_scoring,
)
from focus_ray.sweep.worker import split_images_for_worker

CPU = torch.device("cpu")
ALIGNED = {"image_alignment": {"group": "rotation", "min_drop": 0.0}}
SHAREABLE = {"reduction": "semi_orthogonal", "coreset": 0}  # with reduction `discriminant`, trials share no features


def make_config(parts: str, **sections: Any) -> Config:
    """Returns the configuration of a trial without alignment; `sections` changes its sections."""
    return small_config(parts, "unused", **sections)


def load_gear(config: Config, objective: Objective = "validation", size_px: int = 64) -> CategoryImages:
    """Loads the images of the category `gear`."""
    plan = split_for_scoring(config, "gear", objective).build_plan(config)
    return load_category_images(config, "gear", plan, objective, size_px)


def score_gear(config: Config, objective: Objective = "validation", **options: Any) -> CategoryResult:
    """Judges the category `gear`."""
    return score_category(config, "gear", load_gear(config, objective), objective, CPU, **options)


@pytest.mark.parametrize(
    ("model", "density", "objective"),
    [
        ({}, SHAREABLE, "validation"),
        ({}, {"reduction": "semi_orthogonal"}, "aupro"),
        (ALIGNED, {**SHAREABLE, "kind": "gaussian", "pooling": 0.5}, "aupro"),
        ({}, {"reduction": "random", "map_stride_px": 4, "layers": ["layer1", "layer2"], "coreset": 0}, "aupro"),
    ],
    ids=["nearest", "coreset", "aligned-gaussian", "random"],
)
def test_shared_features_give_the_same_scores_as_a_trial_without_sharing(
    parts: str, model: dict[str, Any], density: dict[str, Any], objective: Objective
) -> None:
    clear_trial_caches()
    base = make_config(parts, model=model, density=SHAREABLE)
    config = make_config(parts, model=model, density=density)
    images = load_gear(base, objective)
    features = compute_frozen_features(base, images, CPU)
    assert (features.theta is not None) == (model is ALIGNED)
    unshared = score_category(config, "gear", images, objective, CPU)
    for _ in range(2):  # first computed, then read from the cache
        shared = score_category(config, "gear", images, objective, CPU, features=features)
        # Batches of other sizes round differently, and the choice of a coreset depends on the last digits.
        tolerance = 1e-4 if density.get("coreset") == 0 else 1e-3
        assert shared.figures == pytest.approx(unshared.figures, abs=tolerance)


def test_trials_share_features_only_if_their_settings_give_the_same_features(parts: str) -> None:
    def key_of(category: str = "gear", **sections: dict[str, Any]) -> str | None:
        return make_features_key(small_config(parts, "unused", **{"density": SHAREABLE, **sections}), category)

    same: list[dict[str, Any]] = [
        {},
        {"density": {**SHAREABLE, "num_channels": 8}},
        {"scoring": {"image_score": "maximum"}},
        {"train": {"learning_rate": 1.0}},
    ]
    different = [{"model": ALIGNED}, {"train": {"seed": 3}}, {"model": {"image_size_px": 48}}]
    unshareable = [
        {"train": {"steps": 1}},
        {"selection": {"fraction": 0.1}, "model": ALIGNED},  # it also judges whether to align
        {"density": {"reduction": "discriminant"}},
    ]
    (key,) = {key_of(**sections) for sections in same}
    assert len({key, key_of("board"), *(key_of(**sections) for sections in different)} - {None}) == 5
    assert {key_of(**sections) for sections in unshareable} == {None}


@pytest.mark.parametrize("objective", ["validation", "image_auroc"])
def test_the_size_of_shared_inputs_is_computed_correctly_in_advance(parts: str, objective: Objective) -> None:
    config = make_config(parts)
    split = split_for_scoring(config, "gear", objective)
    images = load_gear(config, objective)
    arrays = (images.fit, images.validation, images.scored.images, images.scored.masks)
    assert sum(array.nbytes for array in arrays) == compute_image_bytes(config, split, objective, 64)
    features = compute_frozen_features(config, images, CPU)
    num_bytes = sum(level.nbytes for level in (*features.fit, *features.scored))
    assert num_bytes == compute_feature_bytes(config, split, objective)


def test_trials_of_all_image_sizes_are_judged_on_the_same_images(parts: str) -> None:
    config = make_config(parts)
    large, repeated, small = (load_gear(config, size_px=size).scored for size in (64, 64, 32))
    assert np.array_equal(large.images, repeated.images)
    assert small.images.shape == (len(large.images), 32, 32, 3)
    assert np.array_equal(large.masks.any(axis=(1, 2)), small.masks.any(axis=(1, 2)))
    num_normal = split_for_scoring(config, "gear", "validation").num_validation
    assert large.labels.tolist() == [0] * num_normal + [1] * num_normal * DEFECTS_PER_IMAGE


def test_a_labelled_objective_is_measured_on_the_test_images(parts: str) -> None:
    config = make_config(parts)
    result = score_gear(config, "image_auroc")
    assert result.score == result.figures["image_auroc"]
    assert (result.num_good, result.num_bad) == (4, NUM_TEST - 4)
    images = load_gear(config, "aupro")
    assert len(images.validation) == 0  # a labelled objective needs no held-out images
    good = images.scored.labels == 0
    judged = type(images.scored)(*(array[good] for array in vars(images.scored).values()))
    with pytest.raises(DataError, match="objective=aupro"):
        score_category(config, "gear", CategoryImages(images.fit, images.validation, judged), "aupro", CPU)


def test_every_step_is_reported_and_the_last_one_is_the_score(parts: str) -> None:
    reports: list[tuple[int, float, bool]] = []
    config = make_config(parts, train={"steps": 3, "learning_rate": 0.01})
    result = score_gear(config, on_score=lambda *report: reports.append(report))
    assert [(step, final) for step, _, final in reports] == [(1, False), (2, False), (3, True)]
    assert result.curve == [(step, score) for step, score, _ in reports]
    assert (result.score, result.steps, result.cut) == (result.curve[-1][1], 3, None)


def test_a_pruned_trial_trains_no_further(parts: str) -> None:
    result = score_gear(make_config(parts, train={"steps": 3}), on_score=lambda step, score, final: "lost")
    assert (result.score, result.steps, len(result.curve), result.cut) == (None, 1, 1, "lost")


def test_a_trial_whose_training_diverges_is_pruned(parts: str) -> None:
    rates = {"learning_rate": 10.0, "lambda_fine": 1e30}
    result = score_gear(make_config(parts, train={"steps": 30, **rates}))
    assert (result.score, result.steps < 30, str(result.cut)[:9]) == (None, True, "diverged:")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_worker_decodes_only_its_own_share_if_images_are_not_shared(
    parts: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(parts)
    plan = split_for_scoring(config, "gear", "validation").build_plan(config)
    all_images = load_category_images(config, "gear", plan, "validation", 64)
    decoded: list[int] = []

    def count_rows(uri: str, category: str, rows: Sequence[int], *arguments: Any, **options: Any) -> Iterator[Any]:
        decoded.extend(rows)
        return decode_rows(uri, category, rows, *arguments, **options)

    for module in ("focus_ray.fitting.shards", "focus_ray.sweep.trial_inputs"):
        monkeypatch.setattr(f"{module}.decode_rows", count_rows)
    rows_of_workers = []
    for rank in range(num_workers):
        decoded.clear()
        shard, common_plan = split_images_for_worker(config, "gear", plan, rank, num_workers)
        assert len(load_category_images(config, "gear", common_plan, "validation", 64).fit) == 0
        rows_of_workers += sorted({*decoded} & {*plan.fit.rows})
        own_images = torch.cat(list(shard.read_batches("fit"))).numpy()
        count = len(plan.fit.rows)
        expected = all_images.fit[count * rank // num_workers : count * (rank + 1) // num_workers]
        assert np.array_equal(own_images, expected)
    assert sorted(rows_of_workers) == sorted(plan.fit.rows)
