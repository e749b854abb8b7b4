"""One trial: the same score with features handed in as without, judged on the same images; what diverges is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_set import NUM_TEST, ingest_parts, small_config

from focus_ray.config import Config
from focus_ray.data.read import decode_rows
from focus_ray.errors import DataError
from focus_ray.evaluation.selection import DEFECTS_PER_IMAGE
from focus_ray.sweep.settings import Objective
from focus_ray.sweep.shared import (
    CategoryImages,
    embed_images,
    features_key,
    judging_split,
    load_images,
    num_bytes_of_features,
    num_bytes_of_images,
)
from focus_ray.sweep.trial import forget, judge_category
from focus_ray.sweep.worker import own_share

CPU = torch.device("cpu")
ALIGNED = {"image_alignment": {"group": "rotation", "min_drop": 0.0, "max_images": 12}}
PLAIN = {"image_alignment": {"group": "none"}}
SHAREABLE = {"reduction": "semi_orthogonal", "coreset": 0}  # features of a metric that defects taught are a trial's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def images_of(config: Config, objective: Objective = "validation", size_px: int = 64) -> CategoryImages:
    return load_images(config, "gear", judging_split(config, "gear", objective).plan(config), objective, size_px)


@pytest.mark.parametrize("model", [PLAIN, ALIGNED], ids=["plain", "aligned"])
@pytest.mark.parametrize(
    "density",
    [
        SHAREABLE,
        {**SHAREABLE, "kind": "gaussian", "pooling": 0.5},
        {"reduction": "random", "map_stride_px": 4, "layers": ["layer1", "layer2"], "coreset": 0},
        {"reduction": "semi_orthogonal"},
    ],
    ids=["nearest", "gaussian", "random", "coreset"],
)
def test_features_handed_in_give_the_very_scores_of_a_trial_alone(
    data: str, model: dict[str, Any], density: dict[str, Any]
) -> None:
    forget()
    objective: Objective = "validation" if density == SHAREABLE else "aupro"
    base = small_config(data, "unused", model=model, density=SHAREABLE)
    config = small_config(data, "unused", model=model, density=density)
    images = images_of(base, objective)
    features = embed_images(base, images, CPU)
    assert (features.theta is not None) == (model is ALIGNED)
    alone = judge_category(config, "gear", images, objective, CPU)
    for _ in range(2):  # made, and kept from the time before
        shared = judge_category(config, "gear", images, objective, CPU, features=features)
        bound = (
            1e-6 if density.get("coreset") == 0 or density.get("kind") else 1e-3
        )  # a coreset hangs on the last digits
        assert shared.score == pytest.approx(alone.score, abs=bound)
        assert shared.figures == pytest.approx(alone.figures, abs=bound)


def test_features_are_shared_by_those_settings_only_that_lead_to_them(data: str) -> None:
    def key_of(category: str = "gear", **sections: dict[str, Any]) -> str | None:
        return features_key(small_config(data, "unused", **{"density": SHAREABLE, **sections}), category)

    key = key_of()
    same = [
        {"density": {**SHAREABLE, "num_channels": 8}},
        {"scoring": {"smoothing_sigma_px": 1.0}},
        {"train": {"learning_rate": 1.0}},
    ]
    other = [
        {"model": {"image_alignment": {"group": "none"}}},
        {"train": {"seed": 3}},
        {"model": {"image_size_px": 48}},
    ]
    own = [{"train": {"epochs": 1}}, {"selection": {"enabled": True}}, {"density": {"reduction": "discriminant"}}]
    assert key is not None
    assert {key_of(**part) for part in same} == {key}
    others = {key_of(**part) for part in other}
    assert len(others) == 3
    assert not others & {key, None}
    assert {key_of(**part) for part in own} == {None}
    assert key_of("board") != key


@pytest.mark.parametrize("objective", ["validation", "image_auroc"])
def test_what_shared_work_takes_is_known_before_it_is_made(data: str, objective: Objective) -> None:
    config = small_config(data, "unused", model=PLAIN)
    split = judging_split(config, "gear", objective)
    images = images_of(config, objective)
    arrays = (images.fit, images.validation, images.judged.images, images.judged.masks)
    assert sum(array.nbytes for array in arrays) == num_bytes_of_images(config, split, objective, 64)
    features = embed_images(config, images, CPU)
    taken = sum(level.nbytes for level in (*features.fit, *features.judged))
    assert taken == num_bytes_of_features(config, split, objective)


def test_all_trials_are_judged_on_the_same_images_whatever_their_size(data: str) -> None:
    config = small_config(data, "unused")
    large, again, small = (images_of(config, size_px=size).judged for size in (64, 64, 32))
    assert np.array_equal(large.images, again.images)
    assert small.images.shape == (len(large.images), 32, 32, 3)
    assert np.array_equal(large.masks.any(axis=(1, 2)), small.masks.any(axis=(1, 2)))
    assert np.array_equal(large.labels, small.labels)
    num_normal = judging_split(config, "gear", "validation").num_validation
    assert large.labels.tolist() == [0] * num_normal + [1] * num_normal * DEFECTS_PER_IMAGE


def test_a_labelled_objective_is_measured_on_the_test_images(data: str) -> None:
    config = small_config(data, "unused", model=PLAIN)
    images = images_of(config, "image_auroc")
    assert len(images.judged.images) == NUM_TEST
    result = judge_category(config, "gear", images, "image_auroc", CPU)
    assert result.score == result.figures["image_auroc"]
    assert (result.num_good, result.num_bad) == (4, NUM_TEST - 4)
    assert len(images.validation) == 0  # none is held out for nothing


def test_without_test_images_a_labelled_objective_is_refused(data: str, tmp_path: Path) -> None:
    config = small_config(data, "unused", model=PLAIN)
    images = images_of(config, "aupro")
    good = images.judged.labels == 0
    judged = type(images.judged)(*(part[good] for part in vars(images.judged).values()))
    with pytest.raises(DataError, match=r"objective=aupro cannot be measured: the test images lack"):
        judge_category(config, "gear", CategoryImages(images.fit, images.validation, judged), "aupro", CPU)


def test_every_epoch_is_told_and_the_last_is_the_score(data: str) -> None:
    told: list[tuple[int, float, bool]] = []
    config = small_config(data, "unused", model=PLAIN, train={"epochs": 3, "learning_rate": 0.01})

    def hear(*report: Any) -> None:
        told.append(report)

    result = judge_category(config, "gear", images_of(config), "validation", CPU, on_score=hear)
    assert [(epoch, final) for epoch, _, final in told] == [(1, False), (2, False), (3, True)]
    assert result.curve == [(epoch, score) for epoch, score, _ in told]
    assert (result.score, result.epochs, result.cut) == (result.curve[-1][1], 3, None)


def test_a_trial_that_is_told_to_stop_trains_no_further(data: str) -> None:
    config = small_config(data, "unused", model=PLAIN, train={"epochs": 3})
    result = judge_category(
        config, "gear", images_of(config), "validation", CPU, on_score=lambda epoch, score, final: "lost"
    )
    assert (result.score, result.epochs, len(result.curve), result.cut) == (None, 1, 1, "lost")


def test_settings_under_which_training_diverges_cut_the_trial(data: str) -> None:
    config = small_config(
        data,
        "unused",
        model=PLAIN,
        train={"epochs": 2, "learning_rate": 10.0, "learning_rate_head": 10.0, "momentum": 0.99},
    )
    result = judge_category(config, "gear", images_of(config), "validation", CPU)
    assert (result.score, result.epochs < 2) == (None, True)
    assert result.cut is not None
    assert result.cut.startswith("diverged: ")


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_worker_decodes_its_own_share_where_images_are_not_shared(
    data: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(data, "unused", model=PLAIN)
    plan = judging_split(config, "gear", "validation").plan(config)
    decoded: list[int] = []

    def counting(uri: str, category: str, rows: Sequence[int], *rest: Any, **more: Any) -> Iterator[np.ndarray]:
        decoded.extend(rows)
        return decode_rows(uri, category, rows, *rest, **more)

    for module in ("focus_ray.data.shards", "focus_ray.sweep.shared"):
        monkeypatch.setattr(f"{module}.decode_rows", counting)
    given = []
    for rank in range(num_workers):
        decoded.clear()
        shard, rest = own_share(config, "gear", plan, rank, num_workers)
        images = load_images(config, "gear", rest, "validation", 64)
        given.append(sorted({*decoded} & {*plan.fit_rows}))
        if shard is not None:
            whole = load_images(config, "gear", plan, "validation", 64)
            count = len(plan.fit_rows)
            part = whole.fit[count * rank // num_workers : count * (rank + 1) // num_workers]
            assert np.array_equal(torch.cat(list(shard.fit_batches())).numpy(), part)
            assert not len(images.fit)
    assert sorted(row for rows in given for row in rows) == sorted(plan.fit_rows)
