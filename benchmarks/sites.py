"""Several sites, one model: accuracy of bundles that were joined, and false alarm rates at each site before and after its own
thresholds.

    python -m benchmarks.sites --data ROOT [ROOT ...] --weights resnet18.pth [--sites 2 3] [--categories bottle screw]

Good images of a category, of its training and its test images alike, are dealt out at random: a part, the same at all sites, is
kept to measure with, and the others are shared out evenly over the sites. Each site has a camera of its own, by `--cameras alike`
the same, by `--cameras differ` those of `CAMERAS`. The first site fits; the others make bundles of their own images with its
network (`update --only`), and all are joined (`update --join`). Beside it a fit of all images together, the first site's alone
and each other site's own. Every site then sees all images that were kept, and the defects, through its camera.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.harness import add_arguments, make_base_settings, merge_settings, open_data, print_table, save_json
from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.recalibrate import calibrate_bundle, calibrate_for_site
from focus_ray.bundle.update import update_bundle
from focus_ray.data.images import decode_batch, encode_png
from focus_ray.data.read import TEST_COLUMNS, read_index, read_rows
from focus_ray.data.schema import Row
from focus_ray.detect.calibration import Calibration
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.split import compute_split_rule
from focus_ray.ingestion.ingest import ingest
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS
from focus_ray.seeds import derive_seed
from focus_ray.training.category import fit_category, get_bundle_uri

Pixels = NDArray[np.uint8]
MOST_FIT, MOST_GOOD, MOST_BAD = 180, 60, 60  # good images that fit and that are kept, at most, and defects
MAP_PX = 256  # maps are compared at this, at most
KEPT = 0.3  # of the good images, to measure with


def _keep_image(image: NDArray[np.float64], noise: np.random.Generator) -> NDArray[np.float64]:
    return image


def _brighten_image(image: NDArray[np.float64], noise: np.random.Generator) -> NDArray[np.float64]:
    """More contrast by 15 %, lighter by 10 of 255, a little warmer."""
    return (image - 128) * np.array([1.18, 1.15, 1.12]) + 138


def _blur_image(image: NDArray[np.float64], noise: np.random.Generator) -> NDArray[np.float64]:
    """Out of focus by one pixel, darker by 10 of 255, with noise of 3."""
    return gaussian_filter(image, (1, 1, 0)) - 10 + noise.normal(0, 3, image.shape)


CAMERAS: tuple[Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]], ...] = (
    _keep_image,
    _brighten_image,
    _blur_image,
)


def simulate_site_photograph(record: Row, camera: int, size_px: int, seed: int) -> bytes:
    """An image of `size_px` a side as a site's camera gives it, the same every time."""
    pixels: NDArray[np.float64] = decode_batch([record["image"]], size_px)[0].astype(np.float64)
    noise = np.random.default_rng(derive_seed(seed, "camera", camera, zlib.crc32(str(record["id"]).encode())))
    made: Pixels = CAMERAS[camera](pixels, noise).round().clip(0, 255).astype(np.uint8)
    return encode_png(made)


def deal_images(count: int, num_sites: int, seed: int) -> tuple[list[int], list[list[int]]]:
    """Numbers of the good images that are kept, the same for any number of sites, and of those of each site."""
    order = np.random.default_rng(derive_seed(seed, "sites")).permutation(count).tolist()
    num_kept = min(MOST_GOOD, round(KEPT * count))
    rest = order[num_kept:][:MOST_FIT]
    return order[:num_kept], [sorted(rest[site::num_sites]) for site in range(num_sites)]


def ingest_images(images: Sequence[tuple[str, bytes]], category: str, folder: Path, site: str) -> str:
    """A data set of these good images, by name. Returns: its root."""
    good = folder / category / "good"
    good.mkdir(parents=True)
    for name, image in images:
        (good / f"{name}.png").write_bytes(image)
    ingest(folder / category, folder / "data", site=site, progress=False)
    return str(folder / "data")


def fit_bundle(config: Config, category: str, place: Path) -> str:
    """The bundle of a category, fitted."""
    fit_category(config, compute_split_rule(config, category), str(place), print)
    return get_bundle_uri(str(place), category)


def score_site_images(place: str, records: Sequence[Row]) -> tuple[ScoredTestImages, dict[str, Any]]:
    """Scores of a site's images, and how well they rank."""
    measured = Inspector.load(place).score_labelled_images([dict(record) for record in records], MAP_PX).measured
    return measured, {
        "image_auroc": METRICS["image_auroc"].value(measured),
        "aupro": METRICS["aupro_0.3"].value(measured),
    }


def measure_verdict_rates(place: str, measured: ScoredTestImages) -> dict[str, Any]:
    """Shares above the thresholds of a bundle, of scores that its tensors gave."""
    calibration = Calibration.from_dict(read_manifest(place)["calibration"])
    above, bad = calibration.is_anomalous(measured.scores), measured.labels > 0
    return {
        "fpr": float(above[~bad].mean()),
        "recall": float(above[bad].mean()),
        "threshold": calibration.image_threshold,
        "calibrating": calibration.num_images,
    }


def run_deal(
    tree: dict[str, Any], category: str, num_sites: int, differ: bool, seed: int, root: Path
) -> Iterator[dict[str, Any]]:
    """One deal: a sample a model, thresholds and site."""
    config = parse_config(merge_settings(tree, {"train": {"seed": seed}}))
    uri, size = config.data.uri, config.model.image_size_px
    index = read_index(uri, category)
    labels = index["label"].to_numpy()
    rows = index["row"].to_numpy()
    good = list(read_rows(uri, category, rows[labels == 0], columns=TEST_COLUMNS))
    bad_rows = rows[(labels == 1) & (np.array(index["split"].to_pylist()) == "test")]
    bad = list(read_rows(uri, category, bad_rows[:: max(1, -(-len(bad_rows) // MOST_BAD))], columns=TEST_COLUMNS))
    kept, parts = deal_images(len(good), num_sites, seed)
    cameras = list(range(num_sites)) if differ else [0] * num_sites
    names = [chr(ord("A") + site) for site in range(num_sites)]
    taken = [
        [
            (f"{names[site]}-{number:04}", simulate_site_photograph(good[number], cameras[site], size, seed))
            for number in part
        ]
        for site, part in enumerate(parts)
    ]
    data = [ingest_images(images, category, root / name, name) for images, name in zip(taken, names, strict=True)]
    everything = ingest_images([one for images in taken for one in images], category, root / "all", "all")

    def read_bundle_sample(uri: str) -> Config:
        return config.model_copy(update={"data": config.data.model_copy(update={"uri": uri})})

    together = fit_bundle(read_bundle_sample(everything), category, root / "together")
    first = fit_bundle(read_bundle_sample(data[0]), category, root / "first")
    bundles = [first]
    for name, one in zip(names[1:], data[1:], strict=True):
        bundles.append(str(root / f"bundle-{name}"))
        update_bundle(first, bundles[-1], only=one)
    joined = str(root / "joined")
    update_bundle(first, joined, join=bundles[1:])
    for site, name in enumerate(names):
        models = {"all together": together, "first site's": first, "joined": joined}
        if site:
            models["site's own"] = bundles[site]
        if site and not differ:
            break  # sites that are alike have the same test images
        records = [
            {**record, "image": simulate_site_photograph(record, cameras[site], size, seed)}
            for record in [*(good[number] for number in kept), *bad]
        ]
        about = {"category": category, "sites": num_sites, "cameras": "differ" if differ else "alike", "site": name}
        about |= {"seed": seed, "good": len(kept), "bad": len(bad), "fit_at_site": len(parts[site])}
        for model, place in models.items():
            measured, ranked = score_site_images(place, records)
            own = str(root / f"{model} at {name}")
            by = {"its own": place}
            if model == "joined":
                calibrate_for_site(place, own, bundles[site])
                by["the site's"] = own
            elif model == "first site's" and site:
                calibrate_bundle(place, own, sorted((root / name / category / "good").iterdir()))
                by["the site's"] = own
            for thresholds, calibrated in by.items():
                yield {
                    **about,
                    "model": model,
                    "thresholds": thresholds,
                    **ranked,
                    **measure_verdict_rates(calibrated, measured),
                }


def make_table(samples: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A row a category, number of sites, cameras, model and thresholds: means over the sites."""
    keys = ("category", "sites", "cameras", "model", "thresholds")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[key] for key in keys), []).append(sample)
    rows: list[list[Any]] = []
    for name, group in groups.items():
        auroc, aupro = ([s[key] for s in group if s[key] is not None] for key in ("image_auroc", "aupro"))
        rates = " ".join(f"{s['site']} {s['fpr']:.2f}" for s in group)
        recalls = " ".join(f"{s['recall']:.2f}" for s in group)
        rows.append(
            [
                *name,
                float(np.mean(auroc)) if auroc else None,
                float(np.mean(aupro)) if aupro else None,
                rates,
                recalls,
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--sites", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--cameras", nargs="+", choices=("alike", "differ"), default=["alike", "differ"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--output", help="JSON Lines: a line a sample, as it is there; deals that are there are not run again"
    )
    arguments = parser.parse_args()
    if max(arguments.sites) > len(CAMERAS) or min(arguments.sites) < 2:
        parser.error(f"--sites {arguments.sites}: 2 to {len(CAMERAS)}, so many cameras there are")
    samples: list[dict[str, Any]] = []
    if arguments.output and Path(arguments.output).is_file():
        samples = [json.loads(line) for line in Path(arguments.output).read_text().splitlines()]
    done = {(s["category"], s["sites"], s["cameras"], s["seed"]) for s in samples}
    sets = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/sites-{number}"})
        if arguments.categories and any(Path(root).glob("category=*")):
            there = {path.name.removeprefix("category=") for path in Path(root).glob("category=*")}
            one.categories = [name for name in arguments.categories if name in there] or None
        uri, categories = open_data(one)
        sets += [(uri, name) for name in categories if arguments.categories is None or name in arguments.categories]
    for seed in arguments.seeds:
        for uri, category in sets:
            for num_sites in arguments.sites:
                for cameras in arguments.cameras:
                    if (category, num_sites, cameras, seed) in done:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        found = list(
                            run_deal(
                                make_base_settings(arguments, uri),
                                category,
                                num_sites,
                                cameras == "differ",
                                seed,
                                Path(folder),
                            )
                        )
                    samples += found
                    if arguments.output:
                        with Path(arguments.output).open("a") as sink:
                            sink.writelines(json.dumps(sample) + "\n" for sample in found)
                    for sample in found:
                        print(json.dumps(sample), flush=True)
    print()
    header = ("category", "sites", "cameras", "model", "thresholds", "image AUROC", "AUPRO", "FPR by site", "recall")
    print_table(header, make_table(samples))
    print()
    save_json("sites", arguments, samples)


if __name__ == "__main__":
    main()
