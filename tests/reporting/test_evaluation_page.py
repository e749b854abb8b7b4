"""The page of an evaluation is self-contained, shows caveats before plots, and has correct curves and pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import auc

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import read_test_rows
from focus_ray.data.schema import Row
from focus_ray.metrics.evaluate import UnseenTestImages
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS
from focus_ray.reporting.caveats import ImageShare, list_evaluation_caveats
from focus_ray.reporting.evaluation import (
    build_evaluation_section,
    compute_per_region_overlap_curve,
    render_evaluation_page,
)
from focus_ray.reporting.gallery import PICTURE_PX, CardKind, GalleryCard, choose_gallery_images, make_gallery_cards


@pytest.fixture(scope="module")
def inspector(aligned_bundle: str) -> Inspector:
    return Inspector.load(aligned_bundle, "cpu")


@pytest.fixture(scope="module")
def labelled(inspector: Inspector, parts: str) -> UnseenTestImages:
    return inspector.score_labelled_images(read_test_rows(parts, "gear"), 64)


@pytest.fixture(scope="module")
def cards(inspector: Inspector, labelled: UnseenTestImages, parts: str) -> dict[CardKind, list[GalleryCard]]:
    records = list(read_test_rows(parts, "gear"))

    def read_records(numbers: Sequence[int]) -> Iterable[Row]:
        return [records[number] for number in numbers]

    return make_gallery_cards(inspector, labelled, read_records)


@pytest.fixture(scope="module")
def page(inspector: Inspector, labelled: UnseenTestImages, cards: dict[CardKind, list[GalleryCard]], parts: str) -> str:
    result = {**inspector.compute_evaluation_metrics(labelled), "bundle": "gear", "version": "0123", "data": parts}
    section = build_evaluation_section(labelled.measured, inspector.bundle.calibration, [], result, cards)
    return render_evaluation_page({"gear": result, "board": {"error": "gone"}}, {"gear": section}).decode()


def make_random_test_images(has_masks: bool = True) -> ScoredTestImages:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    masks = np.zeros((200, 16, 16), bool)
    masks[labels == 1, 3:7, 2:9] = True
    maps = rng.normal(masks * 1.0, 1.0).astype(np.float32)
    known_masks = [mask if has_masks or not mask.any() else None for mask in masks]
    return ScoredTestImages(labels, rng.normal(labels, 1.0), known_masks, list(maps), 1.0)


def test_the_page_loads_nothing_from_the_network(page: str) -> None:
    assert all(re.match(r"data:image/(jpeg|svg\+xml);base64,", uri) for uri in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert not re.search(r"https?://|<link|<script|@import|url\((?!#)", page)


def test_caveats_come_before_plots_and_pictures(page: str) -> None:
    caveats = page.index("What to know before relying on this")
    assert page.index("good parts would be called bad") < caveats < page.index("<img")
    assert "Only 4 good test images" in page
    assert "good photographs" in page


def test_plots_use_the_colours_of_the_page(page: str) -> None:
    pictures = re.findall(r'"data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(pictures) == 4  # scores, ROC, precision and recall, PRO
    svgs = "".join(base64.b64decode(picture).decode() for picture in pictures)
    assert all(f"var(--{name})" in svgs for name in ("good", "bad", "calibration", "threshold", "ink"))
    assert "#0102" not in svgs  # every placeholder colour was replaced
    assert set(re.findall(r"url\(#(\w+)\)", svgs)) <= set(re.findall(r'id="(\w+)"', svgs))


def test_the_area_below_the_pro_curve_is_aupro() -> None:
    measured = make_random_test_images()
    curve = compute_per_region_overlap_curve(measured)
    assert curve is not None
    assert curve[0][-1] == pytest.approx(0.3)
    assert auc(*curve) / 0.3 == pytest.approx(METRICS["aupro_0.3"].value(measured), abs=1e-4)
    assert compute_per_region_overlap_curve(make_random_test_images(has_masks=False)) is None


@pytest.mark.parametrize(
    ("scores", "num_good", "expected"),
    [
        # the median of the bad images is 2.6
        ([0.1, 0.2, 1.5, 0.9, 0.3, 1.2, 5.0, 2.0, 3.0, 2.6, 2.7], 4, ([4, 5], [2, 3], [9, 10])),
        ([0.0, 1.0, 2.0], 3, ([], [2, 1], [])),
    ],
)
def test_the_gallery_has_worst_misses_worst_false_alarms_and_typical_finds(
    scores: list[float], num_good: int, expected: tuple[list[int], ...]
) -> None:
    count = len(scores)
    labels = (np.arange(count) >= num_good).astype(np.int64)
    maps = [np.zeros((2, 2), np.float32)] * count
    chosen = choose_gallery_images(ScoredTestImages(labels, np.array(scores), [None] * count, maps, 1.0), per_kind=2)
    assert tuple(chosen.values()) == expected


def test_cards_describe_the_chosen_images(
    labelled: UnseenTestImages, cards: dict[CardKind, list[GalleryCard]], parts: str
) -> None:
    ids = [record["id"] for record in read_test_rows(parts, "gear")]
    for kind, numbers in choose_gallery_images(labelled.measured).items():
        for card, number in zip(cards[kind], numbers, strict=True):
            assert (card.name, card.defect_type) == (ids[number], labelled.types[number])
            assert card.score == pytest.approx(labelled.measured.scores[number], rel=1e-4)
            assert card.score_to_threshold == pytest.approx(card.score / card.threshold)
            mistakes = {(0, "anomalous"): "false alarm", (1, "normal"): "missed"}
            assert card.mistake == mistakes.get((int(labelled.measured.labels[number]), card.verdict), "")
            assert list(card.views) == ["image", "heat map", "as aligned"]
            for uri in card.views.values():
                picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
                assert (picture.format, max(picture.size) <= PICTURE_PX) == ("JPEG", True)


MANY = ImageShare(30, 30)


@pytest.mark.parametrize(
    ("changes", "good", "facts"),
    [
        ({}, ImageShare(2, 37), []),
        ({}, ImageShare(0, 6), [["6 good test images", "from 0 to 46 %"]]),
        ({}, ImageShare(0, 0), [["no good test image", "false alarm rate"]]),
        ({}, ImageShare(9, 37), [["24 % of the good test images", "target of 5 %"]]),
        ({"num_masks": 28}, ImageShare(2, 37), [["2 of 30 bad test images have no mask"]]),
        ({"reduced": True}, ImageShare(2, 37), [["reduced size"]]),
        (
            {"reasons": {"crack: aupro_0.3": "no pixel"}},
            ImageShare(2, 37),
            [["AUPRO 0.3 of crack is missing: no pixel"]],
        ),
    ],
)
def test_caveats_name_what_weakens_the_figures(
    changes: dict[str, Any], good: ImageShare, facts: list[list[str]]
) -> None:
    result = {"target_fpr": 0.05, "num_anomalous": 30, "num_masks": 30, "reduced": False, "reasons": {}, **changes}
    caveats = list_evaluation_caveats(["of calibration"], ["of training"], result, good, MANY)
    assert caveats[:2] == ["of calibration", "of training"]
    for caveat, texts in zip(caveats[2:], facts, strict=True):
        assert all(text in caveat for text in texts)


def test_a_page_without_any_result_says_so() -> None:
    assert b"No category could be measured." in render_evaluation_page({"gear": {"error": "gone"}}, {})
