"""Updates of a bundle without training equal a fresh density pass of the same network; misuse is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_set import NUM_TRAIN, ingest_parts, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.bundle.update import update_bundle
from focus_ray.cli.main import main
from focus_ray.data.ingest import ingest
from focus_ray.data.read import decoded_rows, read_index
from focus_ray.data.split import plan_category
from focus_ray.density.base import Statistics
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.passes import statistics_pass
from focus_ray.samples.write import write_samples

NUM_MORE = 6
KINDS = {"gaussian": {"kind": "gaussian"}, "nearest": {"kind": "nearest"}, "part": {"kind": "nearest", "per_place": 5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six other normal images a category."""
    return ingest_more(tmp_path_factory.mktemp("more"), seed=1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    """And six more, to calibrate with."""
    return ingest_more(tmp_path_factory.mktemp("others"), seed=2)


def ingest_more(folder: Path, seed: int) -> str:
    write_samples(folder / "images", seed=seed, size_px=64, num_train=NUM_MORE, num_test_good=1, num_bad_per_type=0)
    ingest(folder / "images", folder / "data", progress=False)
    return str(folder / "data")


@pytest.fixture(scope="module")
def bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind of density -> a bundle of the gears."""
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: make(data, folder / kind, kind) for kind in KINDS}


def make(data: str, place: Path, kind: str, seed: int = 0, method: str = "split") -> str:
    config = small_config(
        data,
        "unused",
        density=KINDS[kind],
        model={"image_alignment": {"group": "none"}},
        train={"seed": seed},
        calibration={"method": method},
    )
    return make_bundle(config, place=place, fingerprint=plan_category(config, "gear").fingerprint)


def normal_rows(uri: str) -> list[int]:
    return [int(row) for row in read_index(uri, "gear", split="train")["row"].to_pylist()]


def images_of(uri: str, rows: list[int]) -> list[Tensor]:
    return [torch.from_numpy(batch) for batch in decoded_rows(uri, "gear", rows, 64)]


def fresh_statistics(place: str, images: list[Tensor]) -> Statistics:
    """One pass of the bundle's network over the images."""
    bundle = read_bundle(place)
    positions = range(10_000) if bundle.config.density.kind == "nearest" else None
    return statistics_pass(bundle.detector.net, bundle.detector.reduction, images, torch.device("cpu"), positions)


def fit_images(place: str, data: str) -> list[Tensor]:
    return images_of(data, plan_category(read_bundle(place).config, "gear").fit_rows)


def assert_is_fresh(place: str, images: list[Tensor], data: str) -> None:
    """The bundle holds the moments of exactly these images, and scores the test images as their density does."""
    expected, found = fresh_statistics(place, images), read_statistics(place)
    assert found.moments.count == expected.moments.count == sum(map(len, images))
    for mine, theirs in (
        (found.moments.mean, expected.moments.mean),
        (found.moments.scatter, expected.moments.scatter),
    ):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    bundle = read_bundle(place)
    detector = build_detector(bundle.config, bundle.detector.net, bundle.detector.reduction, expected)
    test = torch.cat(images_of(data, read_index(data, "gear", split="test")["row"].to_pylist()))
    torch.testing.assert_close(bundle.detector(test).score, detector(test).score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_images_taken_in_count_as_if_they_had_been_there(
    bundles: dict[str, str], kind: str, data: str, more: str, tmp_path: Path
) -> None:
    manifest = update_bundle(bundles[kind], tmp_path / "new", add=more)
    new = str(tmp_path / "new")
    assert_is_fresh(new, fit_images(new, data) + images_of(more, normal_rows(more)), data)
    assert manifest["data"]["updates"] == [{"add": more, "num_images": NUM_MORE}]
    assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)
    assert manifest["sha256"] == read_manifest(new)["sha256"] != read_manifest(bundles[kind])["sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_taken_out_again_leave_no_trace(
    bundles: dict[str, str], kind: str, data: str, more: str, tmp_path: Path
) -> None:
    update_bundle(bundles[kind], tmp_path / "with", add=more)
    update_bundle(tmp_path / "with", tmp_path / "without", remove=more)
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
def test_a_bundle_may_be_updated_in_place(
    bundles: dict[str, str], kind: str, data: str, more: str, tmp_path: Path
) -> None:
    place = make(data, tmp_path / "bundle", kind)
    update_bundle(place, place, add=more)
    assert_is_fresh(place, fit_images(place, data) + images_of(more, normal_rows(more)), data)
    assert len(list(Path(place).glob("*.safetensors"))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_two_sites_of_one_network_join(
    bundles: dict[str, str], kind: str, data: str, more: str, others: str, tmp_path: Path
) -> None:
    """One site adds its images; the other holds only its own, and the two are joined."""
    start = bundles[kind]
    site, joined = str(tmp_path / "site"), str(tmp_path / "joined")
    bundle = read_bundle(start)
    own = images_of(more, normal_rows(more))
    statistics = fresh_statistics(start, own)
    write_bundle(
        site,
        config=bundle.config,
        category="gear",
        detector=build_detector(bundle.config, bundle.detector.net, bundle.detector.reduction, statistics),
        statistics=statistics,
        calibration=bundle.calibration,
        data=bundle.manifest["data"],
        metrics={},
    )
    manifest = update_bundle(start, joined, join=site, calibrate=others)
    assert_is_fresh(joined, fit_images(start, data) + own, data)
    assert manifest["data"]["updates"] == [{"join": site, "version": read_manifest(site)["sha256"]}]
    assert manifest["data"]["num_holdout"] == NUM_MORE


def test_thresholds_are_set_anew(bundles: dict[str, str], more: str, tmp_path: Path) -> None:
    update_bundle(bundles["nearest"], tmp_path / "new", add=more)
    assert read_bundle(tmp_path / "new").calibration != read_bundle(bundles["nearest"]).calibration


def test_a_bundle_of_another_network_is_not_joined(bundles: dict[str, str], data: str, tmp_path: Path) -> None:
    stranger = make(data, tmp_path / "stranger", "nearest", seed=1)
    with pytest.raises(BundleError, match="another category or network than the bundle it is to join"):
        update_bundle(bundles["nearest"], tmp_path / "new", join=stranger)
    assert not (tmp_path / "new").exists()


def test_changed_data_needs_images_to_calibrate_with(more: str, others: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "images", seed=3, size_px=64, num_train=10, num_test_good=1, num_bad_per_type=0)
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    place = make(str(tmp_path / "data"), tmp_path / "bundle", "gaussian")
    (tmp_path / "images" / "gear" / "train" / "good" / "000.png").unlink()
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    with pytest.raises(DataError, match=r"has changed since the bundle was made.*give --calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=more)
    assert update_bundle(place, tmp_path / "new", add=more, calibrate=others)["data"]["num_holdout"] == NUM_MORE


def test_data_that_is_gone_needs_images_to_calibrate_with(data: str, more: str, tmp_path: Path) -> None:
    bundle = read_bundle(make(data, tmp_path / "bundle", "gaussian"))
    gone = bundle.config.model_copy(update={"data": bundle.config.data.model_copy(update={"uri": "nowhere"})})
    write_bundle(
        tmp_path / "bundle",
        config=gone,
        category="gear",
        detector=bundle.detector,
        statistics=read_statistics(tmp_path / "bundle"),
        calibration=bundle.calibration,
        data=bundle.manifest["data"],
        metrics={},
    )
    with pytest.raises(DataError, match=r"held-out images cannot be read \(.*nowhere.*give --calibrate DATA"):
        update_bundle(tmp_path / "bundle", tmp_path / "new", add=more)


def test_a_cross_calibrated_bundle_needs_images_to_calibrate_with(data: str, more: str, tmp_path: Path) -> None:
    place = make(data, tmp_path / "bundle", "gaussian", method="cross")
    with pytest.raises(DataError, match="calibrated by 'cross' and holds no images out: give --calibrate DATA"):
        update_bundle(place, tmp_path / "new", add=more)


@pytest.mark.parametrize("kind", KINDS)
def test_more_images_than_there_are_cannot_be_taken_out(
    bundles: dict[str, str], kind: str, data: str, tmp_path: Path
) -> None:
    kept = NUM_TRAIN - round(0.2 * NUM_TRAIN)
    with pytest.raises(DataError, match=f"{NUM_TRAIN} images to take out of {kept}; at least 2 must remain"):
        update_bundle(bundles[kind], tmp_path / "new", remove=data)


def test_a_set_without_the_category_is_refused(bundles: dict[str, str], more: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "images", size_px=64, num_train=4, num_test_good=0, num_bad_per_type=0)
    ingest(tmp_path / "images", tmp_path / "boards", categories=["board"], progress=False)
    with pytest.raises(DataError, match="gear"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=str(tmp_path / "boards"))


def test_the_command_says_which_bundle_it_wrote(
    bundles: dict[str, str], more: str, others: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = str(tmp_path / "new")
    assert main(["update", bundles["gaussian"], new, "--add", more, "--calibrate", others]) == 0
    count = read_manifest(bundles["gaussian"])["moments"]["count"] + NUM_MORE
    assert capsys.readouterr().out == f"{new}\t{count} images\t{read_manifest(new)['sha256']}\n"


def test_the_command_without_a_change_exits_with_1(
    bundles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["update", bundles["gaussian"], str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "focus-ray: nothing to change: give --add, --remove or --join\n"
    assert not (tmp_path / "new").exists()
