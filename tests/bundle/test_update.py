"""Updating a bundle without training gives the result of a fresh density pass with the same network; misuse is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_set import NUM_TRAIN, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.bundle.recalibrate import calibrate_for_site
from focus_ray.bundle.update import update_bundle
from focus_ray.cli.main import main
from focus_ray.data.read import decode_rows, read_index
from focus_ray.density.base import NormalStatistics
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.passes import compute_image_statistics
from focus_ray.fitting.split import compute_split_plan, shorten_hash
from focus_ray.ingestion.ingest import ingest
from focus_ray.samples.write import write_samples

NUM_MORE = 6
NUM_HOLDOUT = round(0.2 * NUM_TRAIN)
KINDS = {"gaussian": {"kind": "gaussian"}, "nearest": {"kind": "nearest"}, "part": {"kind": "nearest", "per_place": 5}}
each_kind = pytest.mark.parametrize("kind", KINDS)
Bundles = dict[str, str]
Sites = dict[str, list[str]]


def ingest_good(folder: Path, seed: int, num_train: int = NUM_MORE) -> str:
    write_samples(folder / "images", seed=seed, size_px=64, num_train=num_train, num_test_good=1, num_bad_per_type=0)
    ingest(folder / "images", folder / "data", progress=False)
    return str(folder / "data")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two data sets, each with six other normal images of each category."""
    first, second = (ingest_good(tmp_path_factory.mktemp("set"), seed) for seed in (1, 2))
    return first, second


def make(data: str, place: Path, kind: str, seed: int = 0, method: str = "split", **density: Any) -> str:
    sections = {"train": {"seed": seed}, "calibration": {"method": method}}
    config = small_config(data, "unused", density={**KINDS[kind], **density}, **sections)
    plan = compute_split_plan(config, "gear")
    return make_bundle(config, place=place, fingerprint=plan.fingerprint, fit_hashes=plan.fit_hashes.tolist())


@pytest.fixture(scope="module")
def bundles(parts: str, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Kind of density -> a bundle of the category gear."""
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: make(parts, folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def sites(bundles: Bundles, sets: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Sites:
    """Kind of density -> bundles of two other sites, with their own images and the network of the first bundle."""
    folder = tmp_path_factory.mktemp("sites")
    places = {kind: [str(folder / f"{kind}-{number}") for number in range(2)] for kind in KINDS}
    for kind, (first, second) in places.items():
        for place, data, other in ((first, *sets), (second, *sets[::-1])):
            update_bundle(bundles[kind], place, only=data, calibrate=other if kind == "gaussian" else None)
    return places


def rewrite(place: Path | str, config: Any = None, bank_factor: float = 1.0) -> None:
    """Writes a bundle again, with another configuration or with a changed bank."""
    bundle, statistics = read_bundle(place), read_statistics(place)
    if statistics.bank is not None:
        statistics.bank = statistics.bank * bank_factor
    write_bundle(
        place,
        config=config or bundle.config,
        category="gear",
        detector=bundle.detector,
        statistics=statistics,
        calibration=bundle.calibration,
        data=bundle.manifest["data"],
        metrics={},
        fit_hashes=sorted(bundle.fit_hashes),
    )


def images_of(uri: str, rows: Any = None) -> list[Tensor]:
    """Returns images of gear in batches. rows: None: all training images, which are all normal."""
    rows = read_index(uri, "gear", split="train")["row"].to_pylist() if rows is None else rows
    return [torch.from_numpy(batch) for batch in decode_rows(uri, "gear", rows, 64)]


def fit_images(place: str, data: str) -> list[Tensor]:
    return images_of(data, compute_split_plan(read_bundle(place).config, "gear").fit.rows)


def hashes_of(uri: str) -> set[int]:
    return {shorten_hash(text) for text in read_index(uri, "gear", split="train")["content_hash"].to_pylist()}


def fresh_statistics(place: str, images: list[Tensor]) -> NormalStatistics:
    """Computes the statistics of images in a single pass with the bundle's network."""
    bundle = read_bundle(place)
    positions = range(10_000) if bundle.config.density.kind == "nearest" else None
    return compute_image_statistics(
        bundle.detector.net, bundle.detector.reduction, images, torch.device("cpu"), positions
    )


def assert_same_moments(statistics: NormalStatistics, expected: NormalStatistics, tolerance: float = 1e-5) -> None:
    assert statistics.moments.count == expected.moments.count
    for name in ("mean", "scatter"):
        value, expected_value = getattr(statistics.moments, name), getattr(expected.moments, name)
        assert (value - expected_value).norm() <= tolerance * expected_value.norm()


def assert_is_fresh(place: str, images: list[Tensor], data: str) -> None:
    """Asserts that a bundle has the moments of exactly these images, and the scores of a fresh density."""
    expected = fresh_statistics(place, images)
    assert_same_moments(read_statistics(place), expected)
    assert expected.moments.count == sum(map(len, images))
    bundle = read_bundle(place)
    detector = build_detector(bundle.config, bundle.detector.net, bundle.detector.reduction, expected)
    test = torch.cat(images_of(data, read_index(data, "gear", split="test")["row"].to_pylist()))
    torch.testing.assert_close(bundle.detector(test).score, detector(test).score, rtol=1e-3, atol=1e-3)


def embedding_bytes(place: Path | str) -> set[bytes]:
    """Returns the bytes of each image's embeddings, which must differ between images."""
    bank = read_statistics(place).bank
    assert bank is not None
    embeddings = {row.numpy().tobytes() for row in bank}
    assert len(embeddings) == len(bank)
    return embeddings


@each_kind
def test_adding_equals_fitting_with_the_images_and_removing_restores_the_density(
    bundles: Bundles, kind: str, parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    place, start = str(tmp_path / "bundle"), read_bundle(bundles[kind])
    shutil.copytree(bundles[kind], place)
    manifest = update_bundle(place, place, add=sets[0])  # the output may be the bundle itself
    assert_is_fresh(place, fit_images(place, parts) + images_of(sets[0]), parts)
    assert (manifest["sha256"], manifest["data"]["num_holdout"]) == (read_manifest(place)["sha256"], NUM_HOLDOUT)
    bundle = read_bundle(place)
    assert bundle.fit_hashes == start.fit_hashes | hashes_of(sets[0])
    assert bundle.calibration != start.calibration
    update_bundle(place, place, remove=sets[0])
    assert_is_fresh(place, fit_images(place, parts), parts)
    assert read_bundle(place).fit_hashes == start.fit_hashes
    changes = [{"add": sets[0], "num_images": NUM_MORE}, {"remove": sets[0], "num_images": NUM_MORE}]
    assert read_manifest(place)["data"]["updates"] == changes
    assert len(list(Path(place).glob("*.safetensors"))) == 3
    if kind != "gaussian":
        assert embedding_bytes(place) == embedding_bytes(bundles[kind])


@each_kind
def test_a_site_bundle_has_only_its_own_images_and_the_network_of_the_first(
    bundles: Bundles, sites: Sites, kind: str, sets: tuple[str, str], parts: str
) -> None:
    site = sites[kind][0]
    assert_is_fresh(site, images_of(sets[0]), parts)
    bundle, start = read_bundle(site), read_manifest(bundles[kind])
    assert bundle.fit_hashes == hashes_of(sets[0])
    assert bundle.manifest["files"]["network"] == start["files"]["network"]
    assert (bundle.manifest["data"]["network_of"], bundle.config.data.uri) == (start["sha256"], sets[0])
    assert "updates" not in bundle.manifest["data"]
    method = "split" if kind == "gaussian" else "leave_one_out"
    assert (bundle.calibration.method, bundle.calibration.num_images) == (method, NUM_MORE)


@each_kind
def test_joining_sites_in_any_order_equals_fitting_with_the_images_of_all_sites(
    bundles: Bundles, sites: Sites, kind: str, parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    start, joined, reordered = bundles[kind], str(tmp_path / "joined"), str(tmp_path / "reordered")
    calibrate = parts if kind == "gaussian" else None
    manifest = update_bundle(start, joined, join=sites[kind], calibrate=calibrate)
    images = fit_images(start, parts) + images_of(sets[0]) + images_of(sets[1])
    assert_is_fresh(joined, images, parts)
    hashes = read_bundle(start).fit_hashes | hashes_of(sets[0]) | hashes_of(sets[1])
    assert read_bundle(joined).fit_hashes == hashes
    assert manifest["data"]["updates"] == [
        {"join": site, "version": read_manifest(site)["sha256"], "num_images": NUM_MORE} for site in sites[kind]
    ]
    first_site, last_site = sites[kind]
    update_bundle(last_site, reordered, join=[first_site, start], calibrate=parts)
    assert_same_moments(read_statistics(joined), read_statistics(reordered))
    assert read_bundle(reordered).fit_hashes == hashes
    if kind == "gaussian":
        assert manifest["data"]["num_holdout"] == NUM_HOLDOUT
        return
    banks = [statistics.bank for statistics in (read_statistics(joined), fresh_statistics(start, images))]
    torch.testing.assert_close(*banks, rtol=1e-2, atol=1e-2)  # float16, and the batches of the convolutions differ
    assert embedding_bytes(joined) == embedding_bytes(reordered)
    assert embedding_bytes(joined) == set.union(*map(embedding_bytes, (start, *sites[kind])))
    assert manifest["calibration"]["method"] == "leave_one_out"


@each_kind
def test_a_bundle_is_not_joined_twice(bundles: Bundles, sites: Sites, kind: str, parts: str, tmp_path: Path) -> None:
    site, joined = sites[kind][0], tmp_path / "joined"
    update_bundle(bundles[kind], joined, join=site, calibrate=parts)
    for bundle, join in ((joined, [site]), (bundles[kind], [site, site]), (site, [site])):
        with pytest.raises(DataError, match=f"{site}: all of its {NUM_MORE} images"):
            update_bundle(bundle, tmp_path / "new", join=join, calibrate=parts)
    assert not (tmp_path / "new").exists()


def test_images_that_two_bundles_share_count_once(
    bundles: Bundles, sites: Sites, sets: tuple[str, str], tmp_path: Path
) -> None:
    """Two sites added their images to the same bundle instead of making bundles of their own."""
    start = bundles["nearest"]
    first, second, union, expected = (tmp_path / name for name in ("first", "second", "union", "expected"))
    update_bundle(start, first, add=sets[0])
    update_bundle(start, second, add=sets[1])
    messages: list[str] = []
    manifest = update_bundle(first, union, join=second, log=messages.append)
    update_bundle(start, expected, join=sites["nearest"])
    assert embedding_bytes(union) == embedding_bytes(expected)
    # shared images are subtracted with embeddings in float16
    assert_same_moments(read_statistics(union), read_statistics(expected), tolerance=2e-3)
    num_shared = len(read_bundle(start).fit_hashes)
    assert manifest["data"]["updates"][-1]["left_out"] == num_shared
    assert [message.partition(" image")[0] for message in messages] == [f"join {second}: {num_shared}"]


def test_an_image_that_two_sites_added_independently_counts_once(
    bundles: Bundles, sets: tuple[str, str], tmp_path: Path
) -> None:
    """The two embeddings of such an image differ by rounding."""
    for name, data in zip(("one", "two"), sets, strict=True):
        update_bundle(bundles["nearest"], tmp_path / name, only=data)
    update_bundle(tmp_path / "two", tmp_path / "two", add=sets[0])
    rewrite(tmp_path / "two", bank_factor=1.001)
    manifest = update_bundle(tmp_path / "one", tmp_path / "both", join=tmp_path / "two")
    assert manifest["data"]["updates"][-1]["left_out"] == NUM_MORE
    assert read_statistics(tmp_path / "both").num_images == 2 * NUM_MORE


@pytest.mark.parametrize(("kind", "message"), [("gaussian", r"19 .* only 0 "), ("nearest", r"24 .* only \d+ .*--only")])
def test_shared_images_without_stored_embeddings_are_refused(
    kind: str, message: str, parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    density = {} if kind == "gaussian" else {"method": "leave_one_out", "max_images": 8}
    start = make(parts, tmp_path / "start", kind, **density)
    calibrate = parts if kind == "gaussian" else None
    for name, data in zip(("one", "two"), sets, strict=True):
        update_bundle(start, tmp_path / name, add=data, calibrate=calibrate)
    with pytest.raises(BundleError, match=message):
        update_bundle(tmp_path / "one", tmp_path / "new", join=tmp_path / "two", calibrate=calibrate)


def test_bundles_without_image_hashes_are_not_joined(bundles: Bundles, sites: Sites, tmp_path: Path) -> None:
    unhashed, site = (
        make_bundle(read_bundle(bundles["nearest"]).config, place=tmp_path / "unhashed"),
        sites["nearest"][0],
    )
    for start, joined, name in ((site, unhashed, "unhashed"), (unhashed, site, "the bundle to be")):
        with pytest.raises(BundleError, match=f"{name}.*no hashes.*--only DATA"):
            update_bundle(start, tmp_path / "new", join=joined)


def test_images_in_the_density_are_not_added_again(
    bundles: Bundles, parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    manifest = update_bundle(bundles["nearest"], tmp_path / "new", add=parts, calibrate=sets[0])
    change = {"add": parts, "num_images": NUM_HOLDOUT, "left_out": NUM_TRAIN - NUM_HOLDOUT}
    assert (manifest["data"]["updates"], manifest["data"]["num_fit"]) == ([change], NUM_TRAIN)
    assert read_bundle(tmp_path / "new").fit_hashes == hashes_of(parts)
    with pytest.raises(DataError, match=f"all of its {NUM_TRAIN} normal images"):
        update_bundle(tmp_path / "new", tmp_path / "newer", add=parts, calibrate=sets[0])


def test_images_in_the_density_do_not_calibrate_it(
    bundles: Bundles, parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    manifest = update_bundle(bundles["gaussian"], tmp_path / "new", add=sets[0], calibrate=parts)
    assert manifest["data"]["num_holdout"] == NUM_HOLDOUT
    with pytest.raises(DataError, match=f"all of its {NUM_MORE} normal images are in the density"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=sets[0], calibrate=sets[0])


@each_kind
def test_at_least_two_images_remain_in_the_density(bundles: Bundles, kind: str, parts: str, tmp_path: Path) -> None:
    num_fit = NUM_TRAIN - NUM_HOLDOUT
    with pytest.raises(DataError, match=f"{num_fit} of {num_fit} images .* at least 2"):
        update_bundle(bundles[kind], tmp_path / "new", remove=parts)


def test_images_that_the_density_lacks_are_not_removed(bundles: Bundles, sets: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"none of its {NUM_MORE} normal images"):
        update_bundle(bundles["gaussian"], tmp_path / "new", remove=sets[0])


def test_a_bundle_of_another_network_is_not_joined(bundles: Bundles, parts: str, tmp_path: Path) -> None:
    other = make(parts, tmp_path / "other", "nearest", seed=1)
    with pytest.raises(BundleError, match=r"other: .*network"):
        update_bundle(bundles["nearest"], tmp_path / "new", join=other)
    assert not (tmp_path / "new").exists()


def test_one_site_of_a_joined_bundle_sets_its_thresholds_and_nothing_else(
    bundles: Bundles, sites: Sites, tmp_path: Path
) -> None:
    joined = str(tmp_path / "joined")
    before = update_bundle(bundles["nearest"], joined, join=sites["nearest"])
    calibrations = []
    for number, site in enumerate(sites["nearest"]):
        place = tmp_path / f"for-{number}"
        calibrations.append(calibrate_for_site(joined, place, site).calibration)
        after = read_manifest(place)
        assert {key for key in after if after[key] != before[key]} == {"calibration", "data", "sha256"}
        assert after["data"]["calibrations"][-1]["site"] == read_manifest(site)["sha256"]
        assert read_bundle(place).calibration == calibrations[-1]
        assert set(calibrations[-1].image_scores) <= set(read_bundle(joined).calibration.image_scores)
    assert [calibration.num_images for calibration in calibrations] == [NUM_MORE] * 2
    assert calibrations[0].image_threshold != calibrations[1].image_threshold
    wide = calibrate_for_site(joined, tmp_path / "wide", sites["nearest"][0], target_fpr=0.4).calibration
    assert (wide.target_fpr, wide.image_scores) == (0.4, calibrations[0].image_scores)


def test_a_metric_learnt_from_few_calibration_images_gives_a_warning(
    parts: str, sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = make(parts, tmp_path / "start", "nearest", reduction="discriminant")
    site, joined, new = (str(tmp_path / name) for name in ("site", "joined", "new"))
    update_bundle(start, site, only=sets[0])
    update_bundle(start, joined, join=site)
    assert not calibrate_for_site(joined, new, site).is_metric_biased
    assert main(["calibrate", joined, new, "--site", start]) == 0
    assert "the metric was learnt from these few images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"), [("nearest", "--join .*nearest"), ("gaussian", "kind gaussian .* leave-one-out")]
)
def test_a_site_that_was_not_joined_sets_no_thresholds(
    kind: str, message: str, bundles: Bundles, sites: Sites, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        calibrate_for_site(bundles[kind], tmp_path / "new", sites[kind][0])
    assert not (tmp_path / "new").exists()


def test_changed_data_needs_images_to_calibrate_with(sets: tuple[str, str], tmp_path: Path) -> None:
    place = make(ingest_good(tmp_path, seed=3, num_train=10), tmp_path / "bundle", "gaussian")
    (tmp_path / "images/gear/train/good/000.png").unlink()
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    with pytest.raises(DataError, match=r"has changed .*--calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=sets[0])
    manifest = update_bundle(place, tmp_path / "new", add=sets[0], calibrate=sets[1])
    assert manifest["data"]["num_holdout"] == NUM_MORE


def test_missing_data_needs_images_to_calibrate_with(bundles: Bundles, sets: tuple[str, str], tmp_path: Path) -> None:
    place = shutil.copytree(bundles["gaussian"], tmp_path / "bundle")
    config = read_bundle(place).config
    rewrite(place, config.model_copy(update={"data": config.data.model_copy(update={"uri": "nowhere"})}))
    with pytest.raises(DataError, match=r"nowhere.*--calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=sets[0])


def test_a_cross_calibrated_bundle_needs_images_to_calibrate_with(
    parts: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    place = make(parts, tmp_path / "bundle", "gaussian", method="cross")
    with pytest.raises(DataError, match=r"'cross' .*--calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=sets[0])


def test_a_set_without_the_category_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    write_samples(tmp_path / "images", size_px=64, num_train=4, num_test_good=0, num_bad_per_type=0)
    ingest(tmp_path / "images", tmp_path / "boards", categories=["board"], progress=False)
    with pytest.raises(DataError, match="gear"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=str(tmp_path / "boards"))


def test_the_commands_of_several_sites(
    bundles: Bundles, sets: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = bundles["nearest"]
    first, second, joined, new = (str(tmp_path / name) for name in ("first", "second", "joined", "new"))
    assert main(["update", start, first, "--only", sets[0]]) == 0
    assert main(["update", start, second, "--only", sets[1]]) == 0
    capsys.readouterr()
    assert main(["update", start, joined, "--join", first, second]) == 0
    count = read_manifest(start)["moments"]["count"] + 2 * NUM_MORE
    assert capsys.readouterr().out == f"{joined}\t{count} images\t{read_manifest(joined)['sha256']}\n"
    assert main(["calibrate", joined, new, "--site", first]) == 0
    captured = capsys.readouterr()
    assert f"calibrate: {joined} for the site of {first}" in captured.err
    assert read_manifest(new)["sha256"] in captured.out
    for arguments, message in (
        (["update", start, new], "nothing to change"),
        (["update", joined, new, "--only", sets[1], "--add", sets[1]], "makes a bundle of these images alone"),
        (["update", joined, new, "--join", str(tmp_path / "gone")], "gone: no such file or folder"),
        (["update", joined, new, "--join", first], "nothing to join"),
        (["calibrate", joined, new, "--site", first, "--good", sets[0]], "give one of --good"),
        (["calibrate", joined, new, "--site", first, "--bad", sets[0]], "give --good, not --site"),
        (["calibrate", joined, new, "--site", str(tmp_path / "gone")], "gone: no such file or folder"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
