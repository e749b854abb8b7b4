"""Updating a bundle without training gives the result of a fresh density pass with the same network; misuse is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_set import NUM_TRAIN, ingest_parts, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.bundle.recalibrate import calibrate_for_site
from focus_ray.bundle.update import update_bundle
from focus_ray.cli.main import main
from focus_ray.data.read import decode_rows, read_index
from focus_ray.density.base import Statistics
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.passes import compute_statistics
from focus_ray.fitting.split import plan_category, short_hash
from focus_ray.ingestion.ingest import ingest
from focus_ray.samples.write import write_samples

NUM_MORE = 6
KINDS = {"gaussian": {"kind": "gaussian"}, "nearest": {"kind": "nearest"}, "part": {"kind": "nearest", "per_place": 5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def added_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data set with six other normal images of each category."""
    return ingest_more(tmp_path_factory.mktemp("added_data"), seed=1)


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data set with six further normal images of each category, for calibration."""
    return ingest_more(tmp_path_factory.mktemp("more_data"), seed=2)


def ingest_more(folder: Path, seed: int) -> str:
    write_samples(folder / "images", seed=seed, size_px=64, num_train=NUM_MORE, num_test_good=1, num_bad_per_type=0)
    ingest(folder / "images", folder / "data", progress=False)
    return str(folder / "data")


@pytest.fixture(scope="module")
def bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind of density -> a bundle of the category gear."""
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: make(data, folder / kind, kind) for kind in KINDS}


def make(data: str, place: Path, kind: str, seed: int = 0, method: str = "split", **density: Any) -> str:
    config = small_config(
        data,
        "unused",
        density={**KINDS[kind], **density},
        model={"image_alignment": {"group": "none"}},
        train={"seed": seed},
        calibration={"method": method},
    )
    plan = plan_category(config, "gear")
    return make_bundle(config, place=place, fingerprint=plan.fingerprint, fit_hashes=plan.fit_hashes.tolist())


def normal_rows(uri: str) -> list[int]:
    return [int(row) for row in read_index(uri, "gear", split="train")["row"].to_pylist()]


def images_of(uri: str, rows: list[int]) -> list[Tensor]:
    return [torch.from_numpy(batch) for batch in decode_rows(uri, "gear", rows, 64)]


def fresh_statistics(place: str, images: list[Tensor]) -> Statistics:
    """Computes the statistics of images in a single pass with the bundle's network."""
    bundle = read_bundle(place)
    positions = range(10_000) if bundle.config.density.kind == "nearest" else None
    return compute_statistics(bundle.detector.net, bundle.detector.reduction, images, torch.device("cpu"), positions)


def fit_images(place: str, data: str) -> list[Tensor]:
    return images_of(data, plan_category(read_bundle(place).config, "gear").fit_rows)


def assert_is_fresh(place: str, images: list[Tensor], data: str) -> None:
    """Asserts that a bundle has the moments of exactly these images, and the scores of a fresh density."""
    expected, actual = fresh_statistics(place, images), read_statistics(place)
    assert actual.moments.count == sum(map(len, images))
    assert_same_moments(actual, expected)
    bundle = read_bundle(place)
    detector = build_detector(bundle.config, bundle.detector.net, bundle.detector.reduction, expected)
    test = torch.cat(images_of(data, read_index(data, "gear", split="test")["row"].to_pylist()))
    torch.testing.assert_close(bundle.detector(test).score, detector(test).score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_images_equals_fitting_with_them(
    bundles: dict[str, str], kind: str, data: str, added_data: str, tmp_path: Path
) -> None:
    manifest = update_bundle(bundles[kind], tmp_path / "new", add=added_data)
    new = str(tmp_path / "new")
    assert_is_fresh(new, fit_images(new, data) + images_of(added_data, normal_rows(added_data)), data)
    assert manifest["data"]["updates"] == [{"add": added_data, "num_images": NUM_MORE}]
    assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)
    assert manifest["sha256"] == read_manifest(new)["sha256"] != read_manifest(bundles[kind])["sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_removing_added_images_restores_the_density(
    bundles: dict[str, str], kind: str, data: str, added_data: str, tmp_path: Path
) -> None:
    update_bundle(bundles[kind], tmp_path / "with", add=added_data)
    update_bundle(tmp_path / "with", tmp_path / "without", remove=added_data)
    new = str(tmp_path / "without")
    assert_is_fresh(new, fit_images(new, data), data)
    assert [set(change) for change in read_manifest(new)["data"]["updates"]] == [
        {"add", "num_images"},
        {"remove", "num_images"},
    ]
    bank = read_statistics(new).bank
    assert (bank is None) == (kind == "gaussian")
    if bank is not None:
        assert torch.equal(bank, read_statistics(bundles[kind]).bank)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_an_update_may_be_the_bundle_itself(
    bundles: dict[str, str], kind: str, data: str, added_data: str, tmp_path: Path
) -> None:
    place = make(data, tmp_path / "bundle", kind)
    update_bundle(place, place, add=added_data)
    assert_is_fresh(place, fit_images(place, data) + images_of(added_data, normal_rows(added_data)), data)
    assert len(list(Path(place).glob("*.safetensors"))) == 3


@pytest.fixture(scope="module")
def sites(
    bundles: dict[str, str], added_data: str, more_data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Kind of density -> bundles of two other sites, with their own images and the network of the first bundle."""
    folder = tmp_path_factory.mktemp("sites")
    site_bundles: dict[str, list[str]] = {}
    for kind in KINDS:
        site_bundles[kind] = [str(folder / f"{kind}-{number}") for number in range(2)]
        for place, data, other in zip(
            site_bundles[kind], (added_data, more_data), (more_data, added_data), strict=True
        ):
            update_bundle(bundles[kind], place, only=data, calibrate=other if kind == "gaussian" else None)
    return site_bundles


def hashes_of(uri: str) -> set[int]:
    index = read_index(uri, "gear", split="train")
    return {short_hash(content_hash) for content_hash in index["content_hash"].to_pylist()}


def assert_same_moments(statistics: Statistics, expected: Statistics, tolerance: float = 1e-5) -> None:
    assert statistics.moments.count == expected.moments.count
    for name in ("mean", "scatter"):
        value, expected_value = getattr(statistics.moments, name), getattr(expected.moments, name)
        assert (value - expected_value).norm() <= tolerance * expected_value.norm()


def embedding_bytes(statistics: Statistics) -> set[bytes]:
    """Returns the bytes of each image's embeddings, which must differ between images."""
    assert statistics.bank is not None
    embeddings = {row.numpy().tobytes() for row in statistics.bank}
    assert len(embeddings) == len(statistics.bank)
    return embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_bundle_has_only_its_own_images_and_the_network_of_the_first(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, added_data: str, data: str
) -> None:
    site = sites[kind][0]
    assert_is_fresh(site, images_of(added_data, normal_rows(added_data)), data)
    bundle, start = read_bundle(site), read_manifest(bundles[kind])
    assert bundle.fit_hashes == hashes_of(added_data)
    assert bundle.manifest["files"]["network"] == start["files"]["network"]
    assert (bundle.manifest["data"]["network_of"], bundle.config.data.uri) == (start["sha256"], added_data)
    assert "updates" not in bundle.manifest["data"]
    expected = ("split", NUM_MORE) if kind == "gaussian" else ("leave_one_out", NUM_MORE)
    assert (bundle.calibration.method, bundle.calibration.num_images) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_joining_sites_equals_fitting_with_the_images_of_all_sites(
    bundles: dict[str, str],
    sites: dict[str, list[str]],
    kind: str,
    data: str,
    added_data: str,
    more_data: str,
    tmp_path: Path,
) -> None:
    start, joined = bundles[kind], str(tmp_path / "joined")
    manifest = update_bundle(start, joined, join=sites[kind], calibrate=None if kind == "nearest" else data)
    images = (
        fit_images(start, data)
        + images_of(added_data, normal_rows(added_data))
        + images_of(more_data, normal_rows(more_data))
    )
    assert_is_fresh(joined, images, data)
    assert read_bundle(joined).fit_hashes == read_bundle(start).fit_hashes | hashes_of(added_data) | hashes_of(
        more_data
    )
    assert manifest["data"]["updates"] == [
        {"join": site, "version": read_manifest(site)["sha256"], "num_images": NUM_MORE} for site in sites[kind]
    ]
    if kind == "nearest":
        banks = [statistics.bank for statistics in (read_statistics(joined), fresh_statistics(start, images))]
        torch.testing.assert_close(*banks, rtol=1e-2, atol=1e-2)  # float16, and the batches of the convolutions differ
        site_embeddings = [embedding_bytes(read_statistics(place)) for place in (start, *sites[kind])]
        assert embedding_bytes(read_statistics(joined)) == set.union(*site_embeddings)
        assert manifest["calibration"]["method"] == "leave_one_out"
    else:  # the holdout images of the bundle's data set
        assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_joining_does_not_matter(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, data: str, tmp_path: Path
) -> None:
    first, second = [bundles[kind], *sites[kind]], [*reversed(sites[kind]), bundles[kind]]
    for name, (start, *joined) in (("one", first), ("two", second)):
        update_bundle(start, tmp_path / name, join=joined, calibrate=data)
    statistics, reordered = (read_statistics(tmp_path / name) for name in ("one", "two"))
    assert_same_moments(statistics, reordered)
    assert read_bundle(tmp_path / "one").fit_hashes == read_bundle(tmp_path / "two").fit_hashes
    if kind == "nearest":
        assert embedding_bytes(statistics) == embedding_bytes(reordered)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_not_joined_twice(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, data: str, tmp_path: Path
) -> None:
    site, joined = sites[kind][0], tmp_path / "joined"
    update_bundle(bundles[kind], joined, join=site, calibrate=data)
    for bundle, join in ((joined, [site]), (bundles[kind], [site, site]), (site, [site])):
        with pytest.raises(DataError, match=f"{site}: all of its {NUM_MORE} images"):
            update_bundle(bundle, tmp_path / "new", join=join, calibrate=data)
    assert not (tmp_path / "new").exists()


def test_images_that_two_bundles_share_count_once(
    bundles: dict[str, str], sites: dict[str, list[str]], data: str, added_data: str, more_data: str, tmp_path: Path
) -> None:
    """Two sites added their images to the same bundle instead of making bundles of their own."""
    start = bundles["nearest"]
    for name, source in (("one", added_data), ("two", more_data)):
        update_bundle(start, tmp_path / name, add=source)
    messages: list[str] = []
    manifest = update_bundle(tmp_path / "one", tmp_path / "both", join=tmp_path / "two", log=messages.append)
    update_bundle(start, tmp_path / "expected", join=sites["nearest"])
    both, expected = (read_statistics(tmp_path / name) for name in ("both", "expected"))
    assert embedding_bytes(both) == embedding_bytes(expected)
    assert_same_moments(both, expected, tolerance=2e-3)  # shared images are subtracted with embeddings in float16
    num_shared = len(read_bundle(start).fit_hashes)
    assert manifest["data"]["updates"][-1]["left_out"] == num_shared
    (message,) = messages
    assert message.startswith(f"join {tmp_path / 'two'}: {num_shared} images")


def test_an_image_that_two_sites_added_independently_counts_once(
    bundles: dict[str, str], added_data: str, more_data: str, tmp_path: Path
) -> None:
    """The two embeddings of such an image differ by rounding."""
    for name, source in (("one", added_data), ("two", more_data)):
        update_bundle(bundles["nearest"], tmp_path / name, only=source)
    update_bundle(tmp_path / "two", tmp_path / "two", add=added_data)
    bundle, statistics = read_bundle(tmp_path / "two"), read_statistics(tmp_path / "two")
    assert statistics.bank is not None
    statistics.bank = statistics.bank * 1.001
    write_bundle(
        tmp_path / "two",
        config=bundle.config,
        category="gear",
        detector=bundle.detector,
        statistics=statistics,
        calibration=bundle.calibration,
        data=bundle.manifest["data"],
        metrics={},
        fit_hashes=sorted(bundle.fit_hashes),
    )
    manifest = update_bundle(tmp_path / "one", tmp_path / "both", join=tmp_path / "two")
    assert manifest["data"]["updates"][-1]["left_out"] == NUM_MORE
    assert read_statistics(tmp_path / "both").num_images == 2 * NUM_MORE


def test_shared_images_without_stored_embeddings_are_refused(
    bundles: dict[str, str], data: str, added_data: str, more_data: str, tmp_path: Path
) -> None:
    for name, source in (("one", added_data), ("two", more_data)):
        update_bundle(bundles["gaussian"], tmp_path / name, add=source, calibrate=data)
    with pytest.raises(BundleError, match=r"19 of its images .* only 0 of their embeddings"):
        update_bundle(tmp_path / "one", tmp_path / "new", join=tmp_path / "two", calibrate=data)
    start = make(data, tmp_path / "few", "nearest", method="leave_one_out", max_images=8)
    for name, source in (("three", added_data), ("four", more_data)):
        update_bundle(start, tmp_path / name, add=source)
    with pytest.raises(BundleError, match=r"24 of its images .* only \d+ of their embeddings.*--only DATA"):
        update_bundle(tmp_path / "three", tmp_path / "new", join=tmp_path / "four")


def test_bundles_without_image_hashes_are_not_joined(
    bundles: dict[str, str], sites: dict[str, list[str]], data: str, tmp_path: Path
) -> None:
    bundle = read_bundle(bundles["nearest"])
    without_hashes = make_bundle(bundle.config, place=tmp_path / "without_hashes")
    for start, joined, name in (
        (sites["nearest"][0], without_hashes, "without_hashes"),
        (without_hashes, sites["nearest"][0], "the bundle to be"),
    ):
        with pytest.raises(BundleError, match=f"{name}.*no hashes.*--only DATA"):
            update_bundle(start, tmp_path / "new", join=joined)


def test_images_in_the_density_are_not_added_again(
    bundles: dict[str, str], data: str, added_data: str, tmp_path: Path
) -> None:
    update_bundle(bundles["gaussian"], tmp_path / "with", add=added_data, calibrate=data)
    with pytest.raises(DataError, match=f"all of its {NUM_MORE} normal images"):
        update_bundle(tmp_path / "with", tmp_path / "new", add=added_data)
    manifest = update_bundle(bundles["nearest"], tmp_path / "new", add=data, calibrate=added_data)
    num_holdout = round(0.2 * NUM_TRAIN)
    assert manifest["data"]["updates"] == [
        {"add": data, "num_images": num_holdout, "left_out": NUM_TRAIN - num_holdout}
    ]
    assert manifest["data"]["num_fit"] == NUM_TRAIN
    assert read_bundle(tmp_path / "new").fit_hashes == hashes_of(data)


def test_images_that_the_density_lacks_are_not_removed(
    bundles: dict[str, str], added_data: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"none of its {NUM_MORE} normal images"):
        update_bundle(bundles["gaussian"], tmp_path / "new", remove=added_data)


def test_images_in_the_density_do_not_calibrate_it(
    bundles: dict[str, str], data: str, added_data: str, tmp_path: Path
) -> None:
    manifest = update_bundle(bundles["gaussian"], tmp_path / "new", add=added_data, calibrate=data)
    assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)
    with pytest.raises(DataError, match=f"all of its {NUM_MORE} normal images are in the density"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=added_data, calibrate=added_data)


def test_an_update_keeps_the_hashes_of_training_images(
    bundles: dict[str, str], data: str, added_data: str, tmp_path: Path
) -> None:
    update_bundle(bundles["nearest"], tmp_path / "with", add=added_data)
    assert read_bundle(tmp_path / "with").fit_hashes == read_bundle(bundles["nearest"]).fit_hashes | hashes_of(
        added_data
    )
    update_bundle(tmp_path / "with", tmp_path / "without", remove=added_data)
    assert read_bundle(tmp_path / "without").fit_hashes == read_bundle(bundles["nearest"]).fit_hashes


def test_one_site_of_a_joined_bundle_sets_its_thresholds_and_nothing_else(
    bundles: dict[str, str], sites: dict[str, list[str]], tmp_path: Path
) -> None:
    joined = str(tmp_path / "joined")
    before = update_bundle(bundles["nearest"], joined, join=sites["nearest"])
    for number, site in enumerate(sites["nearest"]):
        recalibration = calibrate_for_site(joined, tmp_path / f"for-{number}", site)
        after = read_manifest(tmp_path / f"for-{number}")
        assert {key for key in after if after[key] != before[key]} == {"calibration", "data", "sha256"}
        assert after["data"]["calibrations"][-1]["site"] == read_manifest(site)["sha256"]
        assert recalibration.calibration.num_images == NUM_MORE
        assert set(recalibration.calibration.image_scores) <= set(read_bundle(joined).calibration.image_scores)
    first, second = (read_bundle(tmp_path / f"for-{number}").calibration for number in (0, 1))
    assert first.image_threshold != second.image_threshold
    wide = calibrate_for_site(joined, tmp_path / "wide", sites["nearest"][0], target_fpr=0.4)
    assert (wide.calibration.target_fpr, wide.calibration.image_scores) == (0.4, first.image_scores)


def test_a_metric_learnt_from_few_calibration_images_gives_a_warning(
    data: str, added_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, site, joined = (
        make(data, tmp_path / "start", "nearest", reduction="discriminant"),
        tmp_path / "b",
        tmp_path / "j",
    )
    update_bundle(start, site, only=added_data)
    update_bundle(start, joined, join=site)
    assert calibrate_for_site(joined, tmp_path / "new", start).is_metric_biased
    assert not calibrate_for_site(joined, tmp_path / "new", site).is_metric_biased
    assert main(["calibrate", str(joined), str(tmp_path / "new"), "--site", start]) == 0
    assert "the metric was learnt from these few images" in capsys.readouterr().err


def test_a_site_that_was_not_joined_sets_no_thresholds(
    bundles: dict[str, str], sites: dict[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"--join .*gaussian|--join .*nearest"):
        calibrate_for_site(bundles["nearest"], tmp_path / "new", sites["nearest"][0])
    with pytest.raises(DataError, match="kind gaussian does not support leave-one-out"):
        calibrate_for_site(bundles["gaussian"], tmp_path / "new", sites["gaussian"][0])
    assert not (tmp_path / "new").exists()


def test_an_update_sets_new_thresholds(bundles: dict[str, str], added_data: str, tmp_path: Path) -> None:
    update_bundle(bundles["nearest"], tmp_path / "new", add=added_data)
    assert read_bundle(tmp_path / "new").calibration != read_bundle(bundles["nearest"]).calibration


def test_a_bundle_of_another_network_is_not_joined(bundles: dict[str, str], data: str, tmp_path: Path) -> None:
    other_network = make(data, tmp_path / "other", "nearest", seed=1)
    with pytest.raises(BundleError, match=r"other: .*network"):
        update_bundle(bundles["nearest"], tmp_path / "new", join=other_network)
    assert not (tmp_path / "new").exists()


def test_changed_data_needs_images_to_calibrate_with(added_data: str, more_data: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "images", seed=3, size_px=64, num_train=10, num_test_good=1, num_bad_per_type=0)
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    place = make(str(tmp_path / "data"), tmp_path / "bundle", "gaussian")
    (tmp_path / "images" / "gear" / "train" / "good" / "000.png").unlink()
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    with pytest.raises(DataError, match=r"has changed since the bundle was made.*give --calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=added_data)
    assert (
        update_bundle(place, tmp_path / "new", add=added_data, calibrate=more_data)["data"]["num_holdout"] == NUM_MORE
    )


def test_missing_data_needs_images_to_calibrate_with(data: str, added_data: str, tmp_path: Path) -> None:
    bundle = read_bundle(make(data, tmp_path / "bundle", "gaussian"))
    missing_data = bundle.config.model_copy(update={"data": bundle.config.data.model_copy(update={"uri": "nowhere"})})
    write_bundle(
        tmp_path / "bundle",
        config=missing_data,
        category="gear",
        detector=bundle.detector,
        statistics=read_statistics(tmp_path / "bundle"),
        calibration=bundle.calibration,
        data=bundle.manifest["data"],
        metrics={},
    )
    with pytest.raises(DataError, match=r"held-out images cannot be read \(.*nowhere.*give --calibrate DATA"):
        update_bundle(tmp_path / "bundle", tmp_path / "new", add=added_data)


def test_a_cross_calibrated_bundle_needs_images_to_calibrate_with(data: str, added_data: str, tmp_path: Path) -> None:
    place = make(data, tmp_path / "bundle", "gaussian", method="cross")
    with pytest.raises(DataError, match=r"calibrated by 'cross' .*--calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=added_data)


@pytest.mark.parametrize("kind", KINDS)
def test_at_least_two_images_remain_in_the_density(
    bundles: dict[str, str], kind: str, data: str, tmp_path: Path
) -> None:
    num_fit = NUM_TRAIN - round(0.2 * NUM_TRAIN)
    with pytest.raises(DataError, match=f"{num_fit} of {num_fit} images .* at least 2"):
        update_bundle(bundles[kind], tmp_path / "new", remove=data)


def test_a_set_without_the_category_is_refused(bundles: dict[str, str], added_data: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "images", size_px=64, num_train=4, num_test_good=0, num_bad_per_type=0)
    ingest(tmp_path / "images", tmp_path / "boards", categories=["board"], progress=False)
    with pytest.raises(DataError, match="gear"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=str(tmp_path / "boards"))


def test_the_command_says_which_bundle_it_wrote(
    bundles: dict[str, str], added_data: str, more_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = str(tmp_path / "new")
    assert main(["update", bundles["gaussian"], new, "--add", added_data, "--calibrate", more_data]) == 0
    count = read_manifest(bundles["gaussian"])["moments"]["count"] + NUM_MORE
    assert capsys.readouterr().out == f"{new}\t{count} images\t{read_manifest(new)['sha256']}\n"


def test_the_command_without_a_change_exits_with_1(
    bundles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["update", bundles["gaussian"], str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "focus-ray: nothing to change: give --add, --remove, --join or --only\n"
    assert not (tmp_path / "new").exists()


def test_the_commands_of_several_sites(
    bundles: dict[str, str], added_data: str, more_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, joined, own = (str(tmp_path / name) for name in ("one", "two", "joined", "own"))
    assert main(["update", bundles["nearest"], one, "--only", added_data]) == 0
    assert main(["update", bundles["nearest"], two, "--only", more_data]) == 0
    assert main(["update", bundles["nearest"], joined, "--join", one, two]) == 0
    count = read_manifest(bundles["nearest"])["moments"]["count"] + 2 * NUM_MORE
    assert f"{joined}\t{count} images\t" in capsys.readouterr().out
    assert main(["calibrate", joined, own, "--site", one]) == 0
    captured = capsys.readouterr()
    assert f"calibrate: {joined} for the site of {one}" in captured.err
    assert read_manifest(own)["sha256"] in captured.out
    for arguments, message in (
        (["update", joined, own, "--only", added_data, "--add", more_data], "makes a bundle of these images alone"),
        (["update", joined, own, "--join", str(tmp_path / "gone")], "gone: no such file or folder"),
        (["update", joined, own, "--join", one], "nothing to join"),
        (["calibrate", joined, own, "--site", one, "--good", added_data], "give one of --good"),
        (["calibrate", joined, own, "--site", one, "--bad", added_data], "give --good, not --site"),
        (["calibrate", joined, own, "--site", str(tmp_path / "gone")], "gone: no such file or folder"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
