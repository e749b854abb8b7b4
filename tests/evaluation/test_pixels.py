"""Pixels in bins: they add over any split, and no metric lies further from its exact value than its bound says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from focus_ray.errors import DataError
from focus_ray.evaluation.evaluate import Gathered, figures, joined
from focus_ray.evaluation.metrics import Measured
from focus_ray.evaluation.pixels import PixelBins, bin_of
from focus_ray.evaluation.report import within
from focus_ray.kinds import METRICS

METRIC_KEYS_OF_PIXELS = ("pixel_auroc", "pixel_average_precision", "aupro_0.3", "aupro_0.05")
SHAPE = (4, 6, 5)
MASKS = hnp.arrays(np.bool_, SHAPE, elements=st.sampled_from([False, False, True]))
MAPS = st.one_of(
    hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 50, width=32)),
    # many in one bin, in an order of their own, with ties
    hnp.arrays(np.float32, SHAPE, elements=st.integers(0, 40).map(lambda step: float(np.float32(1 + 2e-5 * step)))),
    hnp.arrays(np.float32, SHAPE, elements=st.integers(-3, 3).map(float)),
)
INSIDE = hnp.arrays(np.bool_, SHAPE, elements=st.sampled_from([True, True, False]))


def bins_of(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray) -> PixelBins:
    return PixelBins.total(PixelBins.of_image(*image) for image in zip(masks, maps, inside, strict=True))


def measured(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray, exact_pixels: int) -> Measured:
    """Of images whose label is whether their mask has a pixel; two defect types."""
    gathered = Gathered(exact_pixels)
    for number, (mask, scores, counts) in enumerate(zip(masks, maps, inside, strict=True)):
        gathered.add(int(mask.any()), f"kind {number % 2}", float(scores.max()), scores, mask, counts)
    return gathered.labelled(1.0, [str(number) for number in range(len(masks))]).measured


@given(MASKS, MAPS, INSIDE, st.integers(0, 4))
def test_bins_add_over_any_split(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray, cut: int) -> None:
    whole = bins_of(masks, maps, inside)
    parts = bins_of(masks[cut:], maps[cut:], inside[cut:]) + bins_of(masks[:cut], maps[:cut], inside[:cut])
    for name in ("keys", "normal", "anomalous", "num_regions", "num_images"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(parts.overlap, whole.overlap, rtol=1e-12)
    assert whole.normal.sum() + whole.anomalous.sum() == inside.sum()
    assert whole.overlap.sum() == pytest.approx(whole.num_regions)


@given(MASKS, MAPS, INSIDE)
def test_no_metric_is_further_from_its_exact_value_than_its_bound(
    masks: np.ndarray, maps: np.ndarray, inside: np.ndarray
) -> None:
    exact, binned = (measured(masks, maps, inside, pixels) for pixels in (maps.size, 0))
    types = ["kind 0", "kind 1"] * 2
    true, found = figures(exact, types, 0.05), figures(binned, types, 0.05)
    assert (true["binned"], found["binned"]) == (False, True)
    for wanted, got in ((true, found), *((true["defect_types"][k], part) for k, part in found["defect_types"].items())):
        for key in METRIC_KEYS_OF_PIXELS:
            assert (wanted[key] is None) == (got[key] is None)
            if wanted[key] is not None:
                assert abs(wanted[key] - got[key]) <= got["bounds"][key] + 1e-9
    same = [key for key in true if key not in ("binned", "bounds", "defect_types", *METRIC_KEYS_OF_PIXELS)]
    assert {key: true[key] for key in same} == {key: found[key] for key in same}


@given(hnp.arrays(np.float32, 40, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_a_higher_score_never_has_a_lower_bin(scores: np.ndarray) -> None:
    rising = np.sort(scores)
    assert (np.diff(bin_of(rising).astype(np.int64)) >= 0).all()
    assert bin_of(np.float32([-0.0])) == bin_of(np.float32([0.0]))


def test_a_bin_is_less_than_an_8000th_of_its_score_wide() -> None:
    for score in (1e-3, 1.0, 1.999, 37.0):
        assert bin_of(np.float32([score])) != bin_of(np.float32([score * (1 + 1 / 8000)]))


def blurred_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Twelve images of smooth scores that are a little higher within blobs."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((12, 96, 96), bool)
    for mask in masks[4:]:
        top, left = rng.integers(0, 70, 2)
        mask[top : top + rng.integers(4, 25), left : left + rng.integers(4, 25)] = True
    maps = np.exp(rng.normal(0.6 * masks, 0.4)).astype(np.float32)
    return masks, maps, np.ones_like(masks)


def test_maps_like_real_ones_change_no_metric_by_a_ten_thousandth() -> None:
    masks, maps, inside = blurred_set(0)
    exact, binned = (measured(masks, maps, inside, pixels) for pixels in (maps.size, 0))
    for key in METRIC_KEYS_OF_PIXELS:
        true, found = METRICS[key].value(exact), METRICS[key].value(binned)
        bound = METRICS[key].bound(binned)  # type: ignore[misc]
        print(f"{key}: {true:.6f}, binned {found:.6f}, bound {bound:.1e}")
        assert abs(true - found) < 1e-4  # type: ignore[operator]


def test_a_set_that_outgrows_its_budget_is_as_one_that_was_binned_from_the_start() -> None:
    masks, maps, inside = blurred_set(1)
    begun_exact, binned = (measured(masks, maps, inside, pixels) for pixels in (maps.size // 2, 0))
    for group, bins in binned.bins.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(bins.normal, begun_exact.bins[group].normal)  # type: ignore[index]
        np.testing.assert_array_equal(bins.anomalous, begun_exact.bins[group].anomalous)  # type: ignore[index]
    for key in METRICS:
        assert METRICS[key].value(begun_exact) == pytest.approx(METRICS[key].value(binned), abs=1e-12)


def test_parts_join_in_order_to_the_whole() -> None:
    masks, maps, inside = blurred_set(2)
    parts = []
    for chosen in (slice(0, 5), slice(5, 12)):
        gathered = Gathered(0)
        for number, mask in enumerate(masks[chosen], start=chosen.start):
            gathered.add(int(mask.any()), f"kind {number % 2}", float(number), maps[number], mask, None)
        parts.append(gathered.part())
    whole, one = joined(parts, 1.0, []), measured(masks, maps, inside, 0)
    assert whole.measured.scores.tolist() == list(range(12))
    assert METRICS["aupro_0.3"].value(whole.measured) == pytest.approx(METRICS["aupro_0.3"].value(one), abs=1e-12)
    assert whole.types == ("kind 0", "kind 1") * 6


def test_maps_that_were_not_kept_are_refused_and_not_empty() -> None:
    masks, maps, inside = blurred_set(3)
    binned = measured(masks, maps, inside, 0)
    with pytest.raises(DataError, match=r"the set is too large for its maps to be kept.*--exact-megapixels"):
        len(binned.maps)
    with pytest.raises(DataError, match="counted in bins"):
        binned.masks[0]


def test_an_image_without_a_mask_is_not_counted() -> None:
    gathered = Gathered(0)
    gathered.add(1, "crack", 1.0, np.ones((3, 3), np.float32), None, None)
    assert gathered.labelled(1.0, [""]).measured.curve is None


def test_bins_refuse_what_the_exact_metrics_refuse() -> None:
    scores = np.ones((3, 3), np.float32)
    with pytest.raises(DataError, match=r"image 7: mask \(3, 2\) and map \(3, 3\)"):
        PixelBins.of_image(np.zeros((3, 2), bool), scores, name="image 7")
    with pytest.raises(DataError, match="NaN or infinite"):
        PixelBins.of_image(np.zeros((3, 3), bool), scores * np.inf)
    with pytest.raises(DataError, match="no normal pixel in any mask"):
        PixelBins.of_image(np.ones((3, 3), bool), scores).curve()


@given(st.floats(1e-12, 1.0))
def test_a_bound_is_told_rounded_up_to_one_digit(bound: float) -> None:
    told = float(within(bound).removeprefix("±"))
    assert bound * (1 - 1e-6) <= told <= 2.001 * bound
    assert within(0.0) == "±0"
