"""Calibration: simulated guarantees, laws between p-value and verdict, merging, and a slow reference."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from focus_ray.detect.calibration import PRECISION_SHIFT, Calibration, CalibrationBuilder
from focus_ray.errors import DataError
from focus_ray.metrics.ties import exceeds_threshold


def calibrate(
    scores, maps=None, method="split", target_fpr=0.05, target_pixel_fpr=0.001, groups=None, kept_fraction=None
) -> Calibration:
    builder = CalibrationBuilder(method, target_fpr, target_pixel_fpr)
    builder.kept_fraction = builder.kept_fraction if kept_fraction is None else kept_fraction
    builder.add(scores, np.zeros((len(scores), 2, 2)) if maps is None else maps, groups)
    return builder.build_calibration()


def slow_pixel_threshold(maps: list[np.ndarray], target: Fraction) -> float:
    """Returns the smallest pixel score lambda with (n R(lambda) + 1)/(n + 1) <= target, or R <= target, in fractions."""
    n = len(maps)

    def total_share_above(threshold: float) -> Fraction:
        return sum((Fraction(int((scores > threshold).sum()), scores.size) for scores in maps), Fraction(0))

    budget = target * (n + 1) - 1 if target * (n + 1) >= 1 else target * n
    candidates = sorted({float(value) for scores in maps for value in scores.ravel()})
    return next(value for value in candidates if total_share_above(value) <= budget)


SCORES = st.lists(st.integers(-30, 30).map(float), min_size=1, max_size=80)
TARGETS = st.one_of(st.floats(0.001, 0.999), st.integers(1, 99).map(lambda percent: percent / 100))
GROUPS = st.none() | st.lists(st.integers(0, 5), min_size=80, max_size=80)


@given(SCORES, GROUPS, TARGETS, st.integers(-31, 31))
def test_an_image_is_anomalous_exactly_when_its_p_value_is_at_most_the_effective_rate(scores, groups, target, score):
    groups = None if groups is None else np.array(groups[: len(scores)])
    calibration = calibrate(scores, target_fpr=target, groups=groups)
    p_value = calibration.compute_conformal_p_values(score)
    assert bool(calibration.is_anomalous(score)) == bool(p_value <= calibration.effective_fpr)
    assert calibration.effective_fpr == target or not calibration.image_guaranteed


@given(SCORES, hnp.arrays(np.int64, (3, 4), elements=st.integers(-31, 31)))
def test_p_values_are_the_counted_share(scores, new):
    expected = np.array([[(1 + sum(c >= s for c in scores)) / (len(scores) + 1) for s in row] for row in new])
    calibration = calibrate(scores)
    counted = np.full(new.shape, True) if calibration.tail is None else new <= calibration.tail.start
    np.testing.assert_allclose(calibration.compute_conformal_p_values(new)[counted], expected[counted], rtol=1e-15)


@given(SCORES, st.integers(1, 99))
def test_the_image_threshold_is_the_textbook_order_statistic(scores, percent):
    calibration = calibrate(scores, target_fpr=percent / 100)
    rank = math.ceil((1 - Fraction(percent, 100)) * (len(scores) + 1))
    assert calibration.image_guaranteed == (rank <= len(scores))
    if calibration.tail is None:
        assert calibration.image_threshold == sorted(scores)[min(rank, len(scores)) - 1]
    else:
        assert rank > len(scores)
        assert calibration.tail.compute_share_above(calibration.image_threshold) == pytest.approx(percent / 100)


MAPS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 12).map(float))


@given(st.lists(MAPS, min_size=1, max_size=8), st.integers(1, 60))
def test_the_pixel_threshold_agrees_with_its_definition(maps, percent):
    calibration = calibrate(np.zeros(len(maps)), maps, target_pixel_fpr=percent / 100, kept_fraction=1.0)
    assert calibration.pixel_threshold == slow_pixel_threshold(maps, Fraction(percent, 100))
    assert calibration.pixel_guaranteed == (Fraction(percent, 100) * (len(maps) + 1) >= 1)


@given(
    hnp.arrays(np.int64, (7, 5, 4), elements=st.integers(0, 50)),
    st.sampled_from([0.05, 0.1, 0.3, 0.6]),
    st.sampled_from([0.02, 0.1, 0.25]),
)
def test_storing_a_part_of_the_pixels_never_lowers_the_pixel_threshold(maps, kept_fraction, target):
    whole, part = (calibrate(np.zeros(7), maps, target_pixel_fpr=target, kept_fraction=k) for k in (1.0, kept_fraction))
    assert part.pixel_threshold >= whole.pixel_threshold


def test_the_default_part_of_the_pixels_gives_the_exact_threshold_when_one_image_holds_all_the_high_scores():
    maps = np.random.default_rng(0).normal(size=(60, 64, 64))
    maps[7] += 5.0
    assert calibrate(np.zeros(60), maps).pixel_threshold == slow_pixel_threshold(list(maps[7:8]), Fraction(60, 1000))


@given(st.integers(0, 6), hnp.arrays(np.int64, (6, 3, 4), elements=st.integers(0, 9)))
def test_merged_builders_equal_a_single_builder(cut, maps):
    scores, groups, parts = maps.max(axis=(1, 2)), np.array([0, 0, 1, 1, 1, 2]), []
    for batch in (slice(cut, None), slice(None, cut)):
        parts.append(CalibrationBuilder("split", 0.2, 0.15))
        parts[-1].add(scores[batch], maps[batch], groups[batch])
    merged = pickle.loads(pickle.dumps(parts[0])).merge(parts[1]).build_calibration()
    assert merged == calibrate(scores, maps, target_fpr=0.2, target_pixel_fpr=0.15, groups=groups)
    assert merged.num_groups == 3


def test_over_many_calibrations_the_false_alarm_rate_is_the_target():
    rng, n, runs = np.random.default_rng(0), 64, 1500
    draws = rng.gamma(2.0, size=(runs, n + 1))
    alarms = sum(int(calibrate(scores[:n]).is_anomalous(scores[n])) for scores in draws)
    exact = math.floor(0.05 * (n + 1)) / (n + 1)  # for continuous scores
    assert alarms / runs == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / runs))


@pytest.mark.parametrize(("target", "bound"), [(0.1, 0.1), (0.01, (30 * 0.01 + 1) / 31)])
def test_over_many_calibrations_the_pixel_rate_stays_below_its_bound_for_images_with_dependent_pixels(target, bound):
    rng, n, shares = np.random.default_rng(1), 30, []
    for _ in range(400):
        maps = rng.normal(size=(n + 1, 8, 8)) + 2.0 * rng.normal(size=(n + 1, 1, 1))  # whole images are high or low
        calibration = calibrate(np.zeros(n), maps[:n], target_pixel_fpr=target)
        shares.append(np.mean(maps[n] > calibration.pixel_threshold))
    assert calibration.pixel_guaranteed == (target == 0.1)
    assert calibration.pixel_fpr_bound == pytest.approx(bound)
    assert np.mean(shares) <= bound + 3 * np.std(shares) / math.sqrt(len(shares))


PAIRS = np.repeat(np.arange(20), 2)
LEAVE_ONE_OUT, MANY = {"method": "leave_one_out"}, np.arange(2000.0)


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        (MANY, {}, []),
        ([3.0, 1.0, 2.0], {}, ["3 good photographs", "highest score", "100 good photographs would narrow"]),
        (MANY[10:20], {}, ["10 good photographs", "real false alarm rate may lie between"]),
        (MANY[:200], LEAVE_ONE_OUT, ["200 good photographs, each scored with itself left out"]),
        (MANY, {"method": "cross"}, ["its fold left out"]),
        (
            MANY[:40],
            {**LEAVE_ONE_OUT, "groups": PAIRS},
            ["40 photographs of about 20 parts", "its part left out", "100 parts would narrow"],
        ),
    ],
)
def test_caveats_name_the_method_and_the_numbers_of_images(scores, settings, expected):
    calibration = calibrate(scores, **settings)
    caveats = " ".join(calibration.describe_limits())
    assert bool(caveats) == bool(expected)
    assert [text for text in expected if text not in caveats] == []
    assert (calibration.image_guaranteed, calibration.pixel_guaranteed) == (not expected, not expected)


def test_three_images_give_their_highest_score_and_ten_images_the_threshold_of_the_tail_model():
    three, ten = calibrate([3.0, 1.0, 2.0]), calibrate(np.arange(10.0, 20.0))
    assert (three.image_threshold, three.min_measurable_fpr, three.effective_fpr) == (3.0, 0.25, 0.25)
    assert ten.tail is not None
    assert ten.image_threshold > 19.0
    assert ten.effective_fpr == 0.05


@pytest.mark.parametrize("count", [18, 32, 40])
def test_the_caveat_states_the_interval_of_the_false_alarm_rate(count):
    calibration = calibrate(np.random.default_rng(0).gamma(9.0, size=count), method="leave_one_out")
    low, high = calibration.compute_fpr_interval()
    assert f"between {100 * low:.2g} % and {100 * high:.2g} % (target 5 %)" in " ".join(calibration.describe_limits())


def test_modelled_p_values_fall_with_the_score_and_meet_the_counted_ones():
    calibration = calibrate(np.sort(np.random.default_rng(1).gamma(4.0, size=12)))
    p_values = calibration.compute_conformal_p_values(np.linspace(0.0, 3 * calibration.image_threshold, 2000))
    assert (np.diff(p_values) <= 0).all()
    assert p_values[0] == 1.0
    assert 0 < p_values[-1] < 0.01
    start = calibration.tail.start
    below, above = calibration.compute_conformal_p_values([start * (1 - 1e-9), start * (1 + 1e-4)])
    assert above == pytest.approx(below - 1 / 13, abs=1e-3)


@pytest.mark.parametrize(("n", "method"), [(40, "split"), (110, "leave_one_out"), (3, "leave_one_out")])
def test_the_probability_of_a_high_rate_of_a_counted_threshold_is_its_frequency(n, method):
    rng = np.random.default_rng(0)
    rates = np.array([np.exp(-calibrate(rng.exponential(size=n), method=method).image_threshold) for _ in range(2000)])
    calibration = calibrate(np.arange(1.0, n + 1), method=method)
    assert calibration.tail is None
    assert np.mean(rates > 0.1) == pytest.approx(calibration.probability_fpr_exceeds_twice_target, abs=0.025)
    low, high = calibration.compute_fpr_interval()
    assert np.mean((rates >= low) & (rates <= high)) == pytest.approx(0.9, abs=0.02)


def test_an_older_calibration_keeps_its_threshold_and_p_values():
    """The calibration of twelve scores was written before the tail had a prior. It lacks newer attributes."""
    scores = [0.91, 0.95, 0.97, 0.99, 1.0, 1.02, 1.03, 1.05, 1.08, 1.12, 1.2, 1.31]
    older = {
        "method": "leave_one_out", "image_scores": scores, "target_fpr": 0.05,
        "image_threshold": 1.371431254225292, "image_guaranteed": False, "target_pixel_fpr": 0.001,
        "pixel_threshold": 2.0, "pixel_guaranteed": False,
        "tail": {"start": 1.03, "share": 6 / 13, "scale": 0.122, "shape": 0.2},
    }  # fmt: skip
    calibration = Calibration.from_dict(older)
    assert calibration.image_threshold == older["image_threshold"]
    expected = [13 / 13, 9 / 13, 6 / 13 * (1 + 0.2 * 0.17 / 0.122) ** -5, 6 / 13 * (1 + 0.2 * 0.97 / 0.122) ** -5]
    np.testing.assert_allclose(calibration.compute_conformal_p_values([0.5, 1.0, 1.2, 2.0]), expected, rtol=1e-3)
    assert calibration.is_anomalous([1.37, 1.38]).tolist() == [False, True]


@given(
    st.lists(st.integers(0, 10**6).map(float), min_size=1, max_size=60),
    st.integers(2, 4),
    st.sampled_from(["split", "leave_one_out"]),
    st.sampled_from([0.02, 0.05, 0.1, 0.3]),
)
def test_photographs_of_the_same_parts_give_the_threshold_and_the_uncertainty_of_the_parts(
    scores, times, method, target
):
    once = calibrate(scores, method=method, target_fpr=target)
    groups = np.repeat(np.arange(len(scores)), times)
    repeated = calibrate(np.repeat(scores, times), method=method, target_fpr=target, groups=groups)
    assert (once.num_groups, repeated.num_groups) == (None, len(scores))
    assert (repeated.image_guaranteed, repeated.min_measurable_fpr) == (once.image_guaranteed, once.min_measurable_fpr)
    assert repeated.image_threshold == pytest.approx(once.image_threshold, rel=1e-12)
    assert repeated.compute_fpr_interval() == pytest.approx(once.compute_fpr_interval(), abs=1e-6)
    assert repeated.probability_fpr_exceeds_twice_target == pytest.approx(
        once.probability_fpr_exceeds_twice_target, abs=1e-9
    )
    middle = float(np.median(scores))
    assert repeated.compute_conformal_p_values(middle) == pytest.approx(
        float(once.compute_conformal_p_values(middle)), rel=1e-9
    )


def test_groups_of_different_sizes_carry_no_guarantee():
    scores = np.arange(40.0)
    assert calibrate(scores, groups=PAIRS).image_guaranteed
    assert not calibrate(scores[1:], groups=PAIRS[1:]).image_guaranteed
    assert not calibrate(scores, groups=PAIRS, target_pixel_fpr=0.1).pixel_guaranteed


@pytest.mark.parametrize("num_images", [3, 10])
def test_a_calibration_survives_json_and_pickle(num_images):
    calibration = calibrate(np.float32([0.1, 7.3, 2.2, *range(20)][:num_images]))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert pickle.loads(pickle.dumps(calibration)) == calibration


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1}, "extra"),
        ({"method": None}, "method"),
        ({"image_scores": [2.0, 1.0]}, "ascending"),
        ({"image_threshold": math.inf}, "infinite"),
        ({"image_scores": []}, "empty"),
        ({"pixel_guaranteed": "yes"}, "pixel_guaranteed"),
        ({"image_scores": 3.0}, "image_scores"),
        ({"target_fpr": 0.0}, r"target_fpr=0\.0"),
    ],
)
def test_a_changed_dictionary_is_refused(change, named):
    with pytest.raises(DataError, match=named):
        Calibration.from_dict({**calibrate([1.0, 2.0]).to_dict(), **change})


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"target_fpr": 0.0}, r"target_fpr=0\.0"),
        ({"target_pixel_fpr": 1.0}, r"target_pixel_fpr=1\.0"),
        ({"method": "test"}, "test"),
        ({"maps": np.zeros((1, 4, 4))}, "2 scores for 1 maps"),
        ({"scores": [1.0, np.nan]}, "nan"),
        ({"maps": [np.zeros((4, 4)), np.full((4, 4), np.inf)]}, "map 1"),
        ({"maps": np.zeros((2, 0, 4))}, "map 0"),
        ({"scores": []}, r"data\.holdout_fraction"),
    ],
)
def test_bad_settings_and_batches_are_refused(inputs, named):
    with pytest.raises(DataError, match=named):
        calibrate(**{"scores": [1.0, 2.0], **inputs})


@pytest.mark.parametrize("judge", [Calibration.is_anomalous, Calibration.compute_conformal_p_values])
def test_a_nan_score_is_never_judged(judge):
    with pytest.raises(DataError, match="NaN"):
        judge(calibrate([1.0, 2.0]), [1.0, np.nan])


def test_the_last_digits_of_a_score_decide_nothing():
    """An image that ties with a held-out score is normal, alone and in its folder, and everywhere by the same rule."""
    calibration = calibrate(np.linspace(1.0, 10.019063, 19), target_pixel_fpr=0.05)
    scores = np.array([10.0190630, 10.0190687, 10.03])  # alone, in a folder, above
    assert calibration.is_anomalous(scores).tolist() == [False, False, True]
    p_values = calibration.compute_conformal_p_values(scores)
    assert p_values[0] == p_values[1] > p_values[2]
    assert (p_values <= calibration.effective_fpr).tolist() == [False, False, True]
    assert exceeds_threshold(scores, calibration.image_threshold).tolist() == [False, False, True]


@pytest.mark.parametrize("n", [10, 40])
def test_a_change_of_precision_turns_no_good_image_into_a_bad_one(n):
    unknown = calibrate(np.linspace(1.0, 1.6, n))
    recorded = replace(unknown, precision="bfloat16")
    assert unknown.convert_to_precision("bfloat16") is unknown
    assert recorded.convert_to_precision("bfloat16") is recorded
    used = recorded.convert_to_precision("float32")
    assert Calibration.from_dict(used.to_dict()) == used
    scores = np.linspace(0.9, 2.5, 400)
    shifted = scores * (1 + PRECISION_SHIFT)
    assert not (used.is_anomalous(shifted) & ~recorded.is_anomalous(scores)).any()
    assert (used.compute_conformal_p_values(shifted) >= recorded.compute_conformal_p_values(scores) * (1 - 1e-9)).all()
    assert "bfloat16 scores, but this machine computes in float32" in used.describe_limits()[0]
    assert recorded.describe_limits() == used.describe_limits()[1:]


def test_a_threshold_set_by_hand_holds_as_given_at_any_precision():
    chosen = replace(calibrate(np.arange(10.0)), precision="bfloat16").replace_thresholds(2.5, 3.5)
    chosen = chosen.convert_to_precision("float32")
    assert (chosen.image_threshold, chosen.pixel_threshold) == (2.5, 3.5)


@pytest.mark.parametrize("count", [10, 60, 2000])
@pytest.mark.parametrize("method", ["split", "leave_one_out"])
@pytest.mark.parametrize("groups", [None, "pairs"])
def test_another_target_rate_gives_the_calibration_of_that_rate(count, method, groups):
    scores = np.sort(np.random.default_rng(2).gamma(4.0, size=count))
    parts = {"groups": np.repeat(np.arange(count // 2), 2)} if groups else {}
    for target in (0.2, 0.01):
        changed = calibrate(scores, method=method, **parts).replace_target_fpr(target)
        expected = calibrate(scores, method=method, target_fpr=target, **parts)
        assert (
            expected.image_guaranteed or not changed.image_guaranteed
        )  # whether groups have equal sizes may be unknown
        assert dataclasses.replace(changed, image_guaranteed=expected.image_guaranteed) == expected
    with pytest.raises(DataError, match="5"):
        changed.replace_target_fpr(5.0)
