"""A watched folder: files that arrive, change, break and disappear, and a watch that is killed."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_journal import read_journal_lines, read_table_rows
from waiting import wait_for
from worker_processes import get_fork_context

from focus_ray.bundle.bundle import compute_manifest_hash, copy_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.recalibrate import set_thresholds
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.errors import DataError
from focus_ray.samples.write import draw_sample
from focus_ray.watching.folder import ListedFile
from focus_ray.watching.journal import VerdictJournal
from focus_ray.watching.model import ReloadableModel
from focus_ray.watching.processed_keys import compute_stamp_key
from focus_ray.watching.watch import FolderWatch, WatchSettings

load_cached = cache(lambda uri: Inspector.load(uri, "cpu"))
QUICK = {"poll_s": 0.02, "settle_s": 0.1, "give_up_s": 0.6}


@pytest.fixture(scope="module")
def root(parts: str, part_bundles: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `bundle` (a model of gears), `strict` (calls every image anomalous) and `images`."""
    root = tmp_path_factory.mktemp("parts")
    shutil.copytree(part_bundles["gear"], root / "bundle")
    (root / "images").symlink_to(Path(parts).parent / "images")
    set_thresholds(str(root / "bundle"), str(root / "strict"), image_threshold=0.001, by="test")
    return root


class RunningWatch:
    """A watch in a thread, and its messages."""

    def __init__(self, bundle: Path | str, folder: Path, load: Any, version: str = "latest", **settings: Any) -> None:
        self.messages: list[str] = []
        self.out = folder.parent / "out"
        self.journal = VerdictJournal(self.out, table=True, log=self.messages.append)
        model = ReloadableModel(str(bundle), load, self.messages.append, version=version)
        self.watch = FolderWatch(
            folder, model, self.journal, WatchSettings(**{**QUICK, **settings}), self.messages.append
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch.run, args=[self.stop])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of the output."""
        return read_journal_lines(self.out)

    def wait_for_lines(self, num_lines: int) -> list[dict[str, Any]]:
        """Waits until the output has at least `num_lines` lines, and returns all lines."""
        wait_for(lambda: len(self.lines) >= num_lines, 60, f"{num_lines} lines; messages: {self.messages}", 0.02)
        return self.lines

    def wait_for_message(self, text: str, count: int = 1) -> None:
        """Waits until at least `count` messages contain the text."""
        wait_for(lambda: sum(text in message for message in self.messages) >= count, 60, text, 0.02)

    def assert_no_further_line(self) -> None:
        """Waits for several listings, and asserts that no line was added."""
        num_lines = len(self.lines)
        time.sleep(0.4)
        assert len(self.lines) == num_lines


@dataclass
class Camera:
    """A watched folder in which pictures arrive, its output folder, and the models that inspect them.

    Attributes:
        pictures: encoded good images of gears: four test images, then training images.
    """

    models: Path
    folder: Path
    out: Path
    pictures: list[bytes]

    def write_picture(self, name: str, content: int | bytes = 0) -> Path:
        """Writes a picture, by its number, or other bytes into the watched folder, and returns the path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.pictures[content % len(self.pictures)] if isinstance(content, int) else content)
        return path

    @contextmanager
    def run_watch(
        self, bundle: Path | str = "bundle", load: Any = load_cached, **settings: Any
    ) -> Iterator[RunningWatch]:
        """Runs a watch for the time of a `with` block. bundle: name of a folder in `models`, or a path."""
        running = RunningWatch(self.models / bundle, self.folder, load, **settings)
        running.thread.start()
        try:
            yield running
            assert running.thread.is_alive(), running.messages
        finally:
            running.stop.set()
            running.thread.join()
            running.journal.close()

    def make_command(self, *more: str, bundle: str = "bundle", output: Path | None = None) -> list[str]:
        """Returns the words of the command `watch`, with short times."""
        words = ["watch", str(self.models / bundle), str(self.folder), "--output", str(output or self.out)]
        return [*words, "--device", "cpu", "--settle-s", "0.05", "--poll-s", "0.02", *more]


@pytest.fixture
def camera(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Camera:
    monkeypatch.setattr("focus_ray.watching.model.CHECK_INTERVAL_S", 0.05)
    folders = (root / "images/gear/test/good", root / "images/gear/train/good")
    pictures = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]
    (tmp_path / "in").mkdir()
    return Camera(root, tmp_path / "in", tmp_path / "out", pictures)


def test_existing_and_new_images_get_the_line_and_the_row_that_inspect_would_give(camera: Camera) -> None:
    camera.write_picture("there.png")
    with camera.run_watch(overlays="all") as running:
        running.wait_for_lines(1)
        (camera.folder / "2026/shift b").mkdir(parents=True)
        camera.write_picture("moved.tmp", 1).rename(camera.folder / "2026/shift b/part 1.png")
        lines = running.wait_for_lines(2)
        inspections = load_cached(str(camera.models / "bundle")).inspect(camera.pictures)
        trained = next(number for number, inspection in enumerate(inspections) if inspection.trained_on)
        camera.write_picture("trained.png", trained)
        assert running.wait_for_lines(3)[2]["trained_on"] is True
    assert [line["image"] for line in lines] == ["there.png", "2026/shift b/part 1.png"]
    assert trained >= 4
    for line, inspection in zip(lines, inspections[:2], strict=True):
        expected = {"verdict": inspection.verdict, "category": "gear", **inspection.to_dict()}
        expected["bundle"] = read_manifest(camera.models / "bundle")["sha256"]
        assert line["score"] == pytest.approx(inspection.score, rel=1e-5)
        assert {key: line[key] for key in expected} == {**expected, "score": line["score"]}
        assert (camera.out / line["overlay"]).is_file()
    rows = [[row[name] for name in ("image", "time", "sha256", "trained_on")] for row in read_table_rows(camera.out)]
    assert rows[:2] == [[line["image"], line["time"], line["sha256"], "false"] for line in lines]
    assert rows[2][3] == "true"


def test_two_watchers_never_inspect_the_overlays_of_each_other(
    camera: Camera, capsys: pytest.CaptureFixture[str]
) -> None:
    camera.write_picture("a.png")
    for output in ("left", "right", "left", "right"):
        assert main(camera.make_command("--once", "--overlays", output=camera.folder / output)) == 0
        assert [line["image"] for line in read_journal_lines(camera.folder / output)] == ["a.png"]
    assert "images that focus_ray drew are skipped" in capsys.readouterr().err


def test_an_overlay_that_cannot_be_written_does_not_prevent_the_verdict(camera: Camera) -> None:
    (camera.out / "overlays").mkdir(parents=True)
    (camera.out / "overlays/lamp").write_text("a file in the way of a folder")
    camera.write_picture("lamp/a.png")
    camera.write_picture("gear/b.png", 1)
    with camera.run_watch(overlays="all") as running:
        lines = {line["image"]: line for line in running.wait_for_lines(2)}
        running.wait_for_message("lamp/a.png: no overlay: ")
    assert "overlay" not in lines["lamp/a.png"]
    assert "overlays/lamp" in lines["lamp/a.png"]["overlay_error"]
    assert (camera.out / lines["gear/b.png"]["overlay"]).is_file()
    assert len(read_table_rows(camera.out)) == 2


def test_names_of_any_bytes_and_any_length_are_written(camera: Camera) -> None:
    for number, name in enumerate((os.fsdecode(b"\xff,\n.png"), "\u00e9" * 120 + ".png")):
        camera.write_picture(name, number)
    with camera.run_watch(overlays="all") as running:
        lines = running.wait_for_lines(2)
    assert {line["image"] for line in lines} == {"\\xff,\n.png", "\u00e9" * 120 + ".png"}
    assert all((camera.out / line["overlay"]).is_file() for line in lines)
    assert [row["image"] for row in read_table_rows(camera.out)] == [line["image"] for line in lines]
    with camera.run_watch() as running:
        running.assert_no_further_line()


def test_a_file_that_is_still_being_written_waits(camera: Camera) -> None:
    content, size = camera.pictures[0], 1 + len(camera.pictures[0]) // 8
    with camera.run_watch(give_up_s=60.0) as running, (camera.folder / "slow.png").open("wb") as stream:
        for start in range(0, len(content), size):
            stream.write(content[start : start + size])
            stream.flush()
            time.sleep(0.15)  # longer than settle_s: the part is no image
        (line,) = running.wait_for_lines(1)
        running.assert_no_further_line()
    assert "verdict" in line


def test_new_content_of_a_file_is_a_new_image_and_a_new_time_is_not(camera: Camera) -> None:
    path = camera.write_picture("latest.png")
    with camera.run_watch(overlays="all") as running:
        running.wait_for_lines(1)
        os.utime(path, (5, 5))
        touched = compute_stamp_key(ListedFile.from_status("latest.png", path.stat()))
        wait_for(lambda: touched in running.journal.processed_keys, 60, "the touched file is listed")
        camera.write_picture("latest.png", 1)
        first, second = running.wait_for_lines(2)
        path.rename(camera.folder / "renamed.png")
        renamed = running.wait_for_lines(3)[2]
    assert first["image"] == second["image"] == "latest.png"
    assert first["sha256"] != second["sha256"] == renamed["sha256"]
    assert len({line["overlay"] for line in (first, second, renamed)}) == 3
    with camera.run_watch() as running:
        running.assert_no_further_line()


@pytest.mark.parametrize("how", ["rewrite", "rename", "link", "link of the file"])
def test_a_file_that_is_replaced_by_a_file_of_the_same_size_and_time_is_a_new_image(camera: Camera, how: str) -> None:
    """Cameras without a clock, `cp -p`, `rsync -t` and archives do this; also while no watch is running."""
    path = camera.folder / "latest.bmp"

    def replace(number: int) -> None:
        new = camera.folder.parent / f"{number}.bmp"
        Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)).save(new)
        os.utime(new, (5, 5))
        if how == "rewrite":
            path.write_bytes(new.read_bytes())
            os.utime(path, (5, 5))
        elif how == "rename":
            new.rename(path)
        else:
            path.unlink(missing_ok=True)
            (path.hardlink_to if how == "link" else path.symlink_to)(new)

    replace(0)
    with camera.run_watch() as running:
        running.wait_for_lines(1)
        replace(1)
        running.wait_for_lines(2)
    replace(2)
    with camera.run_watch() as running:
        lines = running.wait_for_lines(3)
        running.assert_no_further_line()
    assert len({line["sha256"] for line in lines}) == 3


def test_a_file_that_is_no_image_gets_one_line_after_give_up_s_and_another_when_it_changes(camera: Camera) -> None:
    camera.write_picture("cut.png", camera.pictures[0][:200])
    camera.write_picture("empty.png", b"")
    camera.write_picture("good.png", 1)
    started = time.monotonic()
    with camera.run_watch() as running:
        lines = running.wait_for_lines(3)
        assert time.monotonic() - started >= QUICK["give_up_s"]
        errors = {line["image"]: line["error"] for line in lines if "verdict" not in line}
        assert set(errors) == {"cut.png", "empty.png"}
        assert "0 bytes" in errors["empty.png"]
        time.sleep(0.4)
        running.assert_no_further_line()
        camera.write_picture("cut.png")
        assert running.wait_for_lines(4)[3]["verdict"]
    rows = [(row["error"] != "", row["trained_on"]) for row in read_table_rows(camera.out)]
    assert sorted(rows) == [(False, "false"), (False, "false"), (True, ""), (True, "")]


def test_a_file_that_cannot_be_read_is_reported_and_inspected_later(camera: Camera) -> None:
    locked = camera.folder / "locked.png"
    locked.symlink_to("/proc/self/mem")  # reading its first byte is an input/output error, also for root
    with camera.run_watch() as running:
        running.wait_for_message("locked.png: cannot be read: Input/output error")
        camera.write_picture("good.png")
        running.wait_for_lines(1)
        locked.unlink()
        camera.write_picture("locked.png", 1)
        assert running.wait_for_lines(2)[1]["image"] == "locked.png"


def test_a_missing_folder_is_reported_and_no_image_is_inspected_twice_when_it_returns(camera: Camera) -> None:
    camera.write_picture("a.png")
    away = camera.folder.with_name("away")
    with camera.run_watch() as running:
        running.wait_for_lines(1)
        camera.folder.rename(away)
        running.wait_for_message("waiting until it can be listed")
        (away / "b.png").write_bytes(camera.pictures[1])
        away.rename(camera.folder)
        assert [line["image"] for line in running.wait_for_lines(2)] == ["a.png", "b.png"]
    assert f"{camera.folder}: can be listed again" in running.messages


def test_a_replaced_bundle_is_loaded_and_a_damaged_bundle_is_not(camera: Camera, tmp_path: Path) -> None:
    place, strict = tmp_path / "bundle", camera.models / "strict"
    shutil.copytree(camera.models / "bundle", place)
    with camera.run_watch(place, lambda uri: Inspector.load(uri, "cpu")) as running:
        camera.write_picture("a.png")
        running.wait_for_lines(1)
        manifest = (place / "manifest.json").read_text()
        (place / "manifest.json").write_text(manifest[:-9])
        running.wait_for_message("keeps the model")
        camera.write_picture("b.png", 1)
        running.wait_for_lines(2)
        copy_bundle(str(strict), read_manifest(strict), str(place))
        running.wait_for_message("watch: model of", 2)
        camera.write_picture("c.png", 2)
        lines = running.wait_for_lines(3)
    versions = [read_manifest(camera.models / name)["sha256"] for name in ("bundle", "bundle", "strict")]
    assert [line["bundle"] for line in lines] == versions
    assert lines[2]["verdict"] == "anomalous"


def test_a_moved_alias_is_followed(camera: Camera, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = registry.publish(camera.models / "bundle", "press", aliases=["production"])
    second = registry.publish(camera.models / "strict", "press")
    with camera.run_watch(registry.root, version="production") as running:
        camera.write_picture("a.png")
        running.wait_for_lines(1)
        registry.promote("press", "gear", second.name, "production")
        running.wait_for_message("watch: model of", 2)
        camera.write_picture("b.png", 1)
        assert [line["bundle"] for line in running.wait_for_lines(2)] == [first.sha256, second.sha256]


@cache
def draw_gears() -> list[np.ndarray]:
    """Returns new pictures of 3 defective gears, then of 76 good gears."""
    kinds = [
        ("broken_tooth", 0),
        ("contamination", 0),
        ("missing_hole", 0),
        *(("train", number) for number in range(76)),
    ]
    return [draw_sample("gear", 7, kind, number, 64)[0] for kind, number in kinds]


@pytest.mark.parametrize("light", ["usual", "half"])
def test_a_shift_is_reported_once_and_usual_images_with_a_few_defects_are_not_reported(
    camera: Camera, light: str
) -> None:
    for number, pixels in enumerate(draw_gears()):
        Image.fromarray(pixels // 2 if light == "half" else pixels).save(camera.folder / f"{number}.png")
    with camera.run_watch() as running:
        running.wait_for_lines(79)  # two tests
        wait_for(lambda: running.watch.counts.total() == 79, 60, "all lines are counted")
    notices = [line for line in running.messages if re.search("score (higher|lower)", line)]
    assert len(notices) == (light == "half")
    assert all("images score higher" in notice for notice in notices)


def test_an_anomalous_image_runs_the_command_with_its_line_and_a_failure_is_reported(camera: Camera) -> None:
    signals = camera.out.parent / "signals"
    command = ("sh", "-c", f"cat >> {signals}; exit 7")
    camera.write_picture("a.png")
    with camera.run_watch("strict", on_anomalous=command, report_s=0.0, overlays="anomalous") as running:
        (line,) = running.wait_for_lines(1)
        running.wait_for_message("a.png: --on-anomalous: Command '('sh', ")
        running.wait_for_message("images per minute: 1 inspected, 1 anomalous (100.0%), 0 pending")
    assert json.loads(signals.read_text()) == line
    assert "overlay" in line


def test_once_ends_with_3_if_a_file_was_no_image_with_0_otherwise_and_inspects_no_image_twice(
    camera: Camera, capsys: pytest.CaptureFixture[str]
) -> None:
    camera.write_picture("a.png")
    camera.write_picture("b.png", b"no image")
    assert main(camera.make_command("--once", "--print")) == 3
    captured = capsys.readouterr()
    assert [json.loads(text) for text in captured.out.splitlines()] == read_journal_lines(camera.out)
    assert captured.err.endswith("1 inspected, 0 anomalous (0.0%), 1 not an image\n")
    camera.write_picture("c.png", 1)
    assert main(camera.make_command("--once")) == 0
    assert [line["image"] for line in read_journal_lines(camera.out)] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--poll-s", "-1"], "--poll-s -1.0: "),
        (["--batch", "0"], "--batch 0: "),
        (["--output", "{folder}"], "the watched folder itself"),
        (["--output", "s3://plant/verdicts"], "--output s3://plant/verdicts: "),
        (["--on-anomalous", "/bin/eject 'lane 2"], "--on-anomalous /bin/eject 'lane 2: "),
        (["--category", "bolt"], "no model of 'bolt', only of board, gear"),
        ([], "models of board, gear: choose one with --category"),
    ],
)
def test_wrong_arguments_are_refused(
    camera: Camera, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("board", "gear"):
        shutil.copytree(camera.models / "bundle", tmp_path / "run" / name)
        manifest = {**read_manifest(camera.models / "bundle"), "category": name}
        manifest["sha256"] = compute_manifest_hash(manifest)
        (tmp_path / "run" / name / "manifest.json").write_text(json.dumps(manifest))
    words = [word.format(folder=camera.folder) for word in more]
    assert main(camera.make_command(*words, bundle=str(tmp_path / "run"))) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("s3:").exists()


# Watches in processes


def run_focus_ray(words: list[str]) -> None:
    """Runs a command in a process that a test started, and ends the process with its exit status."""
    sys.exit(main(words))


def count_journal_lines(folder: Path) -> int:
    """Returns the number of complete lines in an output folder."""
    return sum(day.read_bytes().count(b"\n") for day in folder.glob("*.jsonl"))


def kill_watch_after_a_line(words: list[str], out: Path) -> int:
    """Runs a watch in a process, kills it at a random time after its next line, and returns the number of lines."""
    num_lines, watch = count_journal_lines(out), get_fork_context().Process(target=run_focus_ray, args=[words])
    watch.start()
    wait_for(lambda: count_journal_lines(out) > num_lines or not watch.is_alive(), 60, "a line", 0.005)
    time.sleep(random.uniform(0, 0.2))
    watch.kill()
    watch.join()
    return count_journal_lines(out)


def write_pictures(camera: Camera, count: int) -> list[str]:
    """Writes pictures into the watched folder, and returns their names."""
    return [camera.write_picture(f"{number:03}.png", number).name for number in range(count)]


def assert_every_image_has_one_line_and_one_row(camera: Camera, names: list[str]) -> None:
    lines = [line["image"] for line in read_journal_lines(camera.out)]
    assert sorted(lines) == names
    assert [row["image"] for row in read_table_rows(camera.out)] == lines


@pytest.mark.parametrize("num_kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_every_image_has_one_line_one_row_and_one_overlay_after_kills(camera: Camera, num_kills: int) -> None:
    names = write_pictures(camera, 10 + 10 * num_kills)
    words = camera.make_command(
        "--csv", "--overlays", "--settle-s", "0.01", "--poll-s", "0.01", "--batch", "2", "--once"
    )
    counts = [kill_watch_after_a_line(words, camera.out) for _ in range(num_kills)]
    assert main(words) == 0
    assert_every_image_has_one_line_and_one_row(camera, names)
    drawn = {str(path.relative_to(camera.out)) for path in (camera.out / "overlays").glob("[!.]*")}
    assert drawn == {line["overlay"] for line in read_journal_lines(camera.out)}
    assert len({count for count in counts if 0 < count < len(names)}) > 1, "a kill in the middle"


@pytest.mark.parametrize("overlays", [[], ["--overlays"]])
def test_a_full_disk_ends_the_watch_with_1_and_loses_nothing(camera: Camera, overlays: list[str]) -> None:
    names, words = write_pictures(camera, 8), camera.make_command("--csv", "--once", "--batch", "2", *overlays)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = io.StringIO()
    with redirect_stderr(messages):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
        try:
            assert main(words) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in messages.getvalue()
        assert main(words) == 0
    assert overlays or "the last line was cut off" in messages.getvalue()
    assert_every_image_has_one_line_and_one_row(camera, names)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_watch_with_0_and_a_summary_and_lines_are_printed_on_an_ascii_terminal(
    camera: Camera, number: signal.Signals
) -> None:
    camera.write_picture("Gehäuse.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "focus_ray.cli", *camera.make_command("--print")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == read_journal_lines(camera.out)[0]
        process.send_signal(number)
        _, messages = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, messages
    assert "watch: ended: 1 inspected, " in messages.splitlines()[-1]


def test_a_folder_that_cannot_be_listed_ends_a_watch_with_once(camera: Camera) -> None:
    camera.folder.rmdir()
    running = RunningWatch(camera.models / "bundle", camera.folder, load_cached, once=True)
    with running.journal, pytest.raises(DataError, match="No such file or directory"):
        running.watch.run(running.stop)
