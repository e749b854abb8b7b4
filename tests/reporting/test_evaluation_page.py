"""The page of an evaluation: whole in itself, escaped, caveats before plots, curves that are right, pictures that fit."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import iter_test_records
from focus_ray.errors import DataError
from focus_ray.evaluation.evaluate import LabelledImages
from focus_ray.evaluation.metrics import ScoredImages
from focus_ray.kinds import METRICS
from focus_ray.reporting.caveats import Share, evaluation_caveats
from focus_ray.reporting.evaluation import describe, evaluation_page, precision_recall, pro, roc
from focus_ray.reporting.gallery import PICTURE_PX, choose, make_cards, outlined

ODD = "<b>gear</b> & co"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def inspector(data: str, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    model = {"image_alignment": {"min_drop": 0.0, "max_images": 10}}
    return Inspector.load(make_bundle(small_config(data, tmp_path_factory.mktemp("runs"), model=model)), "cpu")


@pytest.fixture(scope="module")
def labelled(inspector: Inspector, data: str) -> LabelledImages:
    return inspector.measure(iter_test_records(data, "gear"), 64)


@pytest.fixture(scope="module")
def page(inspector: Inspector, labelled: LabelledImages, data: str) -> str:
    result = {**inspector.figures(labelled), "bundle": ODD, "version": "0123", "data": data}
    section = describe(inspector, labelled, result, data)
    results: dict[str, dict[str, Any]] = {ODD: result, "board": {"error": "<script>gone</script>"}}
    return evaluation_page(results, {ODD: section}).decode()


def a_set(seed: int = 0, num: int = 200) -> ScoredImages:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    scores = np.round(rng.normal(labels, 1.0), 2)  # with ties
    masks = [np.zeros((16, 16), bool) for _ in range(num)]
    for mask, label in zip(masks, labels, strict=True):
        mask[3:7, 2:9] = bool(label)
    maps = [rng.normal(mask * 1.0, 1.0).astype(np.float32) for mask in masks]
    return ScoredImages(labels.astype(np.int64), scores, masks, maps, 1.0)


def test_the_page_fetches_nothing(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert all(re.match(r"data:image/(jpeg|svg\+xml);base64,", uri) for uri in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "<link" not in page
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_names_and_reasons_are_escaped(page: str) -> None:
    assert "<b>gear</b>" not in page
    assert "&lt;b&gt;gear&lt;/b&gt; &amp; co" in page
    assert "&lt;script&gt;gone&lt;/script&gt;" in page


def test_what_has_to_be_known_comes_before_any_plot_or_picture(page: str) -> None:
    caveats = page.index("What to know before relying on this")
    assert caveats < page.index("<img")
    assert page.index("good parts would be called bad") < caveats
    assert "Only 4 good test images" in page
    assert "good images are too few" in page


def test_plots_are_in_the_pages_own_colours(page: str) -> None:
    pictures = re.findall(r'"data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(pictures) == 4  # scores, ROC, precision and recall, PRO
    drawn = "".join(base64.b64decode(picture).decode() for picture in pictures)
    for name in ("--good", "--bad", "--calibration", "--threshold", "--ink"):
        assert f"var({name})" in drawn
    assert "#0102" not in drawn  # no stand-in is left
    assert set(re.findall(r"url\(#(\w+)\)", drawn)) <= set(re.findall(r'id="(\w+)"', drawn))


def test_the_roc_curve_is_scikit_learns() -> None:
    measured = a_set()
    false, true = roc(measured)
    every_false, every_true, _ = roc_curve(measured.labels, measured.scores, drop_intermediate=False)
    np.testing.assert_allclose(np.interp(every_false, false, true)[-1], 1.0)
    assert {(x, y) for x, y in zip(false, true, strict=True)} <= set(zip(every_false, every_true, strict=True))
    assert auc(false, true) == pytest.approx(roc_auc_score(measured.labels, measured.scores), abs=1e-12)


def test_the_precision_recall_curve_is_scikit_learns() -> None:
    measured = a_set()
    recall, precision = precision_recall(measured)
    precision_there, recall_there, _ = precision_recall_curve(measured.labels, measured.scores)
    np.testing.assert_array_equal(recall[::-1], recall_there)
    np.testing.assert_array_equal(precision[::-1], precision_there)
    area = float(np.sum(np.diff(recall) * precision[1:]))
    assert area == pytest.approx(average_precision_score(measured.labels, measured.scores), abs=1e-12)


def test_the_pro_curve_has_aupro_as_its_area() -> None:
    measured = a_set()
    found = pro(measured)
    assert found is not None
    assert found[0][-1] == pytest.approx(0.3)
    assert auc(*found) / 0.3 == pytest.approx(METRICS["aupro_0.3"].value(measured), abs=1e-4)


def test_there_is_no_pro_curve_without_a_mask() -> None:
    measured = a_set()
    masks = [None if label else mask for mask, label in zip(measured.masks, measured.labels, strict=True)]
    assert pro(ScoredImages(measured.labels, measured.scores, masks, measured.maps, 1.0)) is None


def test_the_gallery_picks_worst_misses_worst_false_alarms_and_typical_finds() -> None:
    scores = np.array([0.1, 0.2, 1.5, 0.9, 0.3, 1.2, 5.0, 2.0, 3.0, 2.6, 2.7])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    measured = ScoredImages(labels, scores, [None] * 11, [np.zeros((2, 2), np.float32)] * 11, 1.0)
    assert choose(measured, per_kind=2) == {"misses": [4, 5], "false_alarms": [2, 3], "finds": [9, 10]}  # median 2.6


def test_the_gallery_of_one_class_has_the_other_kinds_empty() -> None:
    measured = ScoredImages(np.zeros(3, np.int64), np.arange(3.0), [None] * 3, [np.zeros((2, 2), np.float32)] * 3, 1.0)
    assert choose(measured) == {"misses": [], "false_alarms": [2, 1, 0], "finds": []}


def test_cards_tell_of_the_images_that_were_picked(inspector: Inspector, labelled: LabelledImages, data: str) -> None:
    cards = make_cards(inspector, data, labelled)
    for kind, numbers in choose(labelled.measured).items():
        assert [card.name for card in cards[kind]] == [labelled.ids[number] for number in numbers]
        for card, number in zip(cards[kind], numbers, strict=True):
            assert card.score == pytest.approx(labelled.measured.scores[number], rel=1e-4)
            assert card.defect_type == labelled.types[number]
            assert card.score_to_threshold == pytest.approx(card.score / card.threshold)
            wrong = {(0, "anomalous"): "false alarm", (1, "normal"): "missed"}
            assert card.mistake == wrong.get((int(labelled.measured.labels[number]), card.verdict), "")
            assert list(card.views) == ["image", "heat map", "as aligned"]
            for uri in card.views.values():
                picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
                assert picture.format == "JPEG"
                assert max(picture.size) <= PICTURE_PX


def test_an_image_that_is_gone_is_named(inspector: Inspector, labelled: LabelledImages, data: str) -> None:
    renamed = labelled._replace(ids=tuple(f"{name}-former" for name in labelled.ids))
    with pytest.raises(
        DataError, match=r"category 'gear' has no image 'gear/test/.*-former' any more: evaluate it again"
    ):
        make_cards(inspector, data, renamed)


def test_an_outline_lies_around_the_mask_and_just_inside() -> None:
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3:6] = True
    drawn = outlined(np.full((9, 9, 3), 100, np.uint8), mask)[..., 0]
    assert drawn[4].tolist() == [100, 100, 255, 0, 100, 0, 255, 100, 100]


def result_of(**changes: Any) -> dict[str, Any]:
    return {"target_fpr": 0.05, "num_anomalous": 30, "num_masks": 30, "reduced": False, "reasons": {}, **changes}


def test_caveats_tell_of_few_images_lacking_masks_and_missing_metrics() -> None:
    result = result_of(num_masks=28, reduced=True, reasons={"crack: aupro_0.3": "no normal pixel"})
    told = evaluation_caveats(["of calibration"], ["of training"], result, Share(0, 6), Share(30, 30))
    assert told[:2] == ["of calibration", "of training"]
    assert told[2] == "Only 6 good test images: the false alarm rate may be anywhere from 0 to 46 %."
    assert told[3] == "2 of 30 bad test images have no mask: pixel metrics and AUPRO leave them out."
    assert "reduced size" in told[4]
    assert told[5] == "AUPRO 0.3 of crack is missing: no normal pixel"


def test_a_false_alarm_rate_beyond_chance_is_told() -> None:
    (told,) = evaluation_caveats([], [], result_of(), Share(9, 37), Share(30, 30))
    assert told.startswith("24 % of the good test images are called bad, more than chance makes of the target of 5 %")
    assert evaluation_caveats([], [], result_of(), Share(2, 37), Share(30, 30)) == []


def test_without_good_images_nothing_is_said_of_false_alarms() -> None:
    (told,) = evaluation_caveats([], [], result_of(), Share(0, 0), Share(30, 30))
    assert told == "There is no good test image: nothing is known of the false alarm rate."


def test_a_page_of_nothing_but_errors_says_so() -> None:
    assert b"No category could be measured." in evaluation_page({"gear": {"error": "gone"}}, {})
