"""The listing of image files for all commands skips hidden files, system folders and pictures that focus_ray drew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_sources import ingest_quietly, save_all
from PIL import Image

from focus_ray.api import link_images_into_good_folder
from focus_ray.cli.output import list_image_paths
from focus_ray.data.images import ImageError, decode_batch, decode_mask, encode_png
from focus_ray.data.listing import find_image_files
from focus_ray.errors import DataError
from focus_ray.watching.folder import list_images

HIDDEN = [".trash/a.png", ".ipynb_checkpoints/b.png", "._c.jpg", ".thumbnails/deep/d.png", "@eaDir/e.png/THUMB.jpg"]
HIDDEN += ["#recycle/f.png", "@Recycle/g.png", "__MACOSX/._h.png", "$RECYCLE.BIN/i.bmp", "lost+found/k.png"]
HIDDEN += ["System Volume Information/j.png", "#snapshot/l.tif", "part/.hidden/m.png", "part/.n.png"]
VISIBLE = ("a.png", "part/b.JPG", "part/deep/c.tiff")


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    for number, name in enumerate([*HIDDEN, *VISIBLE]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    return folder


def list_by_watch(folder: Path) -> list[Path]:
    return sorted(folder / file.image for file in list_images(folder, folder / "out", pytest.fail))


@pytest.mark.parametrize("listing", [find_image_files, list_by_watch, lambda folder: list_image_paths([str(folder)])])
def test_no_listing_contains_hidden_files_or_system_folders(
    folder: Path, listing: Callable[[Path], list[Path]]
) -> None:
    assert listing(folder) == sorted(folder / name for name in VISIBLE)


def test_ingest_uses_the_same_files(folder: Path, tmp_path: Path) -> None:
    save_all(tmp_path / "parts", {"@eaDir/a.png": 90, "good/heat.png": encode_png(picture(99), drawn=True)})
    folder.rename(tmp_path / "parts/good/new")
    report = ingest_quietly(tmp_path / "parts", tmp_path / "data", group_by="folder:1")
    assert report.num_rows == len(VISIBLE)
    assert [item.path for item in report.rejects] == ["good/heat.png"]


def test_a_folder_with_images_and_hidden_folders_counts_as_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "part")
    assert [path.name for path in (link_images_into_good_folder(folder, tmp_path / "scratch") / "good").iterdir()] == [
        "a.png"
    ]


def test_a_system_folder_among_several_names_is_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(folder / name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    assert list_image_paths(names) == sorted(folder / name for name in VISIBLE)
    assert "@eaDir: a system folder, skipped" in capsys.readouterr().err


def test_a_folder_with_only_hidden_images_is_refused(tmp_path: Path) -> None:
    save_all(tmp_path, {".trash/a.png": 0})
    with pytest.raises(DataError, match=rf"{tmp_path}: .*1 hidden"):
        find_image_files(tmp_path)


def test_a_hidden_folder_is_listed_if_it_is_named_explicitly(folder: Path) -> None:
    assert [path.name for path in find_image_files(folder / ".trash")] == ["a.png"]


def test_broken_links_are_listed_and_pipes_are_not(folder: Path) -> None:
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert {path.name for path in find_image_files(folder)} == {"a.png", "b.JPG", "c.tiff", "gone.png"}


def test_pictures_that_focus_ray_drew_are_skipped_in_every_folder_and_counted(folder: Path) -> None:
    drawing = encode_png(picture(99), drawn=True)
    save_all(folder, dict.fromkeys(["heat/a.png", "part/renamed.png", "b.jpg"], drawing))
    messages: list[str] = []
    assert find_image_files(folder, messages.append) == sorted(folder / name for name in VISIBLE)
    assert f"{len(HIDDEN)} hidden" in messages[0]
    assert "3 pictures that focus_ray drew" in messages[0]


def test_pictures_that_focus_ray_drew_are_refused_as_photographs_and_accepted_as_masks() -> None:
    with pytest.raises(ImageError, match="that focus_ray drew"):
        decode_batch([encode_png(picture(0), drawn=True)], 8)
    mask = np.eye(8, dtype=bool)
    assert np.array_equal(decode_mask(encode_png(mask, drawn=True), 8, 8), mask)
    assert decode_batch([encode_png(picture(0))], 8).shape == (1, 8, 8, 3)
