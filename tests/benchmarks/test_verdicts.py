"""Draws of few good images, photographed once or several times."""

import torch

from benchmarks.bursts import simulate_photographs
from benchmarks.verdicts import PLAIN, SEQUENCE, choose_crop_side, format_view, make_table, simulate_view

PERTURBATION = {"shift_px": 1, "noise": 2.0, "brightness": 0.0}
IMAGES = torch.randint(0, 256, (3, 256, 256, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_parts_are_photographed_several_times_and_test_images_once() -> None:
    assert torch.equal(simulate_view(IMAGES, 4, 7, PERTURBATION, training=True), simulate_photographs(IMAGES, 4, 7))
    assert torch.equal(simulate_view(IMAGES, 4, 7, PERTURBATION, training=False), simulate_photographs(IMAGES, 1, 7))
    assert simulate_view(IMAGES, PLAIN, 7, PERTURBATION, training=True) is IMAGES


def test_a_sequence_trains_on_all_crops_of_an_image_and_tests_on_one() -> None:
    assert choose_crop_side(256) == 192
    assert simulate_view(IMAGES, SEQUENCE, 7, {}, training=True).shape == (27, 192, 192, 3)
    assert simulate_view(IMAGES, SEQUENCE, 7, {}, training=False).shape == (3, 192, 192, 3)


def test_the_table_keeps_views_apart() -> None:
    sample = {"category": "a", "method": "auto", "images": 10, "fpr": 0.1, "recall": 0.5, "seed": 0}
    samples = [{**sample, "view": format_view(1)}, {**sample, "view": format_view(2), "fpr": 0.3}]
    assert [row[1:6] for row in make_table(samples)] == [
        ["1 per part", "auto", 1, 1, 0.1],
        ["2 per part", "auto", 1, 1, 0.3],
    ]
