"""focus_ray beside what a user would pick instead, on the same images and weights, in one run whose parts take turns.

    python -m benchmarks.peer --data MVTEC_CATEGORY --weights resnet18.pth [--repeats 3]

Each peer runs in an environment of its own, made with uv on first use (anomalib and ADEval, AnomaVision; about 8 GB). A repeat
runs all of them one after the other, each in a new process; figures are medians over repeats, ratios are to ours in the same
repeat. Use an idle machine: a peer's threads and ours are the same in number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, print_table, save_json
from focus_ray.data.importers.base import find_mask_files, list_image_files, list_subfolders

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = {
    "anomalib": ["anomalib==2.7.0", "adeval==1.1.0"],
    "anomavision": ["AnomaVision==3.6.2", "torch", "torchvision", "scikit-learn"],
}
# name -> environment (None: ours), script, method
PEERS = {
    "focus_ray default": (None, "ours", "default"),
    "focus_ray PaDiM": (None, "ours", "padim"),
    "anomalib PaDiM": ("anomalib", "anomalib_peer", "padim"),
    "anomalib PatchCore 1 %": ("anomalib", "anomalib_peer", "patchcore"),
    "AnomaVision PaDiM": ("anomavision", "anomavision_peer", "padim"),
}
COLUMNS = {
    "fit_s": "fit, s",
    "test_s": "test with AUROC, AUPRO, s",
    "one_ready_ms": "one image ready, ms",
    "one_file_ms": "from file, ms",
    "per_s_32": "images/s at 32",
    "memory_mb": "memory above imports, MB",
    "import_s": "import, s",
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO 0.3",
}


def list_category_images(folder: Path, work: Path) -> dict[str, Any]:
    """An MVTec-shaped category as lists of files, and as the flat folders that anomalib reads."""
    train = [str(path) for path in list_image_files(folder / "train" / "good")]
    good = [str(path) for path in list_image_files(folder / "test" / "good")]
    bad: list[str] = []
    masks: dict[str, str] = {}
    flat = {name: work / name for name in ("good", "bad", "masks")}
    for place in flat.values():
        place.mkdir(parents=True, exist_ok=True)
    for kind in list_subfolders(folder / "test"):
        for path in list_image_files(kind):
            if kind.name == "good":
                _link_file(path, flat["good"] / path.name)
                continue
            bad.append(str(path))
            _link_file(path, flat["bad"] / f"{kind.name}_{path.name}")
            found = find_mask_files(folder / "ground_truth" / kind.name, path.stem)
            if found:
                masks[str(path)] = str(found[0])
                _link_file(found[0], flat["masks"] / f"{kind.name}_{path.stem}{found[0].suffix}")
    folders = {
        "root": str(work),
        "train": str(folder / "train" / "good"),
        "good": "good",
        "bad": "bad",
        "masks": "masks",
    }
    return {"train": train, "good": good, "bad": bad, "masks": masks, "folders": folders}


def _link_file(source: Path, target: Path) -> None:
    if not target.exists():
        target.symlink_to(source.resolve())


def find_peer_python(environment_name: str | None, work: Path) -> str:
    """The interpreter of an environment, which is made if it is not there."""
    if environment_name is None:
        return sys.executable
    place = work / "environments" / environment_name
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        subprocess.run([sys.executable, "-m", "uv", "venv", "--quiet", "--clear", str(place)], check=True)
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--compile-bytecode",
            "--python",
            str(python),
        ]
        subprocess.run([*command, *ENVIRONMENTS[environment_name]], check=True)
        (place / ".ready").touch()
    return str(python)


def run_peer(peer: str, asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """One run of a peer. Raises: RuntimeError: it failed; with what it said last."""
    place, script, method = PEERS[peer]
    spec = work / f"{script}-{method}.json"
    spec.write_text(json.dumps({**asked, "method": method, "scratch": str(work / "scratch")}))
    command = [find_peer_python(place, work)]
    command += (
        ["-m", f"benchmarks.peers.{script}"] if place is None else [str(ROOT / "benchmarks/peers" / f"{script}.py")]
    )
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)  # as users run it: nobody's modules are compiled anew at each start
    done = subprocess.run([*command, str(spec)], capture_output=True, text=True, cwd=ROOT, env=settings)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{peer} failed ({done.returncode}): {done.stderr.strip()[-1500:]}")
    return {key: value for line in lines for key, value in json.loads(line).items()}


def compute_adeval_metrics(maps: Path, work: Path) -> dict[str, Any]:
    """Seconds and figures of ADEval, of the maps that ours wrote."""
    command = [find_peer_python("anomalib", work), str(ROOT / "benchmarks/peers/metrics_peer.py"), str(maps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_table(samples: dict[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """A row a peer: medians over repeats."""
    return [[peer, *(compute_median(runs, key) for key in COLUMNS)] for peer, runs in samples.items()]


def compute_median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(values) if values else None


def make_ratio_table(samples: dict[str, list[dict[str, Any]]], ours: str) -> list[list[Any]]:
    """A row a peer: ours over theirs, the median of the repeats' ratios; throughput the other way round."""
    rows: list[list[Any]] = []
    for peer, runs in samples.items():
        if peer == ours:
            continue
        row: list[Any] = [f"{ours} / {peer}"]
        for key in list(COLUMNS)[:7]:
            pairs = [(a[key], b[key]) for a, b in zip(samples[ours], runs, strict=False)]
            if key == "per_s_32":
                pairs = [(b, a) for a, b in pairs]
            row.append(statistics.median(a / b for a, b in pairs) if pairs else None)
        rows.append(row)
    return rows


def draw_chart(samples: dict[str, list[dict[str, Any]]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    keys = ("fit_s", "test_s", "one_ready_ms", "one_file_ms", "memory_mb")
    for number, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), number + 1)
        names = list(samples)[::-1]
        axes.barh(names, [compute_median(samples[name], key) or 0.0 for name in names], color="#3b6ea5")
        axes.set_title(COLUMNS[key], fontsize=9)
        axes.tick_params(labelsize=7, labelleft=number == 0)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a category's folder, in MVTec's shape")
    parser.add_argument("--weights", required=True, type=Path, help="ResNet-18's state dict, for all alike")
    parser.add_argument("--image-size-px", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--metrics", action=argparse.BooleanOptionalAction, default=True, help="also beside ADEval's")
    parser.add_argument("--work", type=Path, default=Path("scratch/peers"), help="for environments and links")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    asked = {
        **list_category_images(arguments.data.absolute(), work / "images"),
        "weights": str(arguments.weights.absolute()),
        "size_px": arguments.image_size_px,
        "singles": 20,
        "batches": 5,
    }
    metrics: list[dict[str, Any]] = []
    samples: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    for repeat in range(arguments.repeats):
        for peer in arguments.peers:
            first = peer == arguments.peers[0] and PEERS[peer][0] is None and arguments.metrics
            found = run_peer(peer, {**asked, "maps": str(work / "maps.npz")} if first else asked, work)
            if first:
                theirs = compute_adeval_metrics(work / "maps.npz", work)
                metrics.append({"ours_s": found["metrics_s"], "adeval_s": theirs["seconds"], **theirs})
            samples[peer].append(found)
            print(f"{repeat + 1}: {peer}: fit {found['fit_s']:.1f} s, one {found['one_ready_ms']:.0f} ms", flush=True)
    print()
    print_table(("", *COLUMNS.values()), make_table(samples))
    for ours in [peer for peer in arguments.peers if peer.startswith("focus_ray")]:
        print()
        print_table(("below 1: ours is better", *list(COLUMNS.values())[:7]), make_ratio_table(samples, ours))
    if metrics:
        ours, theirs = (statistics.median(run[key] for run in metrics) for key in ("ours_s", "adeval_s"))
        print(
            f"\npixel AUROC and AUPRO of the same maps: {ours:.3f} s, ADEval {theirs:.3f} s, {ours / theirs:.2f} of it"
        )
    print()
    save_json("peer", arguments, {"peers": samples, "metrics": metrics})
    draw_chart(samples, RESULTS / "peer.svg")


if __name__ == "__main__":
    main()
