"""The page of an evaluation is self-contained and escaped, shows caveats before plots, and has correct curves and pictures."""

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
from focus_ray.metrics.evaluate import LabelledImages
from focus_ray.metrics.metrics import MeasuredImages
from focus_ray.reporting.caveats import Share, evaluation_caveats
from focus_ray.reporting.evaluation import build_section, evaluation_page, precision_recall, pro, roc
from focus_ray.reporting.gallery import PICTURE_PX, choose_images, draw_outline, make_cards
from focus_ray.settings.kinds import METRICS

ODD = "<b>gear</b> & co"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def inspector(data: str, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    model = {"image_alignment": {"min_drop": 0.0}}
    return Inspector.load(make_bundle(small_config(data, tmp_path_factory.mktemp("runs"), model=model)), "cpu")


@pytest.fixture(scope="module")
def labelled(inspector: Inspector, data: str) -> LabelledImages:
    return inspector.measure(iter_test_records(data, "gear"), 64)


@pytest.fixture(scope="module")
def page(inspector: Inspector, labelled: LabelledImages, data: str) -> str:
    result = {**inspector.figures(labelled), "bundle": ODD, "version": "0123", "data": data}
    section = build_section(inspector, labelled, result, data)
    results: dict[str, dict[str, Any]] = {ODD: result, "board": {"error": "<script>gone</script>"}}
    return evaluation_page(results, {ODD: section}).decode()


def random_measured(seed: int = 0, num: int = 200) -> MeasuredImages:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    scores = np.round(rng.normal(labels, 1.0), 2)  # rounded, so that there are ties
    masks = [np.zeros((16, 16), bool) for _ in range(num)]
    for mask, label in zip(masks, labels, strict=True):
        mask[3:7, 2:9] = bool(label)
    maps = [rng.normal(mask * 1.0, 1.0).astype(np.float32) for mask in masks]
    return MeasuredImages(labels.astype(np.int64), scores, masks, maps, 1.0)


def test_the_page_loads_nothing_from_the_network(page: str) -> None:
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


def test_caveats_come_before_plots_and_pictures(page: str) -> None:
    caveats = page.index("What to know before relying on this")
    assert caveats < page.index("<img")
    assert page.index("good parts would be called bad") < caveats
    assert "Only 4 good test images" in page
    assert "good images are too few" in page


def test_plots_use_the_colours_of_the_page(page: str) -> None:
    pictures = re.findall(r'"data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(pictures) == 4  # scores, ROC, precision and recall, PRO
    svgs = "".join(base64.b64decode(picture).decode() for picture in pictures)
    for name in ("--good", "--bad", "--calibration", "--threshold", "--ink"):
        assert f"var({name})" in svgs
    assert "#0102" not in svgs  # every placeholder colour was replaced
    assert set(re.findall(r"url\(#(\w+)\)", svgs)) <= set(re.findall(r'id="(\w+)"', svgs))


def test_the_roc_curve_equals_scikit_learns() -> None:
    measured = random_measured()
    fpr, tpr = roc(measured)
    all_fpr, all_tpr, _ = roc_curve(measured.labels, measured.scores, drop_intermediate=False)
    np.testing.assert_allclose(np.interp(all_fpr, fpr, tpr)[-1], 1.0)
    assert {(x, y) for x, y in zip(fpr, tpr, strict=True)} <= set(zip(all_fpr, all_tpr, strict=True))
    assert auc(fpr, tpr) == pytest.approx(roc_auc_score(measured.labels, measured.scores), abs=1e-12)


def test_the_precision_recall_curve_equals_scikit_learns() -> None:
    measured = random_measured()
    recall, precision = precision_recall(measured)
    expected_precision, expected_recall, _ = precision_recall_curve(measured.labels, measured.scores)
    np.testing.assert_array_equal(recall[::-1], expected_recall)
    np.testing.assert_array_equal(precision[::-1], expected_precision)
    area = float(np.sum(np.diff(recall) * precision[1:]))
    assert area == pytest.approx(average_precision_score(measured.labels, measured.scores), abs=1e-12)


def test_the_area_below_the_pro_curve_is_aupro() -> None:
    measured = random_measured()
    curve = pro(measured)
    assert curve is not None
    assert curve[0][-1] == pytest.approx(0.3)
    assert auc(*curve) / 0.3 == pytest.approx(METRICS["aupro_0.3"].value(measured), abs=1e-4)


def test_there_is_no_pro_curve_without_a_mask() -> None:
    measured = random_measured()
    masks = [None if label else mask for mask, label in zip(measured.masks, measured.labels, strict=True)]
    assert pro(MeasuredImages(measured.labels, measured.scores, masks, measured.maps, 1.0)) is None


def test_the_gallery_has_worst_misses_worst_false_alarms_and_typical_finds() -> None:
    scores = np.array([0.1, 0.2, 1.5, 0.9, 0.3, 1.2, 5.0, 2.0, 3.0, 2.6, 2.7])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    measured = MeasuredImages(labels, scores, [None] * 11, [np.zeros((2, 2), np.float32)] * 11, 1.0)
    assert choose_images(measured, per_kind=2) == {
        "misses": [4, 5],
        "false_alarms": [2, 3],
        "finds": [9, 10],
    }  # median 2.6


def test_without_bad_images_the_gallery_has_only_false_alarms() -> None:
    measured = MeasuredImages(
        np.zeros(3, np.int64), np.arange(3.0), [None] * 3, [np.zeros((2, 2), np.float32)] * 3, 1.0
    )
    assert choose_images(measured) == {"misses": [], "false_alarms": [2, 1, 0], "finds": []}


def test_cards_describe_the_chosen_images(inspector: Inspector, labelled: LabelledImages, data: str) -> None:
    cards = make_cards(inspector, data, labelled)
    for kind, numbers in choose_images(labelled.measured).items():
        assert [card.name for card in cards[kind]] == [labelled.ids[number] for number in numbers]
        for card, number in zip(cards[kind], numbers, strict=True):
            assert card.score == pytest.approx(labelled.measured.scores[number], rel=1e-4)
            assert card.defect_type == labelled.types[number]
            assert card.score_to_threshold == pytest.approx(card.score / card.threshold)
            mistakes = {(0, "anomalous"): "false alarm", (1, "normal"): "missed"}
            assert card.mistake == mistakes.get((int(labelled.measured.labels[number]), card.verdict), "")
            assert list(card.views) == ["image", "heat map", "as aligned"]
            for uri in card.views.values():
                picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
                assert picture.format == "JPEG"
                assert max(picture.size) <= PICTURE_PX


def test_a_missing_image_is_named(inspector: Inspector, labelled: LabelledImages, data: str) -> None:
    renamed = labelled._replace(ids=tuple(f"{name}-renamed" for name in labelled.ids))
    with pytest.raises(DataError, match=r"category 'gear' has no image 'gear/test/.*-renamed'"):
        make_cards(inspector, data, renamed)


def test_an_outline_is_white_outside_and_black_inside_the_mask() -> None:
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3:6] = True
    outlined = draw_outline(np.full((9, 9, 3), 100, np.uint8), mask)[..., 0]
    assert outlined[4].tolist() == [100, 100, 255, 0, 100, 0, 255, 100, 100]


def result_of(**changes: Any) -> dict[str, Any]:
    return {"target_fpr": 0.05, "num_anomalous": 30, "num_masks": 30, "reduced": False, "reasons": {}, **changes}


def test_caveats_name_few_images_missing_masks_and_missing_metrics() -> None:
    result = result_of(num_masks=28, reduced=True, reasons={"crack: aupro_0.3": "no normal pixel"})
    caveats = evaluation_caveats(["of calibration"], ["of training"], result, Share(0, 6), Share(30, 30))
    assert caveats[:2] == ["of calibration", "of training"]
    assert "6 good test images" in caveats[2]
    assert "from 0 to 46 %" in caveats[2]
    assert "2 of 30 bad test images have no mask" in caveats[3]
    assert "reduced size" in caveats[4]
    assert caveats[5] == "AUPRO 0.3 of crack is missing: no normal pixel"


def test_a_false_alarm_rate_beyond_chance_gives_a_caveat() -> None:
    (caveat,) = evaluation_caveats([], [], result_of(), Share(9, 37), Share(30, 30))
    assert "24 % of the good test images" in caveat
    assert "target of 5 %" in caveat
    assert evaluation_caveats([], [], result_of(), Share(2, 37), Share(30, 30)) == []


def test_missing_good_images_give_a_caveat_about_the_false_alarm_rate() -> None:
    (caveat,) = evaluation_caveats([], [], result_of(), Share(0, 0), Share(30, 30))
    assert "no good test image" in caveat
    assert "false alarm rate" in caveat


def test_a_page_without_any_result_says_so() -> None:
    assert b"No category could be measured." in evaluation_page({"gear": {"error": "gone"}}, {})
