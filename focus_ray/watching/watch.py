"""The watch itself: look, wait until a file rests, inspect, write, signal; and go on whatever happens to files and folder."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from focus_ray.bundle.bundle import Bundle
from focus_ray.data.images import decode_image, encode_png
from focus_ray.drawings import MARK_WITHIN_BYTES, is_drawing
from focus_ray.errors import DataError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.shift import RecentScores, compare_stream
from focus_ray.evaluation.strip import overlay_with_strip
from focus_ray.storage import is_storage_full
from focus_ray.watching.folder import Awaited, Waiting, list_images
from focus_ray.watching.journal import Journal, key_text
from focus_ray.watching.model import WatchedModel
from focus_ray.watching.seen import content_key, stamp_key

SIGNAL_TIMEOUT_S = 10.0
OVERLAYS = "overlays"
_TOLD_AGAIN_S = 60.0
_STEM_BYTES = 200  # a file's name may have 255


class _Image(NamedTuple):
    """An image that was read. name: as it can be written.  stamp, content: its keys."""

    awaited: Awaited
    name: str
    encoded: bytes
    sha256: str
    stamp: int
    content: int


@dataclass(frozen=True)
class WatchSettings:
    """
    poll_s: between looks into the folder, at least; a look that takes longer is followed by as long a pause.
    settle_s: for which a file's size and time of change have to rest before it is read.
    give_up_s: after which a file at rest that is no image gets an error for a line; one that cannot be read is tried as often.
    batch_size: images inspected at once.  report_s: between lines that say how many came.
    overlays: of which images pictures are written: "all", "anomalous" or none.
    on_anomalous: a command and its arguments, which gets the line of each anomalous image on its standard input.
    once: to end when all that is there at the beginning is done.
    """

    poll_s: float = 0.5
    settle_s: float = 1.0
    give_up_s: float = 30.0
    batch_size: int = 8
    report_s: float = 60.0
    overlays: str | None = None
    on_anomalous: tuple[str, ...] = ()
    once: bool = False


class Watch:
    """Inspects what arrives in a folder. counts: of "normal", "anomalous" and "error" lines so far."""

    def __init__(
        self,
        folder: Path,
        model: WatchedModel,
        journal: Journal,
        settings: WatchSettings,
        log: Callable[[str], None],
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            log: told what happens.  show: given each line once it is written.
        """
        self.folder, self.model, self.journal, self.settings, self.show = folder, model, journal, settings, show
        self.counts: Counter[str] = Counter()
        self.waiting = Waiting(settings.settle_s)
        self._log, self._told = log, dict[str, float]()
        self._recent, self._recent_version = RecentScores(), ""
        self._away = False
        self._only: set[str] | None = None
        self._reported, self._before = time.monotonic(), Counter[str]()

    @property
    def num_left(self) -> int:
        """Images that are there and have no line."""
        return len(self.waiting.files)

    def run(self, stop: threading.Event) -> None:
        """Until it is told to stop; the images under way are finished.

        Raises: DataError: the verdicts cannot be written, or in `once` the folder cannot be listed.
        """
        began = time.monotonic()
        while not stop.is_set():
            started = time.monotonic()
            self.model.look()
            self._look()
            ready = self.waiting.ready(started)
            size = self.settings.batch_size
            for first in range(0, len(ready), size):
                if stop.is_set():
                    return
                self.model.look()
                self._inspect(ready[first : first + size])
                self._report()
            if self.settings.once and self._is_done(began):
                return
            self._report()
            stop.wait(max(self.settings.poll_s, time.monotonic() - started if not ready else 0))

    def _is_done(self, began: float) -> bool:
        """Whether nothing is left that time would bring to rest."""
        given_up = time.monotonic() > began + self.settings.give_up_s + self.settings.settle_s
        return given_up or all(one.not_before == math.inf for one in self.waiting.files.values())

    def _look(self) -> None:
        """Lists the folder, and takes up what has no line yet."""
        try:
            found = list_images(self.folder, self.journal.folder, self._tell)
        except OSError as error:
            if self.settings.once:
                raise DataError(f"{self.folder}: cannot be listed: {error.strerror or error}") from error
            self._away = True
            self._tell(f"{self.folder}: cannot be listed: {error.strerror or error}; waiting for it")
            self.waiting.look([], time.monotonic())
            return
        if self._away:
            self._away = False
            self._tell(f"{self.folder}: there again")
        if self.settings.once:
            if self._only is None:
                self._only = {file.image for file in found}
            found = [file for file in found if file.image in self._only]
        known = self.journal.seen.known(stamp_key(*file) for file in found)
        new = [file for file, has_line in zip(found, known, strict=True) if not has_line]
        self.waiting.look(new, time.monotonic())

    def _inspect(self, batch: Sequence[Awaited]) -> None:
        """Reads, inspects, writes and signals."""
        images = [image for one in batch if (image := self._read(one)) is not None]
        inspector = self.model.inspector
        started = time.perf_counter()
        found = inspector.inspect_each([image.encoded for image in images]) if images else []
        each_ms = round(1000 * (time.perf_counter() - started) / max(1, len(images)), 1)
        done, lines = [], []
        for image, finding in zip(images, found, strict=True):
            if isinstance(finding, DataError) and self._may_yet_come(image.awaited):
                continue
            done.append(image)
            lines.append(self._line(image, finding, inspector.bundle, each_ms))
        if not lines:
            return
        texts = self.journal.write(lines)
        for image in done:
            self.journal.seen.add(image.stamp, image.content)
            self.waiting.done(image.awaited.file.image)
        for line, text in zip(lines, texts, strict=True):
            self.counts[line.get("verdict", "error")] += 1
            self.show(text)
            if line.get("anomalous"):
                self._signal(line["image"], text)
        scores = [float(line["score"]) for line in lines if "score" in line and not line.get("trained_on")]
        self._tell_shift(inspector.bundle, scores)

    def _tell_shift(self, bundle: Bundle, scores: Sequence[float]) -> None:
        """Adds scores to the latest of this model, and tells once if they differ from those that set the threshold."""
        if bundle.version != self._recent_version:
            self._recent, self._recent_version = RecentScores(), bundle.version
        if not self._recent.add(scores):
            return
        notice = self._recent.tell(compare_stream(bundle.calibration.image_scores, self._recent.take()))
        if notice is not None:
            self._log(f"watch: {notice}")

    def _line(
        self, image: _Image, finding: Inspection | DataError, bundle: Bundle, milliseconds: float
    ) -> dict[str, Any]:
        """What is said of an image; its overlay is written."""
        line: dict[str, Any] = {
            "key": key_text(image.stamp, image.content),
            "image": image.name,
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "category": bundle.category,
        }
        if isinstance(finding, DataError):
            line["error"] = str(finding)
            self._log(f"{image.name}: {finding}")
        else:
            line |= {"verdict": finding.verdict, **finding.to_dict()}
            if self.settings.overlays == "all" or (self.settings.overlays == "anomalous" and finding.anomalous):
                line |= self._overlay(image, finding)
        return {**line, "bundle": bundle.version, "sha256": image.sha256, "milliseconds": milliseconds}

    def _read(self, one: Awaited) -> _Image | None:
        """An image that is new and did not change while it was read; None of another, which waits, is done, or is gone."""
        name = readable(one.file.image)
        try:
            with (self.folder / one.file.image).open("rb") as stream:
                encoded = stream.read(MARK_WITHIN_BYTES)
                if is_drawing(encoded):
                    self._tell(f"{self.folder}: pictures that focus_ray drew are passed over")
                    self.journal.seen.add(stamp_key(*one.file))
                    self.waiting.done(one.file.image)
                    return None
                encoded += stream.read()
                status = os.fstat(stream.fileno())
        except FileNotFoundError:
            self._tell(f"{name}: gone before it was inspected")
            self.waiting.done(one.file.image)
            return None
        except OSError as error:
            one.not_before = math.inf if self.settings.once else time.monotonic() + self.settings.give_up_s
            self._tell(f"{name}: cannot be read: {error.strerror or error}")
            return None
        if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) != one.file[1:4] or len(encoded) != status.st_size:
            return None
        sha256 = hashlib.sha256(encoded).hexdigest()
        stamp, content = stamp_key(*one.file), content_key(one.file.image, sha256)
        if content in self.journal.seen:  # touched, or shown with another time: not another image
            self.journal.seen.add(stamp)
            self.waiting.done(one.file.image)
            return None
        return _Image(one, name, encoded, sha256, stamp, content)

    def _may_yet_come(self, one: Awaited) -> bool:
        """Whether a file that is no image may still be on its way: its writer may pause for longer than it has to rest."""
        given_up = one.since + self.settings.give_up_s
        if self.settings.once or time.monotonic() >= given_up:
            return False
        one.not_before = given_up
        return True

    def _overlay(self, image: _Image, finding: Inspection) -> dict[str, str]:
        """Writes the overlay. Returns: an entry "overlay" with its path, or "overlay_error" with the reason without one.

        Raises: DataError: the disk is full, so that the verdict would find no room either.
        """
        try:
            return {"overlay": self._draw(image, finding)}
        except DataError as error:
            if is_storage_full(error):
                raise
            self._log(f"{image.name}: no overlay: {error}")
            return {"overlay_error": readable(str(error))}

    def _draw(self, image: _Image, finding: Inspection) -> str:
        """Writes the overlay. Returns: its path below the output, which no other image has, nor another content of this one."""
        path = PurePosixPath(image.name)
        stem = path.stem.encode()[:_STEM_BYTES].decode(errors="ignore")
        name = str(PurePosixPath(OVERLAYS) / path.parent / f"{stem}-{image.content:016x}.png")
        picture = overlay_with_strip(decode_image(image.encoded, None), finding)
        self.journal.write_picture(name, encode_png(picture, drawn=True))
        return name

    def _signal(self, image: str, text: str) -> None:
        """Runs the command of an anomalous image, and waits for its end."""
        if not self.settings.on_anomalous:
            return
        try:
            ended = subprocess.run(
                self.settings.on_anomalous,
                input=f"{text}\n".encode(),
                timeout=SIGNAL_TIMEOUT_S,
                stdout=2,  # standard output is for verdicts
                start_new_session=True,  # an interrupt of the watcher is none of its
                check=False,
            )
        except subprocess.TimeoutExpired:
            self._log(f"{image}: the command of --on-anomalous was ended after {SIGNAL_TIMEOUT_S:g} s")
        except OSError as error:
            self._log(f"{image}: the command of --on-anomalous cannot be run: {error}")
        else:
            if ended.returncode:
                self._log(f"{image}: the command of --on-anomalous ended with {ended.returncode}")

    def _tell(self, message: str) -> None:
        """What may come again at every look is told once a minute."""
        now = time.monotonic()
        if now < self._told.get(message, -math.inf):
            return
        self._told = {text: until for text, until in self._told.items() if until > now}
        self._told[message] = now + _TOLD_AGAIN_S
        self._log(message)

    def _report(self) -> None:
        """How many came, once a while, if any did."""
        now = time.monotonic()
        if now < self._reported + self.settings.report_s:
            return
        since = self.counts - self._before
        if since:
            minutes = (now - self._reported) / 60
            self._log(f"watch: {since.total() / minutes:.0f} images a minute: {told(since)}; {self.num_left} wait")
        self._reported, self._before = now, Counter(self.counts)


def readable(name: str) -> str:
    """As text that any file can hold: bytes that are no UTF-8 as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def told(counts: Counter[str]) -> str:
    """Counts in words, with the share of anomalous ones among those that could be inspected."""
    inspected = counts["normal"] + counts["anomalous"]
    share = f" ({counts['anomalous'] / inspected:.1%})" if inspected else ""
    errors = f", {counts['error']} no image" if counts["error"] else ""
    return f"{inspected} inspected, {counts['anomalous']} anomalous{share}{errors}"
