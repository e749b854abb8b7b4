"""Hostile bundles: sizes, shapes and numbers that would exhaust memory are refused before any tensor is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from small_set import make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import MANIFEST, compute_manifest_hash, read_bundle, read_manifest, read_statistics
from focus_ray.errors import BundleError

MIB = 2**20
LIMIT = 256 * MIB


@pytest.fixture(scope="module")
def original(parts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    return make_bundle(small_config(parts, folder, scoring={"image_score": "profile"}))


@pytest.fixture
def bundle(original: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and updates its hash, as an attacker can."""
    manifest = read_manifest(bundle)
    change(manifest)
    manifest["sha256"] = compute_manifest_hash(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def replace_part(bundle: Path, part: str, content: bytes) -> None:
    """Replaces the content of a tensor file, and updates size and hashes in the manifest."""
    entry = read_manifest(bundle)["files"][part]
    (bundle / entry["name"]).write_bytes(content)
    changed = {**entry, "sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    change_manifest(bundle, lambda manifest: manifest["files"].update({part: changed}))


def part_bytes(bundle: Path, part: str) -> bytes:
    return (bundle / read_manifest(bundle)["files"][part]["name"]).read_bytes()


def change_tensors(bundle: Path, part: str, **tensors: Tensor) -> None:
    replace_part(bundle, part, save_tensors({**load_tensors(part_bytes(bundle, part)), **tensors}))


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def test_a_valid_bundle_is_read_within_the_limit(bundle: Path) -> None:
    assert read_bundle(bundle, max_bytes=LIMIT).version == read_manifest(bundle)["sha256"]


# Sizes of files


@pytest.mark.parametrize("part", ["density", "manifest"])
def test_a_file_of_a_terabyte_is_not_read(bundle: Path, part: str) -> None:
    name = MANIFEST if part == "manifest" else read_manifest(bundle)["files"][part]["name"]
    os.truncate(bundle / name, 2**40)  # a sparse file, which takes no disk space
    with pytest.raises(BundleError, match=rf"{name}: the file has {2**40} bytes, expected at most"):
        read_bundle(bundle)


def test_a_bundle_above_the_limit_is_refused_before_its_files_are_read(bundle: Path) -> None:
    for path in bundle.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BundleError, match=r"tensor files have \d+ bytes, .* 1048576"):
        read_bundle(bundle, max_bytes=MIB)


def test_a_deeply_nested_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        read_manifest(bundle)


# Entries of the manifest


ENTRIES: dict[str, list[Any]] = {
    "moments.height": [-8, "8"],
    "moments.width": [2**62],
    "moments.count": [None],
    "moments": [[8, 8]],
    "files.density.num_bytes": [-1, 1e9],
    "files.density.name": ["../../secret.safetensors", "/etc/x.safetensors"],
    "files.density.sha256": [7],
    "files": [[]],
    "category": ["../../other", "", ["gear"]],
    "created_at": ["2026-13-45", 5],
    **{"config": [None], "metrics": ["many"], "data": [3], "calibration": [[]]},
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in ENTRIES.items() for value in values])
def test_a_manifest_entry_of_a_wrong_kind_is_named(bundle: Path, path: str, value: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *folders, name = path.split(".")
        for folder in folders:
            manifest = manifest[folder]
        manifest[name] = value

    change_manifest(bundle, change)
    for read in (read_manifest, read_bundle, read_statistics):
        with pytest.raises(BundleError, match=rf"the entry '{path}[^']*'"):
            read(bundle)


@pytest.mark.parametrize("section", ["model", "density", "scoring"])
def test_a_section_of_the_configuration_that_is_no_mapping_is_refused(bundle: Path, section: str) -> None:
    change_manifest(bundle, lambda manifest: manifest["config"].update({section: 7}))
    with pytest.raises(BundleError):
        read_bundle(bundle)


def set_tiles(manifest: dict[str, Any], grid: list[int], size_px: int) -> None:
    """Sets a huge image size, and the matching size of the density's map."""
    tiling = {"grid": grid, "overlap": 0.0, "density": "shared"}
    manifest["config"]["model"].update(image_size_px=size_px, tiling=tiling)


def test_images_of_four_gigapixels_are_refused_before_anything_is_allocated(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: set_tiles(manifest, [32, 32], 64))
    change_tensors(bundle, "density", **{"profile.weight": torch.ones(256, 256)})
    read_bundle(bundle)  # without a limit it is read: its files are small
    with pytest.raises(BundleError, match=r"a batch of 32 images of 2048 x 2048 pixels would take 512 MiB of memory"):
        read_bundle(bundle, max_bytes=LIMIT)
    change_manifest(bundle, lambda manifest: set_tiles(manifest, [32, 32], 2048))
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_a_map_of_another_size_than_the_configuration_gives_is_refused(bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["moments"].update(height=1, width=64))
    with pytest.raises(BundleError, match=r"1 x 64 cells, expected \(8, 8\)"):
        read_bundle(bundle)


# Headers of tensor files


def entry(dtype: bytes = b"F32", shape: bytes = b"[1]", offsets: bytes = b"[0, 4]") -> bytes:
    """Returns a header with a single tensor."""
    return b'{"bank": {"dtype": "%b", "shape": %b, "data_offsets": %b}}' % (dtype, shape, offsets)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        file_of(b"{}", length=2**40),
        file_of(b"[" * 100_000),
        file_of(b"[]"),
        file_of(b'{"bank": 3}'),
        file_of(entry(shape=b"[1099511627776]"), b"1234"),
        file_of(entry(shape=b"[0, 4611686018427387904]", offsets=b"[0, 0]")),
        file_of(entry(shape=b"[2]"), b"1234"),
        file_of(entry(shape=b"[-1, -1]"), b"1234"),
        file_of(entry(offsets=b"[4, 8]"), b"12341234"),
        file_of(entry(), b"1234 and more"),
        file_of(entry(shape=b"[true]"), b"1234"),
        file_of(entry(dtype=b"OBJECT"), b"1234"),
        file_of(entry(shape=b"[" + b"1," * 999 + b"1]"), b"1234"),
    ],
)
@pytest.mark.parametrize("part", ["network", "density", "moments"])
def test_a_header_that_does_not_describe_its_file_is_refused(bundle: Path, part: str, content: bytes) -> None:
    replace_part(bundle, part, content)
    with pytest.raises(BundleError, match="header"):
        (read_statistics if part == "moments" else read_bundle)(bundle)


def test_a_header_above_a_mebibyte_is_refused(bundle: Path) -> None:
    content = part_bytes(bundle, "density")
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(MIB + 1)
    replace_part(bundle, "density", file_of(header, content[8 + length :]))
    with pytest.raises(BundleError, match=r"header of 1048577 bytes, .* 1048576"):
        read_bundle(bundle)


# Shapes of tensors


@pytest.mark.parametrize(
    ("part", "name", "shape"),
    [
        ("density", "profile.weight", (5000, 1, 1)),  # broadcasts each map to 5000
        ("density", "profile.typical", (4, 4)),
        ("density", "typical", (5000, 1, 1, 1)),
        ("density", "gaussian.scale", (5000, 1, 1)),
        ("density", "same_part_distance", (9,)),
        ("density", "whitening", (64, 64)),
        ("density", "coreset.patches", (5000, 128)),
        ("network", "reduction.projection", (33, 448)),
    ],
)
def test_a_tensor_of_another_shape_than_the_configuration_requires_is_refused(
    bundle: Path, part: str, name: str, shape: tuple[int, ...]
) -> None:
    extra = {"coreset.images": torch.zeros(shape[0], dtype=torch.int32)} if name == "coreset.patches" else {}
    change_tensors(bundle, part, **{name: torch.zeros(shape), **extra})
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_a_region_of_another_size_is_refused(bundle: Path) -> None:
    region = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    change_manifest(bundle, lambda manifest: manifest["config"]["data"].update(regions={"gear": [region]}))
    change_tensors(bundle, "density", region=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(BundleError, match="region"):
        read_bundle(bundle)


def test_the_limit_counts_the_memory_of_tensors_and_not_their_file_size(bundle: Path) -> None:
    """A bank of bytes becomes float32 in memory, which is four times as large."""
    change_tensors(bundle, "density", bank=torch.zeros(20_000, 64, 32, dtype=torch.uint8))
    assert len(part_bytes(bundle, "density")) < 50 * MIB
    with pytest.raises(BundleError, match=r"the tensors would take \d+ MiB .* 100 MiB"):
        read_bundle(bundle, max_bytes=100 * MIB)


def test_distances_to_a_large_coreset_count_before_the_first_image(bundle: Path) -> None:
    count = 65536
    change_manifest(bundle, lambda manifest: manifest["config"]["density"].update(coreset=count, coreset_channels=1))
    patches, numbers = torch.zeros(count, 1), torch.zeros(count, dtype=torch.int32)
    change_tensors(bundle, "density", **{"coreset.patches": patches, "coreset.images": numbers})
    change_tensors(bundle, "network", **{"reduction.coreset_projection": torch.zeros(1, 384)})
    read_bundle(bundle, max_bytes=LIMIT)
    with pytest.raises(BundleError, match=r"coreset would take 16 MiB"):
        read_bundle(bundle, max_bytes=MIB * 15)


def test_moments_of_another_shape_than_the_manifest_says_are_refused(bundle: Path) -> None:
    change_tensors(bundle, "moments", scatter=torch.zeros(64, 5000))
    with pytest.raises(BundleError, match=r"no tensor scatter of the shape \(64, 528\)"):
        read_statistics(bundle)
