"""Distribution shift: p-values keep their level, only ranks count, and the sentence names direction and advice."""

from __future__ import annotations

import math
import re
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from focus_ray.cli.main import build_parser
from focus_ray.detect.shift import (
    ALPHA,
    DEFECT_SHARE,
    MIN_NEW,
    MIN_STREAM,
    STREAM_ALPHA,
    TEST_EVERY,
    WINDOW,
    RecentScores,
    compare_scores,
    compare_stream,
    describe_new_calibration,
    describe_stream_shift,
    describe_test_shift,
)
from focus_ray.errors import DataError

SIZES = [(4, 12), (10, 5), (20, 40), (60, 40)]


def draws(num_calibrating: int, num_new: int, count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws pairs of exchangeable samples with a heavy tail."""
    random = np.random.default_rng(seed)
    return [(random.lognormal(size=num_calibrating), random.lognormal(size=num_new)) for _ in range(count)]


@pytest.mark.parametrize(("num_calibrating", "num_new"), SIZES)
def test_p_values_of_exchangeable_images_keep_their_level(num_calibrating: int, num_new: int) -> None:
    p_values = [compare_scores(*pair).p_value for pair in draws(num_calibrating, num_new, 500)]
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 500)
    assert np.mean(np.array(p_values) <= 0.5) > 0.25  # a test without any notice would also keep its level


def test_the_rank_sum_agrees_with_scipy_and_the_tail_count_is_hypergeometric() -> None:
    random = np.random.default_rng(1)
    calibration, lower = random.normal(size=12), random.normal(size=9) - 0.5
    expected = 2 * mannwhitneyu(lower, calibration, alternative="less", method="exact").pvalue
    assert compare_scores(calibration, lower).p_lower == pytest.approx(min(1.0, expected))
    many = random.normal(size=300)
    expected = 2 * mannwhitneyu(many, calibration, alternative="less", method="asymptotic").pvalue
    assert compare_scores(calibration, many).p_lower == pytest.approx(min(1.0, expected))
    # 12 of 30 new scores lie above all of 60, the others below all: of the highest 17 scores at least 12 are new
    calibration = np.arange(60.0)
    new = np.concatenate([np.full(12, 100.0), np.full(18, -1.0)])
    rank = 6  # a tenth of 61
    highest = 12 + rank - 1
    ways = sum(math.comb(30, count) * math.comb(60, highest - count) for count in range(12, highest + 1))
    assert compare_scores(calibration, new).p_higher == pytest.approx(4 * ways / math.comb(90, highest))


@given(st.integers(0, 2**31), st.sampled_from([np.exp, np.sqrt, lambda score: 3 * score + 7, lambda score: score**3]))
def test_a_monotone_map_of_both_samples_changes_nothing(seed: int, change: object) -> None:
    random = np.random.default_rng(seed)
    values = random.permutation(np.linspace(1, 2.3, 80))  # no two are a tie, before or after the map
    calibration, new = values[:20], values[20:]
    assert callable(change)
    assert compare_scores(change(calibration), change(new)) == compare_scores(calibration, new)
    assert compare_stream(change(calibration), change(new)) == compare_stream(calibration, new)


@pytest.mark.parametrize(("factor", "direction"), [(1.5, "higher"), (1.0, None), (1 / 1.5, "lower")])
def test_the_direction_is_that_of_the_new_scores(factor: float, direction: str | None) -> None:
    random = np.random.default_rng(2)
    calibration, new = random.normal(1, 0.1, 20), factor * random.normal(1, 0.1, 60)
    for shift in (compare_scores(calibration, new), compare_stream(calibration, new)):
        assert shift.direction == direction
        assert (shift.num_new, shift.num_calibrating) == (60, 20)


def test_a_share_of_changed_images_is_found_by_the_tail() -> None:
    random = np.random.default_rng(3)
    calibration, new = random.normal(1, 0.1, 200), random.normal(1, 0.1, 100)
    new[:25] += 0.5
    assert compare_scores(calibration, new).direction == "higher"


def test_scores_that_differ_by_less_than_a_tie_are_equal() -> None:
    calibration = np.full(50, 2.0)
    for change in (0.0, 5e-6, -5e-6):
        shift = compare_scores(calibration, calibration * (1 + change))
        assert (shift.p_value, shift.direction) == (1.0, None)
    assert compare_scores(np.zeros(50), np.zeros(50)).p_value == 1.0
    assert compare_scores(calibration, calibration * (1 + 1e-4)).direction == "higher"


def test_a_difference_too_small_to_matter_is_no_notice_however_certain() -> None:
    random = np.random.default_rng(4)
    calibration, new = random.normal(size=20000), random.normal(size=20000) + 0.06
    shift = compare_scores(calibration, new)
    assert shift.p_value < ALPHA
    assert shift.direction is None


def test_defects_in_a_tenth_of_a_stream_cause_no_notice_but_an_additional_shift_does() -> None:
    random = np.random.default_rng(5)
    for seed in range(20):
        calibration, recent = draws(60, WINDOW, 1, seed)[0]
        recent[random.random(WINDOW) < DEFECT_SHARE / 2] += 1000.0
        assert compare_stream(calibration, recent).direction is None
        assert compare_stream(calibration, 3 * recent).direction == "higher"
        assert compare_stream(calibration, recent / 3).direction == "lower"


@pytest.mark.parametrize("num_calibrating", [1, 3, 10, 200])
def test_scores_of_defects_cannot_lower_the_p_value_of_a_stream_below_that_of_its_good_images(
    num_calibrating: int,
) -> None:
    calibration, recent = draws(num_calibrating, 100, 1, 6)[0]
    defects = np.concatenate([np.sort(recent)[10:], np.full(10, 1e9)])
    alone = min(1.0, 2 * mannwhitneyu(np.sort(recent)[10:], calibration, alternative="greater").pvalue)
    assert compare_stream(calibration, defects).p_higher == pytest.approx(alone, abs=0.02)


def test_few_images_and_impossible_scores() -> None:
    assert compare_scores([1.0, 2.0], [1.0] * (MIN_NEW - 1)) is None
    assert compare_stream([1.0, 2.0], [1.0] * (MIN_STREAM - 1)) is None
    with pytest.raises(DataError, match="nan"):
        compare_scores([1.0, float("nan")], [1.0] * MIN_NEW)
    with pytest.raises(DataError, match="no calibration score"):
        compare_scores([], [1.0] * MIN_NEW)


def test_sentences_name_counts_direction_and_commands_that_exist() -> None:
    calibration = np.linspace(1, 2, 20)
    higher, unshifted = compare_scores(calibration, calibration + 5), compare_scores(calibration, calibration)
    lower = compare_stream(calibration, np.linspace(0, 0.5, 60))
    sentences = [describe_test_shift(higher), describe_stream_shift(lower), describe_new_calibration(higher)]
    assert sentences[0].startswith(
        "The 20 good test images score higher than the 20 images that set the threshold (p < 0.0001): "
    )
    assert sentences[1].startswith("The last 60 images score lower than the 20 images")
    for describe in (describe_test_shift, describe_stream_shift, describe_new_calibration):
        assert describe(unshifted) is None
    commands = {command for sentence in sentences for command in re.findall(r"`focus-ray ([^`]+)`", sentence)}
    assert len(commands) == 2
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_a_window_reports_a_shift_once_and_again_after_normal_scores() -> None:
    random = np.random.default_rng(7)
    calibration, window = random.normal(1, 0.1, 60), RecentScores()

    def sentences_after(level: float, count: int) -> list[str]:
        sentences = []
        for _ in range(count):
            if window.add([float(random.normal(level, 0.1))]):
                sentences.append(window.report_once(compare_stream(calibration, window.take())))
        return [sentence for sentence in sentences if sentence]

    assert sentences_after(1.0, 400) == []
    assert len(sentences_after(1.3, 1000)) == 1
    assert sentences_after(1.0, 2 * WINDOW) == []
    assert len(sentences_after(1.3, 1000)) == 1
    assert window.shift is not None
    assert window.shift.num_new == WINDOW


def test_a_window_is_tested_at_a_fixed_interval() -> None:
    window = RecentScores()
    due = [window.add([1.5]) for _ in range(MIN_STREAM)]
    assert due == [False] * (MIN_STREAM - 1) + [True]
    assert window.take() == [1.5] * MIN_STREAM
    assert [window.add([1.5]) for _ in range(TEST_EVERY)] == [False] * (TEST_EVERY - 1) + [True]
    assert STREAM_ALPHA < ALPHA
