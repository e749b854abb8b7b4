"""Distribution shift: p-values keep their level, only ranks count, and the sentence names direction and advice."""

from __future__ import annotations

import math
import re
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from focus_ray.cli.main import build_parser
from focus_ray.detect import shift
from focus_ray.errors import DataError


@pytest.mark.parametrize(("num_calibrating", "num_new"), [(4, 12), (10, 5), (20, 40), (60, 40)])
def test_p_values_of_exchangeable_images_keep_their_level(num_calibrating: int, num_new: int) -> None:
    draws = np.random.default_rng(0).lognormal(size=(500, num_calibrating + num_new))
    p_values = np.array(
        [
            shift.compare_with_calibration_scores(draw[:num_calibrating], draw[num_calibrating:]).p_value
            for draw in draws
        ]
    )
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p_values <= level) <= level + 3 * np.sqrt(level * (1 - level) / 500)
    assert np.mean(p_values <= 0.5) > 0.25  # a test without any notice would also keep its level


@pytest.mark.parametrize(("num_new", "method"), [(9, "exact"), (300, "asymptotic")])
def test_the_rank_sum_agrees_with_scipy(num_new: int, method: str) -> None:
    random = np.random.default_rng(1)
    calibration, lower = random.normal(size=12), random.normal(size=num_new) - 0.5
    expected = 2 * mannwhitneyu(lower, calibration, alternative="less", method=method).pvalue
    assert shift.compare_with_calibration_scores(calibration, lower).p_lower == pytest.approx(min(1.0, expected))


def test_the_tail_count_is_hypergeometric() -> None:
    # 12 of 30 new scores lie above all of 60, the others below all: of the highest 17 scores at least 12 are new
    result = shift.compare_with_calibration_scores(np.arange(60.0), np.repeat([100.0, -1.0], [12, 18]))
    ways = sum(math.comb(30, count) * math.comb(60, 17 - count) for count in range(12, 18))
    assert result.p_higher == pytest.approx(4 * ways / math.comb(90, 17))


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([np.exp, np.sqrt, lambda score: 3 * score + 7, lambda score: score**3]))
def test_a_monotone_map_of_both_samples_changes_nothing(seed: int, change: np.ufunc) -> None:
    values = np.random.default_rng(seed).permutation(np.linspace(1, 2.3, 80))  # no ties, before or after the map
    for compare in (shift.compare_with_calibration_scores, shift.compare_stream_with_calibration):
        assert compare(change(values[:20]), change(values[20:])) == compare(values[:20], values[20:])


@pytest.mark.parametrize(("factor", "direction"), [(1.5, "higher"), (1.0, None), (1 / 1.5, "lower")])
@pytest.mark.parametrize("compare", [shift.compare_with_calibration_scores, shift.compare_stream_with_calibration])
def test_the_direction_is_that_of_the_new_scores(compare, factor: float, direction: str | None) -> None:
    random = np.random.default_rng(2)
    result = compare(random.normal(1, 0.1, 20), factor * random.normal(1, 0.1, 60))
    assert (result.direction, result.num_new, result.num_calibrating) == (direction, 60, 20)


def test_a_share_of_changed_images_is_found_by_the_tail() -> None:
    random = np.random.default_rng(3)
    calibration, new = random.normal(1, 0.1, 200), random.normal(1, 0.1, 100)
    new[:25] += 0.5
    assert shift.compare_with_calibration_scores(calibration, new).direction == "higher"


def test_scores_that_differ_by_less_than_a_tie_are_equal() -> None:
    calibration = np.full(50, 2.0)
    for new in (calibration, calibration * (1 + 5e-6), calibration * (1 - 5e-6)):
        assert shift.compare_with_calibration_scores(calibration, new).p_value == 1.0
    assert shift.compare_with_calibration_scores(np.zeros(50), np.zeros(50)).p_value == 1.0
    assert shift.compare_with_calibration_scores(calibration, calibration * (1 + 1e-4)).direction == "higher"


def test_a_difference_too_small_to_matter_is_no_notice_however_certain() -> None:
    random = np.random.default_rng(4)
    result = shift.compare_with_calibration_scores(random.normal(size=20000), random.normal(size=20000) + 0.06)
    assert result.p_value < shift.ALPHA
    assert result.direction is None


def test_defects_in_a_tenth_of_a_stream_cause_no_notice_but_an_additional_shift_does() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        calibration, recent = random.lognormal(size=60), random.lognormal(size=shift.WINDOW)
        recent[random.random(shift.WINDOW) < shift.DEFECT_SHARE / 2] += 1000.0
        directions = [
            shift.compare_stream_with_calibration(calibration, factor * recent).direction for factor in (1, 3, 1 / 3)
        ]
        assert directions == [None, "higher", "lower"]


@pytest.mark.parametrize("num_calibrating", [1, 3, 10, 200])
def test_defects_cannot_lower_the_p_value_of_a_stream_below_that_of_its_good_images(num_calibrating: int) -> None:
    random = np.random.default_rng(6)
    calibration, good = random.lognormal(size=num_calibrating), np.sort(random.lognormal(size=100))[10:]
    alone = min(1.0, 2 * mannwhitneyu(good, calibration, alternative="greater").pvalue)
    result = shift.compare_stream_with_calibration(calibration, np.concatenate([good, np.full(10, 1e9)]))
    assert result.p_higher == pytest.approx(alone, abs=0.02)


def test_few_images_and_impossible_scores() -> None:
    assert shift.compare_with_calibration_scores([1.0, 2.0], [1.0] * (shift.MIN_NEW - 1)) is None
    assert shift.compare_stream_with_calibration([1.0, 2.0], [1.0] * (shift.MIN_STREAM - 1)) is None
    with pytest.raises(DataError, match="nan"):
        shift.compare_with_calibration_scores([1.0, float("nan")], [1.0] * shift.MIN_NEW)


def test_sentences_name_counts_direction_and_commands_that_exist() -> None:
    calibration = np.linspace(1, 2, 20)
    higher, unshifted = (
        shift.compare_with_calibration_scores(calibration, calibration + 5),
        shift.compare_with_calibration_scores(calibration, calibration),
    )
    lower = shift.compare_stream_with_calibration(calibration, np.linspace(0, 0.5, 60))
    describes = (shift.describe_test_shift, shift.describe_stream_shift, shift.describe_new_calibration_shift)
    sentences = [describe(result) for describe, result in zip(describes, (higher, lower, higher), strict=True)]
    assert "20 good test images score higher than the 20 images" in sentences[0]
    assert "last 60 images score lower than the 20 images" in sentences[1]
    assert [describe(unshifted) for describe in describes] == [None] * 3
    commands = {command for sentence in sentences for command in re.findall(r"`focus-ray ([^`]+)`", sentence)}
    assert len(commands) == 2
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_a_window_reports_a_shift_once_and_again_after_normal_scores() -> None:
    random = np.random.default_rng(7)
    calibration, window = random.normal(1, 0.1, 60), shift.StreamShiftMonitor()

    def count_sentences(level: float, count: int) -> int:
        due = (window.add([score]) for score in random.normal(level, 0.1, count))
        results = (
            shift.compare_stream_with_calibration(calibration, window.take_scores_for_test())
            for is_due in due
            if is_due
        )
        return sum(window.report_shift_once(result) is not None for result in results)

    levels = ((1.0, 400), (1.3, 1000), (1.0, 2 * shift.WINDOW), (1.3, 1000))
    assert [count_sentences(*level) for level in levels] == [0, 1, 0, 1]
    assert window.shift is not None
    assert window.shift.num_new == shift.WINDOW


def test_a_window_is_tested_at_a_fixed_interval() -> None:
    window = shift.StreamShiftMonitor()
    assert [window.add([1.5]) for _ in range(shift.MIN_STREAM)] == [False] * (shift.MIN_STREAM - 1) + [True]
    assert window.take_scores_for_test() == [1.5] * shift.MIN_STREAM
    assert [window.add([1.5]) for _ in range(shift.TEST_EVERY)] == [False] * (shift.TEST_EVERY - 1) + [True]
