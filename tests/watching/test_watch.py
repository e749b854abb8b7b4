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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_set import ingest_parts, make_bundle, small_config
from test_journal import read_lines, read_rows
from waiting import wait_for

from focus_ray.bundle.bundle import copy_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.recalibrate import set_thresholds
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.data.images import content_hash, decode_image
from focus_ray.errors import DataError
from focus_ray.fitting.split import short_hash
from focus_ray.samples.write import write_samples
from focus_ray.watching.journal import Journal
from focus_ray.watching.model import WatchedModel
from focus_ray.watching.processed_keys import stamp_key
from focus_ray.watching.watch import Watch, WatchSettings

load = cache(lambda uri: Inspector.load(uri, "cpu"))
QUICK = {"poll_s": 0.02, "settle_s": 0.1, "give_up_s": 0.6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `bundle` (a model of gears), `strict` (calls every image anomalous) and `images`."""
    root = tmp_path_factory.mktemp("parts")
    config = small_config(ingest_parts(root), root / "runs", model={"image_alignment": {"group": "none"}})
    make_bundle(config, place=root / "bundle")
    set_thresholds(str(root / "bundle"), str(root / "strict"), image_threshold=0.001, by="test")
    return root


@pytest.fixture(scope="module")
def pictures(root: Path) -> list[bytes]:
    """Returns the encoded good images of gears."""
    folders = (root / "images/gear/test/good", root / "images/gear/train/good")
    return [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns an empty folder to watch."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


class RunningWatch:
    """A watch in a thread, and its messages."""

    def __init__(self, bundle: Path | str, folder: Path, version: str = "latest", **settings: Any) -> None:
        self.messages: list[str] = []
        self.out = folder.parent / "out"
        self.journal = Journal(self.out, table=True, log=self.messages.append)
        model = WatchedModel(str(bundle), load, self.messages.append, version=version, check_interval_s=0.05)
        watch_settings = WatchSettings(**{**QUICK, **settings})
        self.watch = Watch(folder, model, self.journal, watch_settings, self.messages.append)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch.run, args=[self.stop])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of the output."""
        return read_lines(self.out)

    def wait_for_lines(self, num_lines: int) -> list[dict[str, Any]]:
        """Waits until the output has at least `num_lines` lines, and returns all lines."""
        wait_for(lambda: len(self.lines) >= num_lines, 30, f"{num_lines} lines; messages: {self.messages}", 0.02)
        return self.lines


@contextmanager
def watching(*arguments: Any, **settings: Any) -> Iterator[RunningWatch]:
    """Runs a watch for the time of a `with` block."""
    running = RunningWatch(*arguments, **settings)
    running.thread.start()
    try:
        yield running
        assert running.thread.is_alive(), running.messages
    finally:
        running.stop.set()
        running.thread.join()
        running.journal.close()


def test_existing_and_new_images_get_the_line_and_the_row_that_inspect_would_give(
    root: Path, pictures: list[bytes], folder: Path
) -> None:
    (folder / "there.png").write_bytes(pictures[0])
    with watching(root / "bundle", folder, overlays="all") as running:
        running.wait_for_lines(1)
        (folder / "2026/shift b").mkdir(parents=True)
        (folder / "moved.tmp").write_bytes(pictures[1])
        (folder / "moved.tmp").rename(folder / "2026/shift b/part 1.png")
        lines = running.wait_for_lines(2)
    assert [line["image"] for line in lines] == ["there.png", "2026/shift b/part 1.png"]
    for line, finding in zip(lines, load(str(root / "bundle")).inspect(pictures[:2]), strict=True):
        assert line["score"] == pytest.approx(finding.score, rel=1e-5)
        assert {key: line[key] for key in finding.to_dict()} == {**finding.to_dict(), "score": line["score"]}
        assert (line["verdict"], line["category"]) == (finding.verdict, "gear")
        assert line["bundle"] == read_manifest(root / "bundle")["sha256"]
        assert (running.out / line["overlay"]).is_file()
    assert [(row["image"], row["time"], row["sha256"]) for row in read_rows(running.out)] == [
        (line["image"], line["time"], line["sha256"]) for line in lines
    ]


def test_lines_and_rows_mark_images_that_the_model_was_trained_on(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    training_hashes = [short_hash(content_hash(decode_image(pictures[0], None)))]
    config = small_config(str(root / "data"), tmp_path / "runs", model={"image_alignment": {"group": "none"}})
    bundle = make_bundle(config, place=tmp_path / "bundle", fit_hashes=training_hashes)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(pictures[number])
    (folder / "2.png").write_bytes(b"no image")
    with watching(bundle, folder) as running:
        lines = {line["image"]: line.get("trained_on", False) for line in running.wait_for_lines(3)}
    assert lines == {"0.png": True, "1.png": False, "2.png": False}
    rows = {row["image"]: row["trained_on"] for row in read_rows(running.out)}
    assert rows == {"0.png": "true", "1.png": "false", "2.png": ""}


def test_two_watchers_never_inspect_the_overlays_of_each_other(
    root: Path, pictures: list[bytes], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.png").write_bytes(pictures[0])
    words = ["--device", "cpu", "--once", "--settle-s", "0.05", "--poll-s", "0.02", "--overlays"]
    for output in ("left", "right", "left", "right"):
        assert main(["watch", str(root / "bundle"), str(folder), "--output", str(folder / output), *words]) == 0
    assert "images that focus_ray drew are skipped" in capsys.readouterr().err
    for output in ("left", "right"):
        assert [line["image"] for line in read_lines(folder / output)] == ["a.png"]


def test_an_overlay_that_cannot_be_written_does_not_prevent_the_verdict(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/overlays").mkdir(parents=True)
    (tmp_path / "out/overlays/lamp").write_text("a file in the way of a folder")
    for name in ("lamp/a.png", "gear/b.png"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(pictures[0])
    with watching(root / "bundle", folder, overlays="all") as running:
        lines = {line["image"]: line for line in running.wait_for_lines(2)}
    assert "overlay" not in lines["lamp/a.png"]
    assert "cannot be written" in lines["lamp/a.png"]["overlay_error"]
    assert (running.out / lines["gear/b.png"]["overlay"]).is_file()
    assert len(read_rows(running.out)) == 2
    assert any(message.startswith("lamp/a.png: no overlay: ") for message in running.messages)


def test_lines_are_printed_even_if_standard_output_is_ascii(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / "Gehäuse.png").write_bytes(pictures[0])
    words = ["watch", str(root / "bundle"), str(folder), "--output", str(tmp_path / "out"), "--print", "--once"]
    process = subprocess.run(
        [sys.executable, "-m", "focus_ray.cli", *words, "--settle-s", "0"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == read_lines(tmp_path / "out")[0]


def test_names_of_any_bytes_and_any_length_are_written(root: Path, pictures: list[bytes], folder: Path) -> None:
    for number, name in enumerate((os.fsdecode(b"\xff,\n.png"), "\u00e9" * 120 + ".png")):
        (folder / name).write_bytes(pictures[number])
    with watching(root / "bundle", folder, overlays="all") as running:
        lines = running.wait_for_lines(2)
    assert {line["image"] for line in lines} == {"\\xff,\n.png", "\u00e9" * 120 + ".png"}
    assert all((running.out / line["overlay"]).is_file() for line in lines)
    assert [row["image"] for row in read_rows(running.out)] == [line["image"] for line in lines]
    with watching(root / "bundle", folder) as running:
        time.sleep(0.4)
        assert running.lines == lines


def test_a_file_that_is_still_being_written_waits(root: Path, pictures: list[bytes], folder: Path) -> None:
    with watching(root / "bundle", folder) as running, (folder / "slow.png").open("wb") as stream:
        for start in range(0, len(pictures[0]), 1 + len(pictures[0]) // 8):
            stream.write(pictures[0][start : start + 1 + len(pictures[0]) // 8])
            stream.flush()
            time.sleep(0.15)  # longer than settle_s: the part is no image, and the next part arrives before give_up_s
        (line,) = running.wait_for_lines(1)
        time.sleep(0.3)
        assert running.lines == [line]
    assert "verdict" in line


def test_new_content_of_a_file_is_a_new_image_and_a_new_time_is_not(
    root: Path, pictures: list[bytes], folder: Path
) -> None:
    path = folder / "latest.png"
    path.write_bytes(pictures[0])
    with watching(root / "bundle", folder, overlays="all") as running:
        running.wait_for_lines(1)
        os.utime(path, (5, 5))
        status = path.stat()
        touched = stamp_key("latest.png", status.st_size, 5_000_000_000, status.st_ctime_ns, status.st_ino)
        wait_for(lambda: touched in running.journal.processed, 10, "the touched file is listed")
        path.write_bytes(pictures[1])
        first, second = running.wait_for_lines(2)
        path.rename(folder / "renamed.png")
        renamed = running.wait_for_lines(3)[2]
    assert first["image"] == second["image"] == "latest.png"
    assert first["sha256"] != second["sha256"] == renamed["sha256"]
    assert len({line["overlay"] for line in (first, second, renamed)}) == 3
    with watching(root / "bundle", folder) as running:
        time.sleep(0.5)
        assert len(running.lines) == 3


@pytest.mark.parametrize("how", ["rewrite", "rename", "link", "link of the file"])
def test_a_file_that_is_replaced_by_a_file_of_the_same_size_and_time_is_a_new_image(
    root: Path, folder: Path, tmp_path: Path, how: str
) -> None:
    """Cameras without a clock, `cp -p`, `rsync -t` and archives do this; also while no watch is running."""
    contents = []
    for number in range(3):
        sink = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)).save(sink, "BMP")
        contents.append(sink.getvalue())
    assert len({len(content) for content in contents}) == 1
    path = folder / "latest.bmp"

    def replace(number: int) -> None:
        new = tmp_path / f"{number}.bmp"
        new.write_bytes(contents[number])
        os.utime(new, (5, 5))
        if how == "rewrite" and path.exists():
            path.write_bytes(contents[number])
            os.utime(path, (5, 5))
        elif how == "link of the file":
            path.unlink(missing_ok=True)
            path.symlink_to(new)
        elif how == "link":
            path.unlink(missing_ok=True)
            os.link(new, path)
        else:
            new.rename(path)

    for number in range(3):
        (tmp_path / f"{number}.bmp").write_bytes(contents[number])
    replace(0)
    with watching(root / "bundle", folder) as running:
        running.wait_for_lines(1)
        replace(1)
        running.wait_for_lines(2)
    replace(2)
    with watching(root / "bundle", folder) as running:
        lines = running.wait_for_lines(3)
        time.sleep(0.3)
        assert len(running.lines) == 3
    assert len({line["sha256"] for line in lines}) == 3


def test_a_file_that_is_no_image_gets_one_line_after_give_up_s_and_another_when_it_changes(
    root: Path, pictures: list[bytes], folder: Path
) -> None:
    (folder / "cut.png").write_bytes(pictures[0][:200])
    (folder / "empty.png").touch()
    (folder / "good.png").write_bytes(pictures[1])
    started = time.monotonic()
    with watching(root / "bundle", folder) as running:
        assert running.wait_for_lines(1)[0]["image"] == "good.png"
        lines = running.wait_for_lines(3)
        assert time.monotonic() - started >= QUICK["give_up_s"]
        assert {line["image"] for line in lines[1:]} == {"cut.png", "empty.png"}
        assert all("verdict" not in line for line in lines[1:])
        assert "the image is empty (0 bytes): copy it again from its source" in {line["error"] for line in lines[1:]}
        time.sleep(0.8)
        assert len(running.lines) == 3
        (folder / "cut.png").write_bytes(pictures[0])
        assert running.wait_for_lines(4)[3]["verdict"]
    assert [row["error"] != "" for row in read_rows(running.out)] == [False, True, True, False]


def test_a_file_that_cannot_be_read_is_reported_and_inspected_later(
    root: Path, pictures: list[bytes], folder: Path
) -> None:
    (folder / "locked.png").symlink_to(
        "/proc/self/mem"
    )  # reading its first byte is an input/output error, also for root
    with watching(root / "bundle", folder) as running:
        wait_for(
            lambda: "locked.png: cannot be read: Input/output error" in running.messages, 10, "the error is logged"
        )
        (folder / "good.png").write_bytes(pictures[0])
        running.wait_for_lines(1)
        (folder / "locked.png").unlink()
        (folder / "locked.png").write_bytes(pictures[1])
        assert running.wait_for_lines(2)[1]["image"] == "locked.png"


def test_a_missing_folder_is_reported_and_no_image_is_inspected_twice_when_it_returns(
    root: Path, pictures: list[bytes], folder: Path
) -> None:
    (folder / "a.png").write_bytes(pictures[0])
    with watching(root / "bundle", folder) as running:
        running.wait_for_lines(1)
        folder.rename(folder.with_name("away"))
        wait_for(
            lambda: any("waiting until it can be listed" in line for line in running.messages),
            10,
            "the folder is missed",
        )
        (folder.with_name("away") / "b.png").write_bytes(pictures[1])
        folder.with_name("away").rename(folder)
        assert [line["image"] for line in running.wait_for_lines(2)] == ["a.png", "b.png"]
    assert f"{folder}: can be listed again" in running.messages


def test_a_replaced_bundle_is_loaded_and_a_damaged_bundle_is_not(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    load.cache_clear()
    place = tmp_path / "bundle"
    shutil.copytree(root / "bundle", place)

    def load_uncached(uri: str) -> Inspector:
        return Inspector.load(uri, "cpu")

    with watching(place, folder) as running:
        running.watch.model.load = load_uncached
        (folder / "a.png").write_bytes(pictures[0])
        running.wait_for_lines(1)
        manifest = (place / "manifest.json").read_text()
        (place / "manifest.json").write_text(manifest[:-9])
        wait_for(lambda: any("keeps the model" in line for line in running.messages), 10, "the damage is logged")
        (folder / "b.png").write_bytes(pictures[1])
        running.wait_for_lines(2)
        copy_bundle(str(root / "strict"), read_manifest(root / "strict"), str(place))
        wait_for(lambda: sum("watch: model of" in line for line in running.messages) == 2, 10, "the model is loaded")
        (folder / "c.png").write_bytes(pictures[2])
        lines = running.wait_for_lines(3)
    versions = [read_manifest(root / name)["sha256"] for name in ("bundle", "bundle", "strict")]
    assert [line["bundle"] for line in lines] == versions
    assert lines[2]["verdict"] == "anomalous"


def test_a_moved_alias_is_followed(root: Path, pictures: list[bytes], folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = registry.publish(root / "bundle", "press", aliases=["production"])
    second = registry.publish(root / "strict", "press")
    with watching(registry.root, folder, version="production") as running:
        (folder / "a.png").write_bytes(pictures[0])
        running.wait_for_lines(1)
        registry.promote("press", "gear", second.name, "production")
        wait_for(lambda: sum("watch: model of" in line for line in running.messages) == 2, 10, "the model is loaded")
        (folder / "b.png").write_bytes(pictures[1])
        assert [line["bundle"] for line in running.wait_for_lines(2)] == [first.sha256, second.sha256]


@pytest.mark.parametrize("light", ["usual", "half"])
def test_a_shift_is_reported_once_and_usual_images_with_a_few_defects_are_not_reported(
    root: Path, folder: Path, tmp_path: Path, light: str
) -> None:
    write_samples(tmp_path / "new", seed=7, size_px=64, num_train=76, num_test_good=1, num_bad_per_type=1)
    good = sorted((tmp_path / "new/gear/train/good").iterdir())
    bad = sorted(path for path in (tmp_path / "new/gear/test").rglob("*.png") if path.parent.name != "good")
    for number, path in enumerate((*bad[:3], *good)):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels // 2 if light == "half" else pixels).save(folder / f"{number}.png")
    with watching(root / "bundle", folder) as running:
        running.wait_for_lines(79)  # two tests
        wait_for(lambda: running.watch.counts.total() == 79, 10, "all lines are counted")
    notices = [line for line in running.messages if re.search("score (higher|lower)", line)]
    assert len(notices) == (light == "half")
    for line in notices:
        assert re.match(r"watch: The last \d+ images score higher than the \d+ images that set the threshold", line)


def test_an_anomalous_image_runs_the_command_with_its_line_and_a_failure_is_reported(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    signals = tmp_path / "signals"
    command = ("sh", "-c", f"cat >> {signals}; exit 7")
    (folder / "a.png").write_bytes(pictures[0])
    with watching(root / "strict", folder, on_anomalous=command, report_s=0.0, overlays="anomalous") as running:
        (line,) = running.wait_for_lines(1)
        failure = "a.png: the command of --on-anomalous ended with exit status 7"
        wait_for(lambda: failure in running.messages, 10, "the failure is logged")
        wait_for(lambda: any("images per minute" in text for text in running.messages), 10, "a rate is logged")
    assert json.loads(signals.read_text()) == line
    assert "overlay" in line
    assert "1 inspected, 1 anomalous (100.0%), 0 pending" in next(
        text for text in running.messages if "per minute" in text
    )


def test_once_ends_with_3_if_a_file_was_no_image_with_0_otherwise_and_inspects_no_image_twice(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["watch", str(root / "bundle"), str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--once", "--print", "--settle-s", "0.05", "--poll-s", "0.02"]
    (folder / "a.png").write_bytes(pictures[0])
    (folder / "b.png").write_bytes(b"no image")
    assert main(words) == 3
    captured = capsys.readouterr()
    assert [json.loads(text) for text in captured.out.splitlines()] == read_lines(tmp_path / "out")
    assert captured.err.endswith("1 inspected, 0 anomalous (0.0%), 1 not an image\n")
    (folder / "c.png").write_bytes(pictures[1])
    assert main(words) == 0
    assert [line["image"] for line in read_lines(tmp_path / "out")] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--poll-s", "-1"], "--poll-s -1.0: expected seconds, 0 or more"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--output", "{folder}"], "the watched folder itself: pictures in it would be inspected; give another"),
        (["--output", "s3://plant/verdicts"], "--output s3://plant/verdicts: expected a folder of this machine"),
        (
            ["--on-anomalous", "/bin/eject 'lane 2"],
            "--on-anomalous /bin/eject 'lane 2: no command: No closing quotation",
        ),
        (["--category", "bolt"], "no model of 'bolt', only of board, gear"),
        ([], "models of board, gear: choose one with --category"),
    ],
)
def test_wrong_arguments_are_refused(
    root: Path,
    folder: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("board", "gear"):
        manifest = {**read_manifest(root / "bundle"), "category": name}
        shutil.copytree(root / "bundle", tmp_path / "run" / name)
        from focus_ray.bundle.bundle import manifest_hash

        manifest["sha256"] = manifest_hash(manifest)
        (tmp_path / "run" / name / "manifest.json").write_text(json.dumps(manifest))
    words = [word.format(folder=folder) for word in more]
    assert main(["watch", str(tmp_path / "run"), str(folder), "--output", str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "s3:").exists()


# Watches in processes

FORKS = """
import json, os, resource, signal, sys, time
from pathlib import Path
import focus_ray.bundle.inspector, focus_ray.watching.model, focus_ray.watching.watch  # imported once: each watch is a fork
from focus_ray.cli.main import main

words, runs = json.loads(sys.argv[1])
out = Path(words[words.index("--output") + 1])
written = lambda: sum(path.stat().st_size for path in out.glob("*.jsonl"))
for delay, limit in runs:
    before = written()
    child = os.fork()
    if not child:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(main(words))
    if delay is None:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    ended = 0
    while written() == before and not ended:
        ended = os.waitpid(child, os.WNOHANG)[0]
        time.sleep(0.005)
    if not ended:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def run_forks(words: list[str], *runs: tuple[float | None, int]) -> subprocess.CompletedProcess[str]:
    """Runs one watch after the other.

    Args:
        words: The command.
        runs: For each watch the seconds from its first line to its kill (None: it is not killed), and the largest file
            size in bytes (0: no limit).
    """
    return subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps([words, runs])], capture_output=True, text=True, timeout=600
    )


def fill(folder: Path, pictures: list[bytes], count: int) -> Counter[str]:
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(pictures[number % len(pictures)])
    return Counter(f"{number:03}.png" for number in range(count))


def assert_every_image_has_one_line(out: Path, expected: Counter[str]) -> None:
    lines = read_lines(out)
    assert Counter(line["image"] for line in lines) == expected
    assert [row["image"] for row in read_rows(out)] == [line["image"] for line in lines]
    drawn = {str(path.relative_to(out)) for path in (out / "overlays").rglob("*")}
    assert drawn == {line["overlay"] for line in lines}


@pytest.mark.parametrize("num_kills", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_every_image_has_one_line_one_row_and_one_overlay_after_kills_and_a_full_disk(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path, num_kills: int
) -> None:
    expected = fill(folder, pictures, 20 + 10 * num_kills)
    words = ["watch", str(root / "bundle"), str(folder), "--output", str(tmp_path / "out"), "--csv", "--overlays"]
    words += ["--settle-s", "0.01", "--poll-s", "0.01", "--batch", "2", "--once", "--device", "cpu"]
    delays = [random.uniform(0, 0.2) for _ in range(num_kills)]
    # The first run simulates a full disk by a limit of the file size, which an overlay or a line reaches.
    process = run_forks(words, (None, random.randint(2000, 12_000)), *((delay, 0) for delay in delays), (None, 0))
    assert process.stdout.splitlines()[-1] == "0", (delays, process.stderr)
    assert_every_image_has_one_line(tmp_path / "out", expected)
    num_lines_at_start = [int(number) for number in re.findall(r"where (\d+) images have a line", process.stderr)]
    assert len({count for count in num_lines_at_start if 0 < count < len(expected)}) > 1, "a kill in the middle"


def test_a_disk_that_is_full_in_the_middle_of_a_line_ends_the_watch_with_1_and_loses_nothing(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path
) -> None:
    expected = fill(folder, pictures, 8)
    words = ["watch", str(root / "bundle"), str(folder), "--output", str(tmp_path / "out"), "--csv", "--once"]
    words += ["--settle-s", "0.01", "--batch", "2", "--device", "cpu"]
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
    assert "the last line was cut off" in messages.getvalue()
    assert Counter(line["image"] for line in read_lines(tmp_path / "out")) == expected
    assert [row["image"] for row in read_rows(tmp_path / "out")] == [
        line["image"] for line in read_lines(tmp_path / "out")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_watch_with_0_and_a_summary(
    root: Path, pictures: list[bytes], folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (folder / "a.png").write_bytes(pictures[0])
    words = ["watch", str(root / "bundle"), str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "focus_ray.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: read_lines(tmp_path / "out"), 60, "the first line")
        process.send_signal(number)
        _, messages = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, messages
    assert "watch: ended: 1 inspected, " in messages.splitlines()[-1]


def test_a_folder_that_cannot_be_listed_ends_a_watch_with_once(root: Path, folder: Path) -> None:
    folder.rmdir()
    running = RunningWatch(root / "bundle", folder, once=True)
    with pytest.raises(DataError, match="No such file or directory"):
        running.watch.run(running.stop)
    running.journal.close()
