"""Makes a folder in which the commands of the documents run: synthetic parts with the names of the pages, and tiny models.

The pages use S3 addresses and photographs. PLACES replaces them by files in the folder. Commands run inside the folder, so that
relative paths need no replacement.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import resnet18

from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main as focus_ray
from focus_ray.samples.write import write_samples
from focus_ray.serving.tokens import create_token

# beginning of a word on a page -> its replacement in the workspace; the longest matching beginning counts
PLACES = {
    "s3://plant/": "plant/",
    "s3://raw/parts": "mvtec",
    "/data/mvtec": "mvtec",
    "runs/line3": "plant/runs/line3",
    "BUNDLE": "plant/runs/line3/bundles/bolt",
    "OLD": "plant/runs/line3/bundles/bolt",
    "NEW_BUNDLE": "new_bundle",
    "SOURCE": "mvtec",
    "DATA": "plant/newparts",
    "FILE": "ids.txt",
}
# settings that are added to every training command: the standard network in a size that trains in seconds
TINY = (
    "model.image_size_px=64",
    "model.image_alignment.group=none",
    "model.image_alignment.method=congealing",
    "density.reduction=semi_orthogonal",  # no metric, because its synthetic defects are slow
    "density.num_channels=16",
    "density.coreset=32",
    "model.precision=fp32",
    "cluster.use_gpu=false",
)


def replace_place(word: str) -> str:
    """Replaces the address in a word of a command by its path in the workspace; also after the = of a setting."""
    key, equals, value = word.partition("=")
    if equals and not key.startswith("-"):
        return f"{key}={replace_place(value)}"
    for start in sorted(PLACES, key=len, reverse=True):
        is_complete_name = start.isupper() or not start.endswith("/")
        if word == start or (word.startswith(start) and (not is_complete_name or word[len(start)] == "/")):
            return PLACES[start] + word[len(start) :]
    return word


def make_workspace(folder: Path) -> Path:
    """Draws, ingests, trains and publishes the parts, and returns the folder."""
    parts = folder / "mvtec"
    write_samples(parts, size_px=64, num_train=20, num_test_good=4, num_bad_per_type=1)
    (parts / "board").rename(parts / "bolt")
    (parts / "gear").rename(parts / "screw")
    good, bad = sorted((parts / "bolt/train/good").iterdir()), sorted((parts / "bolt/test").glob("[!g]*/*.png"))
    for name in ("photographs", "bottle", "bolt", "labelled"):
        _copy_images(good[:12], folder / name / "good")
        _copy_images(bad[:2], folder / name / "bad")
    for name, share in (("more/bolt", good[:6]), ("lyon-photographs/bolt", good[6:12]), ("porto/bolt", good[12:])):
        _write_brighter_copies(share, folder / name / "good")
    _copy_images(good[12:], folder / "more/bolt/good")
    _copy_images(good[12:16], folder / "good")
    _write_views(good[:12], folder)
    _copy_images(bad, folder / "defects")
    _copy_images(sorted((parts / "bolt/test/good").iterdir()), folder / "good-parts")
    _copy_images(bad[:2], folder / "new")
    sources = {"new": bad[0], "good": good[13], "bad": bad[1], "part": bad[0], "a": bad[0], "b": good[14]}
    for name, source in sources.items():
        shutil.copy(source, folder / f"{name}.png")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    _run_command("ingest", parts, folder / "data")
    shutil.copytree(folder / "data", folder / "plant/parts")
    shutil.copytree(folder / "data", folder / "plant/today")
    _run_command("ingest", folder / "more/bolt", folder / "plant/newparts")
    _run_command("ingest", folder / "porto/bolt", folder / "porto-data")
    settings = [f"data.uri={folder / 'data'}", f"storage={folder / 'plant/runs'}", "name=line3"]
    settings += [f"model.weights={folder / 'resnet18.pth'}", *TINY, "density.reduction=discriminant"]
    _run_command("train", "default", *settings)
    bolt = folder / "plant/runs/line3/bundles/bolt"
    _run_command("update", bolt, folder / "B", "--only", folder / "plant/newparts")
    _run_command("update", bolt, folder / "C", "--only", folder / "porto-data")
    registry = Registry(folder / "plant/registry")
    for _ in range(2):
        registry.publish(str(bolt), "press", aliases=["production", "candidate"])
    token, _ = create_token(str(folder / "tokens.yaml"), "press", ["inspect", "read"])
    (folder / "token.txt").write_text(token)
    (folder / "ids.txt").write_text("bolt/train/good/000\n")
    (folder / "service.yaml").write_text("registry: plant/registry\ntokens: tokens.yaml\n")
    return folder


def _copy_images(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")


def _write_views(paths: list[Path], folder: Path) -> None:
    """Writes two views of six parts to views/good/part0_left.jpg with EXIF times, to boxes/good/part0/, and to parts.csv."""
    lines = ["file,serial"]
    for number, path in enumerate(paths):
        part, view = number // 2, ("left", "right")[number % 2]
        exif = Image.Exif()
        exif[0x0132] = f"2024:05:01 12:{part:02}:0{number % 2}"
        places = folder / f"views/good/part{part}_{view}.jpg", folder / f"boxes/good/part{part}/{view}.jpg"
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").save(place, quality=95, exif=exif)
        lines.append(f"{places[0].name},S{part}")
    (folder / "parts.csv").write_text("\n".join(lines) + "\n")


def _write_brighter_copies(paths: list[Path], folder: Path) -> None:
    """Writes slightly brighter copies of images, which differ from the images of all other folders."""
    folder.mkdir(parents=True)
    for path in paths:
        Image.open(path).convert("RGB").point(lambda value: min(255, value + 3)).save(folder / f"bright_{path.name}")


def _run_command(*words: object) -> None:
    status = focus_ray([str(word) for word in words])
    assert status == 0, f"focus-ray {words}: exit status {status}"
