"""One protocol for all methods: the same training and test images, and tables of them."""

import argparse
import statistics
from typing import Any

import pytest
import torch
from small_set import NUM_TRAIN

from benchmarks.generalise import (
    METHODS,
    PATCHCORE,
    check_equal_settings,
    group_samples,
    make_category_table,
    make_data_set_table,
    make_difference_table,
    make_split_settings,
    measure_method,
    plan_training,
)
from benchmarks.harness import make_base_settings, merge_settings
from benchmarks.intervals import NUM_PIXEL_DRAWS
from benchmarks.patchcore import choose_farthest_points, compute_left_out_distances


def make_tree(uri: str, holdout_fraction: float = 0.0, **sections: dict[str, Any]) -> dict[str, Any]:
    arguments = argparse.Namespace(weights="random", image_size_px=64, backbone="resnet18")
    return merge_settings(make_base_settings(arguments, uri), make_split_settings(holdout_fraction), sections)


def make_sample(category: str, method: str, auroc: float, **changes: Any) -> dict[str, Any]:
    figures = {"image_auroc": auroc, "pixel_auroc": None, "aupro_0.3": None, "false_positive_rate": 0.1, "recall": 0.8}
    images = {"labels": [0, 0, 1, 1], "scores": [1.0, 3.0, 2.0, 4.0], "training_images": "a", "pixel_draws": {}}
    costs = {"fit_s": 1.0, "ms": 1.0}
    return {"category": category, "method": method, "seed": 0, "shots": None, **figures, **images, **costs, **changes}


def test_all_good_training_images_train_unless_a_share_is_held_out(parts: str) -> None:
    assert len(plan_training(make_tree(parts), "gear", None).fit.rows) == NUM_TRAIN
    held = plan_training(make_tree(parts, 0.25), "gear", None)
    assert (len(held.fit.rows), len(held.holdout.rows)) == (NUM_TRAIN * 3 // 4, NUM_TRAIN // 4)
    assert len(plan_training(make_tree(parts), "gear", 5).fit.rows) == 5


def test_every_method_trains_on_the_same_images_and_returns_the_scores_of_the_test_images(parts: str) -> None:
    tree = make_tree(parts, 0.25)
    light = ["density.coreset=16", "density.num_channels=16", "density.reduction=random"]
    light += ["scoring.image_score=maximum", "model.image_alignment.group=none"]
    samples = []
    for method in METHODS:
        sample = measure_method(method, tree, "gear", "cpu", 6, light)
        assert len(sample["labels"]) == len(sample["scores"]) == sample["num_normal"] + sample["num_anomalous"]
        samples.append({"category": "gear", "method": method, "seed": 0, "shots": 6, **sample})
        assert {len(draws) for draws in sample["pixel_draws"].values()} == {NUM_PIXEL_DRAWS}
    groups = group_samples(samples, METHODS, 6)
    assert list(groups["gear"]) == list(METHODS)
    _, rows = make_difference_table(groups, "default")
    assert [row[1] for row in rows] == [method for method in METHODS if method != "default"]
    assert all("[" in cell for row in rows for cell in row[2:])
    scores = {tuple(sample["scores"]) for sample in samples}
    assert len(scores) == len(METHODS), "two methods are the same"


@pytest.mark.parametrize(
    "override", ["calibration.method=split data.holdout_fraction=0.5", "data.holdout_fraction=0.5", "train.seed=1"]
)
def test_settings_of_the_default_cannot_change_which_images_train(parts: str, override: str) -> None:
    with pytest.raises(ValueError, match=override.split("=")[0]):
        measure_method("default", make_tree(parts, 0.25), "gear", "cpu", None, override.split())


def test_samples_of_different_training_or_test_images_are_not_compared() -> None:
    ours, other = make_sample("a", "default", 0.75), make_sample("a", "PaDiM", 0.75, training_images="b")
    with pytest.raises(ValueError, match=r"'a'.*training"):
        group_samples([ours, other], METHODS, None)
    other = make_sample("a", "PaDiM", 0.75, labels=[0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"'a'.*test"):
        group_samples([ours, other], METHODS, None)


def test_samples_of_other_settings_are_not_continued() -> None:
    samples = [make_sample("a", "default", 0.75, settings={"set": []})]
    check_equal_settings(samples, {"default": {"set": []}, "PaDiM": {}})
    with pytest.raises(ValueError, match=r"train\.steps=1"):
        check_equal_settings(samples, {"default": {"set": ["train.steps=1"]}})


def test_the_table_has_a_row_for_each_category_and_their_mean() -> None:
    samples = [make_sample(name, "PaDiM", auroc) for name, auroc in (("a", 0.7), ("b", 0.8))]
    samples += [make_sample(name, "default", 0.75) for name in ("a", "b")]
    header, rows = make_category_table(
        group_samples(samples, ["PaDiM", "default"], None), ["PaDiM", "default"], "default"
    )
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][:2] == ["a", "0.700 / - / -"]
    assert rows[0][2].startswith("0.750 [")
    assert rows[0][3] == "0.10 / 0.80"
    assert [row[4].split()[0] for row in rows[:2]] == ["+0.0500", "-0.0500"]
    assert rows[2][:3] == ["**mean of 2**", "0.7500 / - / -", "0.7500 / - / -"]


def test_categories_of_one_set_count_once_in_the_means_over_sets() -> None:
    figures = {"a": (0.7, 0.9), "b1": (0.8, 0.8), "b2": (0.6, 0.8)}
    samples = [
        make_sample(category, method, auroc)
        for category, values in figures.items()
        for method, auroc in zip(("PaDiM", "default"), values, strict=True)
    ]
    groups = group_samples(samples, ["PaDiM", "default"], None)
    _, rows = make_data_set_table(groups, ["PaDiM", "default"], "default", {"a": "a", "b1": "b", "b2": "b"})
    error = statistics.stdev([0.2, 0.1]) / 2**0.5  # gains of the sets
    assert rows[0][1] == "0.7000 +- 0.0000"
    assert rows[0][4] == f"+0.1500 +- {error:.4f}"
    assert rows[0][-1] == "2 / 0 / 0"


def test_a_good_image_is_left_out_of_patchcores_coreset_with_its_own_patches() -> None:
    embeddings = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(48)  # a coreset of all patches
    distances = compute_left_out_distances(embeddings, rows)
    assert distances.shape == (3, 4, 4)
    others = torch.cat([embeddings[0], embeddings[2]])
    expected = torch.tensor([min(float((patch - other).norm()) for other in others) for patch in embeddings[1]])
    torch.testing.assert_close(distances[1].flatten(), expected, rtol=1e-4, atol=1e-4)


def test_a_larger_coreset_begins_with_the_smaller_one() -> None:
    bank = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    small, large = (
        choose_farthest_points(bank, PATCHCORE[name].get("share", 0.05), 0)
        for name in ("PatchCore 1 %", "PatchCore 10 %")
    )
    assert (len(small), len(large)) == (10, 20)
    assert torch.equal(small, large[:10])
