"""Updates of a bundle without training equal a fresh density pass of the same network; misuse is refused."""

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
from focus_ray.data.ingest import ingest
from focus_ray.data.read import decode_rows, read_index
from focus_ray.data.split import plan_category, short_hash
from focus_ray.density.base import Statistics
from focus_ray.errors import BundleError, DataError
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.passes import compute_statistics
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
    return make_bundle(config, place=place, fingerprint=plan.fingerprint, known=plan.fit_hashes.tolist())


def normal_rows(uri: str) -> list[int]:
    return [int(row) for row in read_index(uri, "gear", split="train")["row"].to_pylist()]


def images_of(uri: str, rows: list[int]) -> list[Tensor]:
    return [torch.from_numpy(batch) for batch in decode_rows(uri, "gear", rows, 64)]


def fresh_statistics(place: str, images: list[Tensor]) -> Statistics:
    """One pass of the bundle's network over the images."""
    bundle = read_bundle(place)
    positions = range(10_000) if bundle.config.density.kind == "nearest" else None
    return compute_statistics(bundle.detector.net, bundle.detector.reduction, images, torch.device("cpu"), positions)


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


@pytest.fixture(scope="module")
def sites(
    bundles: dict[str, str], more: str, others: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Kind of density -> bundles of two other sites' own images, under the network of the first."""
    folder = tmp_path_factory.mktemp("sites")
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        found[kind] = [str(folder / f"{kind}-{number}") for number in range(2)]
        for place, data, other in zip(found[kind], (more, others), (others, more), strict=True):
            update_bundle(bundles[kind], place, only=data, calibrate=other if kind == "gaussian" else None)
    return found


def known_of(uri: str) -> set[int]:
    index = read_index(uri, "gear", split="train")
    return {short_hash(one) for one in index["content_hash"].to_pylist()}


def assert_same_moments(found: Statistics, expected: Statistics, tolerance: float = 1e-5) -> None:
    assert found.moments.count == expected.moments.count
    for name in ("mean", "scatter"):
        mine, theirs = getattr(found.moments, name), getattr(expected.moments, name)
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def as_set(statistics: Statistics) -> set[bytes]:
    assert statistics.bank is not None
    found = {row.numpy().tobytes() for row in statistics.bank}
    assert len(found) == len(statistics.bank)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_has_its_own_images_alone_under_the_network_of_another(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, more: str, data: str
) -> None:
    site = sites[kind][0]
    assert_is_fresh(site, images_of(more, normal_rows(more)), data)
    bundle, start = read_bundle(site), read_manifest(bundles[kind])
    assert bundle.known == known_of(more)
    assert bundle.manifest["files"]["network"] == start["files"]["network"]
    assert (bundle.manifest["data"]["network_of"], bundle.config.data.uri) == (start["sha256"], more)
    assert "updates" not in bundle.manifest["data"]
    expected = ("split", NUM_MORE) if kind == "gaussian" else ("leave_one_out", NUM_MORE)
    assert (bundle.calibration.method, bundle.calibration.num_images) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_one_network_join_to_what_all_their_images_give(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, data: str, more: str, others: str, tmp_path: Path
) -> None:
    start, joined = bundles[kind], str(tmp_path / "joined")
    manifest = update_bundle(start, joined, join=sites[kind], calibrate=None if kind == "nearest" else data)
    images = fit_images(start, data) + images_of(more, normal_rows(more)) + images_of(others, normal_rows(others))
    assert_is_fresh(joined, images, data)
    assert read_bundle(joined).known == read_bundle(start).known | known_of(more) | known_of(others)
    assert manifest["data"]["updates"] == [
        {"join": site, "version": read_manifest(site)["sha256"], "num_images": NUM_MORE} for site in sites[kind]
    ]
    if kind == "nearest":
        banks = [statistics.bank for statistics in (read_statistics(joined), fresh_statistics(start, images))]
        torch.testing.assert_close(*banks, rtol=1e-2, atol=1e-2)  # float16, and convolutions of other batches
        own = [as_set(read_statistics(place)) for place in (start, *sites[kind])]
        assert as_set(read_statistics(joined)) == set.union(*own)
        assert manifest["calibration"]["method"] == "leave_one_out"
    else:  # of the data set, the images that the bundle held out
        assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_joining_does_not_matter(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, data: str, tmp_path: Path
) -> None:
    first, second = [bundles[kind], *sites[kind]], [*reversed(sites[kind]), bundles[kind]]
    for name, (start, *rest) in (("one", first), ("two", second)):
        update_bundle(start, tmp_path / name, join=rest, calibrate=data)
    one, two = (read_statistics(tmp_path / name) for name in ("one", "two"))
    assert_same_moments(one, two)
    assert read_bundle(tmp_path / "one").known == read_bundle(tmp_path / "two").known
    if kind == "nearest":
        assert as_set(one) == as_set(two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_not_joined_twice(
    bundles: dict[str, str], sites: dict[str, list[str]], kind: str, data: str, tmp_path: Path
) -> None:
    site, joined = sites[kind][0], tmp_path / "joined"
    update_bundle(bundles[kind], joined, join=site, calibrate=data)
    for twice, join in ((joined, [site]), (bundles[kind], [site, site]), (site, [site])):
        with pytest.raises(DataError, match=f"{site}: all of its {NUM_MORE} images are in the bundle already"):
            update_bundle(twice, tmp_path / "new", join=join, calibrate=data)
    assert not (tmp_path / "new").exists()


def test_images_that_two_bundles_share_count_once(
    bundles: dict[str, str], sites: dict[str, list[str]], data: str, more: str, others: str, tmp_path: Path
) -> None:
    """Two sites added their images to one bundle, in place of making their own."""
    start = bundles["nearest"]
    for name, source in (("one", more), ("two", others)):
        update_bundle(start, tmp_path / name, add=source)
    told: list[str] = []
    manifest = update_bundle(tmp_path / "one", tmp_path / "both", join=tmp_path / "two", log=told.append)
    update_bundle(start, tmp_path / "expected", join=sites["nearest"])
    both, expected = (read_statistics(tmp_path / name) for name in ("both", "expected"))
    assert as_set(both) == as_set(expected)
    assert_same_moments(both, expected, tolerance=2e-3)  # taken out by embeddings in float16
    shared = len(read_bundle(start).known)
    assert manifest["data"]["updates"][-1]["left_out"] == shared
    assert told == [f"join {tmp_path / 'two'}: {shared} of its images are in the bundle already, and left out"]


def test_an_image_that_two_sites_put_in_by_themselves_counts_once(
    bundles: dict[str, str], more: str, others: str, tmp_path: Path
) -> None:
    """Its embeddings are then equal to rounding only."""
    for name, source in (("one", more), ("two", others)):
        update_bundle(bundles["nearest"], tmp_path / name, only=source)
    update_bundle(tmp_path / "two", tmp_path / "two", add=more)
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
        known=sorted(bundle.known),
    )
    manifest = update_bundle(tmp_path / "one", tmp_path / "both", join=tmp_path / "two")
    assert manifest["data"]["updates"][-1]["left_out"] == NUM_MORE
    assert read_statistics(tmp_path / "both").num_images == 2 * NUM_MORE


def test_shared_images_that_cannot_be_taken_out_are_refused(
    bundles: dict[str, str], data: str, more: str, others: str, tmp_path: Path
) -> None:
    for name, source in (("one", more), ("two", others)):
        update_bundle(bundles["gaussian"], tmp_path / name, add=source, calibrate=data)
    with pytest.raises(
        BundleError, match="19 of its images are in the bundle already, and the embeddings of 0 of them"
    ):
        update_bundle(tmp_path / "one", tmp_path / "new", join=tmp_path / "two", calibrate=data)
    start = make(data, tmp_path / "few", "nearest", method="leave_one_out", max_images=8)
    for name, source in (("three", more), ("four", others)):
        update_bundle(start, tmp_path / name, add=source)
    with pytest.raises(
        BundleError, match=r"24 of its images are in .* embeddings of \d+ of them are kept.*--only DATA"
    ):
        update_bundle(tmp_path / "three", tmp_path / "new", join=tmp_path / "four")


def test_bundles_that_do_not_name_their_images_are_not_joined(
    bundles: dict[str, str], sites: dict[str, list[str]], data: str, tmp_path: Path
) -> None:
    bundle = read_bundle(bundles["nearest"])
    nameless = make_bundle(bundle.config, place=tmp_path / "nameless")
    for one, other, name in (
        (sites["nearest"][0], nameless, "nameless"),
        (nameless, sites["nearest"][0], "the bundle to be"),
    ):
        with pytest.raises(BundleError, match=f"{name}.*does not say which images it was made of.*--only DATA"):
            update_bundle(one, tmp_path / "new", join=other)


def test_images_that_are_in_already_are_not_taken_in_again(
    bundles: dict[str, str], data: str, more: str, tmp_path: Path
) -> None:
    update_bundle(bundles["gaussian"], tmp_path / "with", add=more, calibrate=data)
    with pytest.raises(
        DataError, match=f"all of its {NUM_MORE} normal images are in the bundle already: nothing to add"
    ):
        update_bundle(tmp_path / "with", tmp_path / "new", add=more)
    manifest = update_bundle(bundles["nearest"], tmp_path / "new", add=data, calibrate=more)
    held = round(0.2 * NUM_TRAIN)
    assert manifest["data"]["updates"] == [{"add": data, "num_images": held, "left_out": NUM_TRAIN - held}]
    assert manifest["data"]["num_fit"] == NUM_TRAIN
    assert read_bundle(tmp_path / "new").known == known_of(data)


def test_images_that_are_not_in_are_not_taken_out(bundles: dict[str, str], more: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"none of its {NUM_MORE} normal images is in the bundle: nothing to remove"):
        update_bundle(bundles["gaussian"], tmp_path / "new", remove=more)


def test_images_in_the_density_do_not_calibrate_it(
    bundles: dict[str, str], data: str, more: str, tmp_path: Path
) -> None:
    manifest = update_bundle(bundles["gaussian"], tmp_path / "new", add=more, calibrate=data)
    assert manifest["data"]["num_holdout"] == round(0.2 * NUM_TRAIN)
    with pytest.raises(DataError, match=f"all of its {NUM_MORE} normal images are in the density, and score near zero"):
        update_bundle(bundles["gaussian"], tmp_path / "new", add=more, calibrate=more)


def test_an_update_still_tells_training_images(bundles: dict[str, str], data: str, more: str, tmp_path: Path) -> None:
    update_bundle(bundles["nearest"], tmp_path / "with", add=more)
    assert read_bundle(tmp_path / "with").known == read_bundle(bundles["nearest"]).known | known_of(more)
    update_bundle(tmp_path / "with", tmp_path / "without", remove=more)
    assert read_bundle(tmp_path / "without").known == read_bundle(bundles["nearest"]).known


def test_one_site_of_a_joined_bundle_sets_its_thresholds_and_nothing_else(
    bundles: dict[str, str], sites: dict[str, list[str]], tmp_path: Path
) -> None:
    joined = str(tmp_path / "joined")
    before = update_bundle(bundles["nearest"], joined, join=sites["nearest"])
    for number, site in enumerate(sites["nearest"]):
        done = calibrate_for_site(joined, tmp_path / f"for-{number}", site)
        after = read_manifest(tmp_path / f"for-{number}")
        assert {key for key in after if after[key] != before[key]} == {"calibration", "data", "sha256"}
        assert after["data"]["calibrations"][-1]["site"] == read_manifest(site)["sha256"]
        assert done.calibration.num_images == NUM_MORE
        assert set(done.calibration.image_scores) <= set(read_bundle(joined).calibration.image_scores)
    first, second = (read_bundle(tmp_path / f"for-{number}").calibration for number in (0, 1))
    assert first.image_threshold != second.image_threshold
    wide = calibrate_for_site(joined, tmp_path / "wide", sites["nearest"][0], target_fpr=0.4)
    assert (wide.calibration.target_fpr, wide.calibration.image_scores) == (0.4, first.image_scores)


def test_few_images_that_taught_the_metric_are_told(
    data: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, site, joined = (
        make(data, tmp_path / "start", "nearest", reduction="discriminant"),
        tmp_path / "b",
        tmp_path / "j",
    )
    update_bundle(start, site, only=more)
    update_bundle(start, joined, join=site)
    assert calibrate_for_site(joined, tmp_path / "new", start).taught
    assert not calibrate_for_site(joined, tmp_path / "new", site).taught
    assert main(["calibrate", str(joined), str(tmp_path / "new"), "--site", start]) == 0
    assert "the metric was learnt from these few images" in capsys.readouterr().err


def test_a_site_that_was_not_joined_sets_no_thresholds(
    bundles: dict[str, str], sites: dict[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"holds none of the images of .*: join it first"):
        calibrate_for_site(bundles["nearest"], tmp_path / "new", sites["nearest"][0])
    with pytest.raises(DataError, match="a density of kind gaussian keeps no images to leave out"):
        calibrate_for_site(bundles["gaussian"], tmp_path / "new", sites["gaussian"][0])
    assert not (tmp_path / "new").exists()


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
    with pytest.raises(DataError, match=f"{kept} images to take out of {kept}; at least 2 must remain"):
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
    assert capsys.readouterr().err == "focus-ray: nothing to change: give --add, --remove, --join or --only\n"
    assert not (tmp_path / "new").exists()


def test_the_commands_of_several_sites(
    bundles: dict[str, str], more: str, others: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, joined, own = (str(tmp_path / name) for name in ("one", "two", "joined", "own"))
    assert main(["update", bundles["nearest"], one, "--only", more]) == 0
    assert main(["update", bundles["nearest"], two, "--only", others]) == 0
    assert main(["update", bundles["nearest"], joined, "--join", one, two]) == 0
    count = read_manifest(bundles["nearest"])["moments"]["count"] + 2 * NUM_MORE
    assert f"{joined}\t{count} images\t" in capsys.readouterr().out
    assert main(["calibrate", joined, own, "--site", one]) == 0
    told = capsys.readouterr()
    assert f"calibrate: {joined} for the site of {one}" in told.err
    assert read_manifest(own)["sha256"] in told.out
    for words, message in (
        (["update", joined, own, "--only", more, "--add", others], "makes a bundle of these images alone"),
        (["update", joined, own, "--join", str(tmp_path / "gone")], "gone: no such file or folder"),
        (["update", joined, own, "--join", one], "nothing to join"),
        (["calibrate", joined, own, "--site", one, "--good", more], "give one of --good"),
        (["calibrate", joined, own, "--site", one, "--bad", more], "give --good, not --site"),
        (["calibrate", joined, own, "--site", str(tmp_path / "gone")], "gone: no such file or folder"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
