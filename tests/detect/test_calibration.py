"""Calibration: simulated guarantees, laws between p-value and verdict, merging, and a slow reference."""

from __future__ import annotations

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

from focus_ray.detect.calibration import PRECISION_SHIFT, Calibration, CalibrationBuilder, is_above
from focus_ray.errors import DataError


def calibrate(
    scores, maps=None, method="split", target_fpr=0.05, target_pixel_fpr=0.001, groups=None, **settings
) -> Calibration:
    builder = CalibrationBuilder(method, target_fpr, target_pixel_fpr, **settings)
    builder.add(scores, np.zeros((len(scores), 2, 2)) if maps is None else maps, groups)
    return builder.finish()


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


@given(SCORES, TARGETS, st.integers(-31, 31))
def test_an_image_is_anomalous_exactly_when_its_p_value_is_at_most_the_effective_rate(scores, target, score):
    calibration = calibrate(scores, target_fpr=target)
    p_value = calibration.conformal_p_value(score)
    assert bool(calibration.is_anomalous(score)) == bool(p_value <= calibration.effective_fpr)
    assert calibration.effective_fpr == target or not calibration.image_guaranteed


@given(SCORES, hnp.arrays(np.int64, (3, 4), elements=st.integers(-31, 31)))
def test_p_values_are_the_counted_share(scores, new):
    expected = [[(1 + sum(c >= s for c in scores)) / (len(scores) + 1) for s in row] for row in new]
    calibration = calibrate(scores)
    counted = np.full(new.shape, True) if calibration.tail is None else new <= calibration.tail.start
    np.testing.assert_allclose(calibration.conformal_p_value(new)[counted], np.array(expected)[counted], rtol=1e-15)


@given(SCORES, st.integers(1, 99))
def test_the_image_threshold_is_the_textbook_order_statistic(scores, percent):
    calibration = calibrate(scores, target_fpr=percent / 100)
    rank = math.ceil((1 - Fraction(percent, 100)) * (len(scores) + 1))
    assert calibration.image_guaranteed == (rank <= len(scores))
    if calibration.tail is None:
        assert calibration.image_threshold == sorted(scores)[min(rank, len(scores)) - 1]
    else:
        assert rank > len(scores)
        assert calibration.tail.share_above(calibration.image_threshold) == pytest.approx(percent / 100)


@given(
    st.lists(
        hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 12)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 60),
)
def test_the_pixel_threshold_agrees_with_its_definition(maps, percent):
    maps = [scores.astype(np.float32) for scores in maps]
    calibration = calibrate(np.zeros(len(maps)), maps, target_pixel_fpr=percent / 100, kept_fraction=1.0)
    assert calibration.pixel_threshold == slow_pixel_threshold(maps, Fraction(percent, 100))
    assert calibration.pixel_guaranteed == (Fraction(percent, 100) * (len(maps) + 1) >= 1)


@given(
    hnp.arrays(np.int64, (7, 5, 4), elements=st.integers(0, 50)),
    st.sampled_from([0.05, 0.1, 0.3, 0.6]),
    st.sampled_from([0.02, 0.1, 0.25]),
)
def test_storing_a_part_of_the_pixels_never_lowers_the_pixel_threshold(maps, kept_fraction, target):
    whole = calibrate(np.zeros(7), maps, target_pixel_fpr=target, kept_fraction=1.0)
    part = calibrate(np.zeros(7), maps, target_pixel_fpr=target, kept_fraction=kept_fraction)
    assert part.pixel_threshold >= whole.pixel_threshold


def test_the_default_part_of_the_pixels_gives_the_exact_threshold_when_one_image_holds_all_the_high_scores():
    maps = np.random.default_rng(0).normal(size=(60, 64, 64))
    maps[7] += 5.0
    part = calibrate(np.zeros(60), maps)
    assert part.pixel_threshold == calibrate(np.zeros(60), maps, kept_fraction=1.0).pixel_threshold
    assert part.pixel_threshold == slow_pixel_threshold(list(maps[7:8]), Fraction(60, 1000))


@given(st.integers(0, 6), hnp.arrays(np.int64, (6, 3, 4), elements=st.integers(0, 9)))
def test_merged_builders_equal_a_single_builder(cut, maps):
    scores = maps.max(axis=(1, 2))
    parts = []
    for batch in (slice(cut, None), slice(None, cut)):
        parts.append(CalibrationBuilder("split", 0.2, 0.15))
        parts[-1].add(scores[batch], maps[batch])
    merged = pickle.loads(pickle.dumps(parts[0])).merge(parts[1])
    assert merged.num_images == 6
    assert merged.finish() == calibrate(scores, maps, target_fpr=0.2, target_pixel_fpr=0.15)


def test_over_many_calibrations_the_false_alarm_rate_is_the_target():
    rng = np.random.default_rng(0)
    n, runs = 64, 4000
    alarms = 0
    for _ in range(runs):
        scores = rng.gamma(2.0, size=n + 1)
        alarms += int(calibrate(scores[:n]).is_anomalous(scores[n]))
    exact = math.floor(0.05 * (n + 1)) / (n + 1)  # for continuous scores
    assert alarms / runs == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / runs))


def test_over_many_calibrations_the_pixel_rate_stays_below_its_bound_for_images_with_dependent_pixels():
    rng = np.random.default_rng(1)
    n, runs = 30, 400
    shares = {0.1: [], 0.01: []}
    bounds = {}
    for _ in range(runs):
        maps = rng.normal(size=(n + 1, 8, 8)) + 2.0 * rng.normal(size=(n + 1, 1, 1))  # whole images are high or low
        for target, target_shares in shares.items():
            calibration = calibrate(np.zeros(n), maps[:n], target_pixel_fpr=target)
            target_shares.append(np.mean(maps[n] > calibration.pixel_threshold))
            bounds[target] = calibration.pixel_fpr_bound
            assert calibration.pixel_guaranteed == (target == 0.1)
    assert bounds == {0.1: 0.1, 0.01: pytest.approx((30 * 0.01 + 1) / 31)}
    for target, target_shares in shares.items():
        assert np.mean(target_shares) <= bounds[target] + 3 * np.std(target_shares) / math.sqrt(runs)


def test_three_images_give_their_highest_score_with_a_caveat():
    calibration = calibrate([3.0, 1.0, 2.0], target_fpr=0.05)
    assert calibration.image_threshold == 3.0
    assert not calibration.image_guaranteed
    assert calibration.smallest_fpr == calibration.effective_fpr == 0.25
    assert any(
        "3 good images are too few" in line and "19 good images would do" in line for line in calibration.caveats()
    )


def test_too_few_images_give_a_threshold_of_the_tail_model_with_a_caveat():
    calibration = calibrate(np.arange(10.0, 20.0), target_fpr=0.05)
    assert calibration.tail is not None
    assert calibration.image_threshold > 19.0
    assert calibration.effective_fpr == 0.05
    assert not calibration.image_guaranteed
    assert any("10 good images are too few" in line and "model of the tail" in line for line in calibration.caveats())
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration


def test_modelled_p_values_fall_with_the_score_and_meet_the_counted_ones():
    calibration = calibrate(np.sort(np.random.default_rng(1).gamma(4.0, size=12)), target_fpr=0.05)
    scores = np.linspace(0.0, 3 * calibration.image_threshold, 2000)
    p_values = calibration.conformal_p_value(scores)
    assert (np.diff(p_values) <= 0).all()
    assert p_values[0] == 1.0
    assert 0 < p_values[-1] < 0.01
    start = calibration.tail.start
    below, above = calibration.conformal_p_value([start * (1 - 1e-9), start * (1 + 1e-4)])
    assert above == pytest.approx(below - 1 / 13, abs=1e-3)


def test_the_interval_of_the_rate_narrows_with_images_and_holds_its_share_of_draws():
    few, many = (calibrate(np.arange(float(n))).fpr_interval() for n in (40, 400))
    assert few[0] < many[0] < 0.05 < many[1] < few[1]
    rng = np.random.default_rng(0)
    rates = [math.exp(-calibrate(rng.exponential(size=40)).image_threshold) for _ in range(2000)]
    low, high = few
    assert np.mean([(low <= rate <= high) for rate in rates]) == pytest.approx(0.9, abs=0.03)


def test_leave_one_out_has_a_caveat_about_its_rate():
    calibration = calibrate(np.arange(200.0), method="leave_one_out")
    assert not calibration.image_guaranteed
    assert calibration.tail is None
    assert any("All 200 training images set the threshold" in line for line in calibration.caveats())


def test_enough_images_give_no_caveats():
    calibration = calibrate(np.arange(1000.0), target_fpr=0.05, target_pixel_fpr=0.001)
    assert (calibration.image_guaranteed, calibration.pixel_guaranteed) == (True, True)
    assert calibration.caveats() == []
    assert calibration.pixel_fpr_bound == 0.001


def test_the_cross_method_claims_no_guarantee():
    calibration = calibrate(np.arange(2000.0), method="cross")
    assert (calibration.image_guaranteed, calibration.pixel_guaranteed) == (False, False)
    assert ["cross" in line for line in calibration.caveats()] == [True]


def test_calibrations_of_older_bundles_may_lack_newer_fields():
    calibration = calibrate([1.0, 2.0])
    newer = ("tail", "by_hand", "num_groups", "precision", "converted_from")
    older = {key: value for key, value in calibration.to_dict().items() if key not in newer}
    assert Calibration.from_dict(older) == calibration


def test_an_older_calibration_keeps_its_threshold_and_p_values():
    """The calibration of twelve scores was written before the tail had a prior."""
    scores = [0.91, 0.95, 0.97, 0.99, 1.0, 1.02, 1.03, 1.05, 1.08, 1.12, 1.2, 1.31]
    older = {
        "method": "leave_one_out", "image_scores": scores, "target_fpr": 0.05,
        "image_threshold": 1.371431254225292, "image_guaranteed": False, "target_pixel_fpr": 0.001,
        "pixel_threshold": 2.0, "pixel_guaranteed": False,
        "tail": {"start": 1.03, "share": 6 / 13, "scale": 0.122, "shape": 0.2}, "by_hand": False,
    }  # fmt: skip
    calibration = Calibration.from_dict(older)
    assert calibration.image_threshold == older["image_threshold"]
    expected = [13 / 13, 9 / 13, 6 / 13 * (1 + 0.2 * 0.17 / 0.122) ** -5, 6 / 13 * (1 + 0.2 * 0.97 / 0.122) ** -5]
    np.testing.assert_allclose(calibration.conformal_p_value([0.5, 1.0, 1.2, 2.0]), expected, rtol=1e-3)
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
    assert repeated.image_threshold == pytest.approx(once.image_threshold, rel=1e-12)
    assert repeated.image_guaranteed == once.image_guaranteed
    assert repeated.smallest_fpr == once.smallest_fpr
    assert repeated.fpr_interval() == pytest.approx(once.fpr_interval(), abs=1e-6)
    assert repeated.probability_above_twice_target == pytest.approx(once.probability_above_twice_target, abs=1e-9)
    middle = float(np.median(scores))
    assert repeated.conformal_p_value(middle) == pytest.approx(float(once.conformal_p_value(middle)), rel=1e-9)


@given(SCORES, st.lists(st.integers(0, 5), min_size=80, max_size=80), TARGETS, st.integers(-31, 31))
def test_with_groups_too_an_image_is_anomalous_exactly_when_its_p_value_is_small(scores, numbers, target, score):
    calibration = calibrate(scores, target_fpr=target, groups=np.array(numbers[: len(scores)]))
    p_value = calibration.conformal_p_value(score)
    assert bool(calibration.is_anomalous(score)) == bool(p_value <= calibration.effective_fpr)


def test_groups_are_counted_over_batches_and_merged_builders():
    builders = []
    for numbers in ([0, 0, 1], [1, 2]):
        builders.append(CalibrationBuilder("split", 0.3, 0.3))
        builders[-1].add(np.ones(len(numbers)), np.zeros((len(numbers), 2, 2)), np.array(numbers))
    assert builders[0].finish().num_groups == 2
    assert builders[0].merge(builders[1]).finish().num_groups == 3
    with pytest.raises(DataError, match=r"groups \(2,\) for scores \(1,\)"):
        builders[0].add([1.0], np.zeros((1, 2, 2)), np.array([1, 2]))


def test_groups_of_different_sizes_carry_no_guarantee():
    scores, pairs = np.arange(40.0), np.repeat(np.arange(20), 2)
    assert calibrate(scores, groups=pairs).image_guaranteed
    assert not calibrate(scores[1:], groups=pairs[1:]).image_guaranteed
    assert not calibrate(scores, groups=pairs, target_pixel_fpr=0.1).pixel_guaranteed


def test_caveats_count_parts_where_photographs_show_parts_several_times():
    calibration = calibrate(np.arange(40.0), method="leave_one_out", groups=np.repeat(np.arange(20), 2))
    first, uncertainty, *_ = calibration.caveats()
    assert first.startswith(
        "All 40 photographs of about 20 parts set the threshold, each scored with its part left out"
    )
    assert uncertainty.startswith("With 40 photographs of about 20 parts the false alarm rate of this one threshold")
    assert "100 parts would bring it between" in uncertainty


def test_the_caveat_states_the_probability_of_twice_the_target():
    calibration = calibrate(np.random.default_rng(0).gamma(9.0, size=20), method="leave_one_out")
    risk = calibration.probability_above_twice_target
    sentence = f"With probability {risk:.2f} the false alarm rate is above 10 %."
    assert any(sentence in caveat for caveat in calibration.caveats())


@pytest.mark.parametrize(("n", "method"), [(40, "split"), (110, "leave_one_out"), (3, "leave_one_out")])
def test_the_probability_of_a_high_rate_of_a_counted_threshold_is_its_frequency(n, method):
    rng = np.random.default_rng(0)
    rates = np.array([np.exp(-calibrate(rng.exponential(size=n), method=method).image_threshold) for _ in range(2000)])
    calibration = calibrate(np.arange(1.0, n + 1), method=method)
    assert calibration.tail is None
    assert np.mean(rates > 0.1) == pytest.approx(calibration.probability_above_twice_target, abs=0.025)
    low, high = calibration.fpr_interval()
    assert np.mean((rates >= low) & (rates <= high)) == pytest.approx(0.9, abs=0.02)


def test_a_calibration_survives_json_and_pickle():
    calibration = calibrate(np.float32([0.1, 7.3, 2.2]), np.random.default_rng(0).normal(size=(3, 5, 5)))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert pickle.loads(pickle.dumps(calibration)) == calibration


def test_the_p_value_of_one_score_has_no_dimensions():
    assert calibrate([1.0, 2.0]).conformal_p_value(1.5).shape == ()


def test_a_changed_dictionary_is_refused():
    tree = calibrate([1.0, 2.0]).to_dict()
    with pytest.raises(DataError, match=r"unknown keys \['extra'\], missing keys \[\]"):
        Calibration.from_dict({**tree, "extra": 1})
    with pytest.raises(DataError, match=r"missing keys \['method'\]"):
        Calibration.from_dict({key: value for key, value in tree.items() if key != "method"})
    with pytest.raises(DataError, match="not in ascending order"):
        Calibration.from_dict({**tree, "image_scores": [2.0, 1.0]})
    with pytest.raises(DataError, match="NaN or infinite"):
        Calibration.from_dict({**tree, "image_threshold": math.inf})
    with pytest.raises(DataError, match="image_scores is empty"):
        Calibration.from_dict({**tree, "image_scores": []})
    with pytest.raises(DataError, match="expected true or false"):
        Calibration.from_dict({**tree, "pixel_guaranteed": "yes"})
    with pytest.raises(DataError, match="wrong type"):
        Calibration.from_dict({**tree, "image_scores": 3.0})


def test_bad_settings_are_refused():
    with pytest.raises(DataError, match=r"target_fpr=0\.0; expected a share"):
        CalibrationBuilder("split", 0.0, 0.001)
    with pytest.raises(DataError, match=r"target_pixel_fpr=1\.0"):
        CalibrationBuilder("split", 0.05, 1.0)
    with pytest.raises(DataError, match="expected one of split, cross, leave_one_out"):
        CalibrationBuilder("test", 0.05, 0.001)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="kept_fraction=0"):
        CalibrationBuilder("split", 0.05, 0.001, kept_fraction=0.0)


def test_bad_batches_are_refused_and_leave_the_builder_as_it_was():
    builder = CalibrationBuilder("split", 0.05, 0.001)
    with pytest.raises(DataError, match=r"scores \(2,\) for 1 maps"):
        builder.add([1.0, 2.0], np.zeros((1, 4, 4)))
    with pytest.raises(DataError, match="calibration scores hold nan"):
        builder.add([np.nan], np.zeros((1, 4, 4)))
    with pytest.raises(DataError, match="calibration map 1 has NaN"):
        builder.add([1.0, 2.0], np.stack([np.zeros((4, 4)), np.full((4, 4), np.inf)]))
    with pytest.raises(DataError, match=r"calibration map 0 has shape \(4,\)"):
        builder.add([1.0], np.zeros((1, 4)))
    assert builder.num_images == 0
    with pytest.raises(DataError, match=r"set data\.holdout_fraction above 0"):
        builder.finish()


def test_builders_of_different_settings_do_not_merge():
    with pytest.raises(DataError, match="different settings"):
        CalibrationBuilder("split", 0.05, 0.001).merge(CalibrationBuilder("split", 0.1, 0.001))


def test_a_nan_score_is_never_judged():
    calibration = calibrate([1.0, 2.0])
    with pytest.raises(DataError, match="a score is NaN"):
        calibration.is_anomalous([1.0, np.nan])
    with pytest.raises(DataError, match="a score is NaN"):
        calibration.conformal_p_value(np.nan)


def test_the_last_digits_of_a_score_decide_nothing() -> None:
    """An image that ties with a held-out score is normal, alone and in its folder, and everywhere by the same rule."""
    held = [float(value) for value in np.linspace(1.0, 10.019063, 19)]
    builder = CalibrationBuilder("split", 0.05, 0.05)
    builder.add(np.array(held), np.ones((19, 4, 4), np.float32))
    calibration = builder.finish()
    alone, in_a_folder, above = 10.0190630, 10.0190687, 10.03
    scores = np.array([alone, in_a_folder, above])
    assert calibration.is_anomalous(scores).tolist() == [False, False, True]
    p_values = calibration.conformal_p_value(scores)
    assert p_values[0] == p_values[1] > p_values[2]
    assert (p_values <= calibration.effective_fpr).tolist() == [False, False, True]
    assert is_above(scores, calibration.image_threshold).mean() == pytest.approx(1 / 3)


def test_a_calibration_does_not_change_at_its_own_or_an_unknown_precision():
    calibration = calibrate(np.arange(10.0))
    assert calibration.precision is None
    assert calibration.at_precision("bfloat16") is calibration
    recorded = replace(calibration, precision="bfloat16")
    assert recorded.at_precision("bfloat16") is recorded


@pytest.mark.parametrize("n", [10, 40])
def test_a_change_of_precision_turns_no_good_image_into_a_bad_one(n):
    recorded = replace(calibrate(np.linspace(1.0, 1.6, n)), precision="bfloat16")
    used = recorded.at_precision("float32")
    assert Calibration.from_dict(used.to_dict()) == used
    scores = np.linspace(0.9, 2.5, 400)
    shifted = scores * (1 + PRECISION_SHIFT)
    assert not (used.is_anomalous(shifted) & ~recorded.is_anomalous(scores)).any()
    assert (used.conformal_p_value(shifted) >= recorded.conformal_p_value(scores) * (1 - 1e-9)).all()
    assert used.caveats()[0].startswith(
        "The thresholds come from bfloat16 scores, but this machine computes in float32"
    )
    assert recorded.caveats() == used.caveats()[1:]


def test_a_threshold_set_by_hand_holds_as_given_at_any_precision():
    chosen = replace(calibrate(np.arange(10.0)), precision="bfloat16").with_thresholds(2.5, 3.5).at_precision("float32")
    assert (chosen.image_threshold, chosen.pixel_threshold) == (2.5, 3.5)
