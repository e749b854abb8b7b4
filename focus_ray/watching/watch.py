"""The loop of a watch: lists the folder, waits until files are settled, inspects them, writes verdicts, runs a command."""

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
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.pictures import draw_overlay_with_strip
from focus_ray.detect.shift import StreamShiftMonitor, compare_stream_with_calibration
from focus_ray.drawing.mark import MARK_WITHIN_BYTES, is_drawn_by_focus_ray
from focus_ray.errors import DataError
from focus_ray.names import escape_invalid_utf8
from focus_ray.storage.files import is_storage_full, write_bytes
from focus_ray.watching.folder import ListedFile, PendingFile, PendingFiles, list_images
from focus_ray.watching.journal import VerdictJournal, format_image_key
from focus_ray.watching.model import ReloadableModel
from focus_ray.watching.processed_keys import compute_content_key, compute_stamp_key

ANOMALY_COMMAND_TIMEOUT_S = 10.0
OVERLAY_FOLDER = PurePosixPath("overlays")
_REPEAT_MESSAGE_S = 60.0
_MAX_STEM_BYTES = 200  # a file name may have 255 bytes, and needs room for the content key and the suffix


class _LoadedImage(NamedTuple):
    """A pending file with its bytes, after it was read.

    Attributes:
        pending: The file in the list of pending files.
        name: Path relative to the folder as valid UTF-8 text (`escape_invalid_utf8`).
        encoded: Bytes of the file.
        sha256: Hash of these bytes.
        content: `processed_keys.compute_content_key` of the file: identifies path and bytes.
    """

    pending: PendingFile
    name: str
    encoded: bytes
    sha256: str
    content: int


@dataclass(frozen=True)
class WatchSettings:
    """Settings of a watch.

    Attributes:
        poll_s: Least number of seconds between two listings of the folder. If a listing takes longer, the pause is as long as
            the listing.
        settle_s: A file is read when its size and times have not changed for this many seconds. It is then settled.
        give_up_s: A settled file that cannot be decoded gets an error line when it has not changed for this many seconds. A file
            that cannot be read is tried again at this interval.
        batch_size: Number of images that are inspected at once.
        report_s: Seconds between two messages about the rate of images.
        overlays: "all" writes an overlay (the image with its heat map) for each image, "anomalous" for each anomalous image,
            None writes no overlay.
        on_anomalous: Command and arguments. It runs for each anomalous image, with the image's line on standard input.
        once: If True, the watch ends when all files that existed at its start are processed.
    """

    poll_s: float = 0.5
    settle_s: float = 1.0
    give_up_s: float = 30.0
    batch_size: int = 8
    report_s: float = 60.0
    overlays: str | None = None
    on_anomalous: tuple[str, ...] = ()
    once: bool = False


class FolderWatch:
    """Inspects the images that arrive in a folder, and writes one journal line for each image.

    Attributes:
        counts: "normal", "anomalous" or "error" -> number of journal lines that this watch wrote.
    """

    def __init__(
        self,
        folder: Path,
        model: ReloadableModel,
        journal: VerdictJournal,
        settings: WatchSettings,
        log: Callable[[str], None],
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepares a watch; `run` starts it.

        Args:
            folder: Folder to watch.
            model: Model that inspects the images.
            journal: Writes the lines into the output folder.
            settings: Settings of the watch.
            log: Called with each message.
            show: Called with the JSON text of each line after it is written.
        """
        self.folder, self.model, self.journal, self.settings, self.show = folder, model, journal, settings, show
        self.counts: Counter[str] = Counter()
        self.pending = PendingFiles()
        self._log, self._silent_until_s = log, dict[str, float]()
        self._recent_scores, self._recent_version = StreamShiftMonitor(), ""
        self._folder_is_missing = False
        self._files_at_start: set[str] | None = None
        self._reported_at_s, self._reported_counts = time.monotonic(), Counter[str]()

    def run(self, stop: threading.Event) -> None:
        """Watches the folder until `stop` is set; the current batch is finished first.

        A watch with the setting `once` also ends when all files that existed at the start are processed, or when its time for
        retries is over.

        Raises:
            DataError: The lines cannot be written, the disk is full, or the folder cannot be listed while `once` is set.
        """
        watch_start_s = time.monotonic()
        while not stop.is_set():
            pass_start_s = time.monotonic()
            self.model.reload_if_changed()
            self._update_pending_files()
            ready = self.pending.list_ready_files(self.settings.settle_s, pass_start_s)
            size = self.settings.batch_size
            for first in range(0, len(ready), size):
                if stop.is_set():
                    return
                self.model.reload_if_changed()
                self._inspect_batch(ready[first : first + size])
                self._log_image_rate()
            if self.settings.once and self._is_finished(watch_start_s):
                return
            self._log_image_rate()
            stop.wait(max(self.settings.poll_s, time.monotonic() - pass_start_s if not ready else 0))

    def _is_finished(self, watch_start_s: float) -> bool:
        """Returns whether a watch with the setting `once` has no file left to try, or its time for retries is over."""
        is_timed_out = time.monotonic() > watch_start_s + self.settings.give_up_s + self.settings.settle_s
        return is_timed_out or all(pending.retry_at_s == math.inf for pending in self.pending.values())

    def _update_pending_files(self) -> None:
        """Lists the folder and updates the pending files (files that are not processed yet).

        If the folder cannot be listed, logs this, and no file is pending until it can be listed again.

        Raises:
            DataError: The folder cannot be listed, and the setting `once` is on.
        """
        try:
            listing = list_images(self.folder, self.journal.folder, self._log_at_most_once_a_minute)
        except OSError as error:
            message = f"{self.folder}: cannot be listed: {error.strerror or error}"
            if self.settings.once:
                raise DataError(message) from error
            self._log_at_most_once_a_minute(f"{message}; waiting until it can be listed")
            self._folder_is_missing, listing = True, []
        else:
            if self._folder_is_missing:
                self._log_at_most_once_a_minute(f"{self.folder}: can be listed again")
            self._folder_is_missing = False
        if self.settings.once:
            if self._files_at_start is None:
                self._files_at_start = {file.image for file in listing}
            listing = [file for file in listing if file.image in self._files_at_start]
        is_processed = self.journal.processed_keys.contains_each([compute_stamp_key(file) for file in listing])
        new = [file for file, is_done in zip(listing, is_processed, strict=True) if not is_done]
        self.pending.update_from_listing(new, time.monotonic())

    def _inspect_batch(self, batch: Sequence[PendingFile]) -> None:
        """Reads and inspects a batch of files, writes their lines, and runs the command of --on-anomalous for anomalous images.

        A file that cannot be decoded may be incomplete, because a writer can pause longer than `settle_s`. It is tried again
        after `give_up_s`. Then, or at once if the setting `once` is on, it counts as complete and gets an error line.

        Raises:
            DataError: The lines cannot be written, or the disk is full.
        """
        images = [image for pending in batch if (image := self._read_image(pending)) is not None]
        inspector = self.model.inspector
        start_s = time.perf_counter()
        results = inspector.inspect_or_return_errors([image.encoded for image in images]) if images else []
        each_ms = round(1000 * (time.perf_counter() - start_s) / max(1, len(images)), 1)
        finished, lines = [], []
        for image, result in zip(images, results, strict=True):
            give_up_at_s = image.pending.unchanged_since_s + self.settings.give_up_s
            if isinstance(result, DataError) and not self.settings.once and time.monotonic() < give_up_at_s:
                image.pending.retry_at_s = give_up_at_s
                continue
            finished.append(image)
            lines.append(self._build_journal_line(image, result, inspector.bundle, each_ms))
        if not lines:
            return
        texts = self.journal.write_lines(lines)
        for image in finished:
            self._mark_processed(image.pending, image.content)
        for line, text in zip(lines, texts, strict=True):
            self.counts[line.get("verdict", "error")] += 1
            self.show(text)
            if line.get("anomalous") and self.settings.on_anomalous:
                self._run_anomaly_command(line["image"], text)
        scores = [float(line["score"]) for line in lines if "score" in line and not line.get("trained_on")]
        self._check_score_shift(inspector.bundle, scores)

    def _mark_processed(self, pending: PendingFile, *keys: int) -> None:
        """Removes a file from the pending files, and stores its keys, so that the file is not inspected again.

        Args: keys: further keys of the file, in addition to its `compute_stamp_key`.
        """
        self.journal.processed_keys.add(compute_stamp_key(pending.file), *keys)
        del self.pending[pending.file.image]

    def _check_score_shift(self, bundle: Bundle, scores: Sequence[float]) -> None:
        """Adds scores of new images to the model's recent scores, and at intervals tests the recent scores for a shift.

        Logs a message if the recent scores differ from the scores that set the threshold. Repeats it only after the scores
        were normal again.
        """
        if bundle.version != self._recent_version:
            self._recent_scores, self._recent_version = StreamShiftMonitor(), bundle.version
        if not self._recent_scores.add(scores):
            return
        notice = self._recent_scores.report_shift_once(
            compare_stream_with_calibration(bundle.calibration.image_scores, self._recent_scores.take_scores_for_test())
        )
        if notice is not None:
            self._log(f"watch: {notice}")

    def _build_journal_line(
        self, image: _LoadedImage, result: Inspection | DataError, bundle: Bundle, milliseconds: float
    ) -> dict[str, Any]:
        """Returns the journal line of an image as a dict of JSON values, and writes an overlay if the settings request one.

        Logs the reason if the file cannot be inspected.

        Args:
            image: The inspected image.
            result: Result of the inspection, or the reason why the file cannot be inspected.
            bundle: Model that inspected the image.
            milliseconds: Mean duration of the inspection per image of the batch.

        Raises:
            DataError: The overlay cannot be written because the disk is full.
        """
        line: dict[str, Any] = {
            "key": format_image_key(compute_stamp_key(image.pending.file), image.content),
            "image": image.name,
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "category": bundle.category,
        }
        if isinstance(result, DataError):
            line["error"] = str(result)
            self._log(f"{image.name}: {result}")
        else:
            line |= {"verdict": result.verdict, **result.to_dict()}
            if self.settings.overlays == "all" or (self.settings.overlays == "anomalous" and result.anomalous):
                line |= self._write_overlay(image, result)
        return {**line, "bundle": bundle.version, "sha256": image.sha256, "milliseconds": milliseconds}

    def _read_image(self, pending: PendingFile) -> _LoadedImage | None:
        """Reads a pending file, and updates the pending and processed files if there is nothing to inspect.

        Returns:
            The image. None if the file changed since it was listed, has the path and bytes of a processed file, is a picture
            that focus_ray drew, was deleted, or cannot be read.
        """
        file, name = pending.file, escape_invalid_utf8(pending.file.image)
        try:
            with (self.folder / file.image).open("rb") as stream:
                encoded = stream.read(MARK_WITHIN_BYTES)
                if is_drawn_by_focus_ray(encoded):
                    self._log_at_most_once_a_minute(f"{self.folder}: images that focus_ray drew are skipped")
                    self._mark_processed(pending)
                    return None
                encoded += stream.read()
                status = os.fstat(stream.fileno())
        except FileNotFoundError:
            self._log_at_most_once_a_minute(f"{name}: was deleted before it was inspected")
            del self.pending[file.image]
            return None
        except OSError as error:
            pending.retry_at_s = math.inf if self.settings.once else time.monotonic() + self.settings.give_up_s
            self._log_at_most_once_a_minute(f"{name}: cannot be read: {error.strerror or error}")
            return None
        if ListedFile.from_status(file.image, status)[:-1] != file[:-1] or len(encoded) != status.st_size:
            return None
        sha256 = hashlib.sha256(encoded).hexdigest()
        content = compute_content_key(file.image, sha256)
        if content in self.journal.processed_keys:  # same bytes, other times: not a new image
            self._mark_processed(pending)
            return None
        return _LoadedImage(pending, name, encoded, sha256, content)

    def _write_overlay(self, image: _LoadedImage, result: Inspection) -> dict[str, str]:
        """Draws and writes the overlay of an image, completely or not at all, even if the process is killed.

        Returns:
            {"overlay": path relative to the output folder}, or {"overlay_error": reason} if it cannot be written. The path
            contains the content key, so every image and every content has its own path.

        Raises:
            DataError: The disk is full. The journal line cannot be written either.
        """
        path = PurePosixPath(image.name)
        stem = path.stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")
        name = str(OVERLAY_FOLDER / path.parent / f"{stem}-{image.content:016x}.png")
        try:
            write_bytes(self.journal.folder / name, draw_overlay_with_strip(image.encoded, result))
        except DataError as error:
            if is_storage_full(error):
                raise
            self._log(f"{image.name}: no overlay: {error}")
            return {"overlay_error": escape_invalid_utf8(error)}
        return {"overlay": name}

    def _run_anomaly_command(self, image: str, text: str) -> None:
        """Runs the command of --on-anomalous with an image's line on standard input, and waits until it ends.

        Kills the command after `ANOMALY_COMMAND_TIMEOUT_S`. Logs any failure instead of raising it.

        Args:
            image: Name of the image for messages.
            text: VerdictJournal line of the image as JSON text.
        """
        try:
            process = subprocess.run(
                self.settings.on_anomalous,
                input=f"{text}\n".encode(),
                timeout=ANOMALY_COMMAND_TIMEOUT_S,
                stdout=2,  # standard output is reserved for verdicts
                start_new_session=True,  # an interrupt of the watch must not end the command
                check=False,
            )
        except subprocess.TimeoutExpired:
            self._log(f"{image}: the command of --on-anomalous was killed after {ANOMALY_COMMAND_TIMEOUT_S:g} s")
        except OSError as error:
            self._log(f"{image}: the command of --on-anomalous cannot be run: {error}")
        else:
            if process.returncode:
                self._log(f"{image}: the command of --on-anomalous ended with exit status {process.returncode}")

    def _log_at_most_once_a_minute(self, message: str) -> None:
        """Logs a message, but the same message at most once a minute, because it may repeat at every listing."""
        now = time.monotonic()
        if now < self._silent_until_s.get(message, -math.inf):
            return
        self._silent_until_s = {text: until for text, until in self._silent_until_s.items() if until > now}
        self._silent_until_s[message] = now + _REPEAT_MESSAGE_S
        self._log(message)

    def _log_image_rate(self) -> None:
        """Logs the number of images per minute if the last report is `report_s` seconds old and images were processed since."""
        now = time.monotonic()
        if now < self._reported_at_s + self.settings.report_s:
            return
        new_counts = self.counts - self._reported_counts
        if new_counts:
            minutes = (now - self._reported_at_s) / 60
            self._log(
                f"watch: {new_counts.total() / minutes:.0f} images per minute: {format_verdict_counts(new_counts)}, "
                f"{len(self.pending)} pending"
            )
        self._reported_at_s, self._reported_counts = now, Counter(self.counts)


def format_verdict_counts(counts: Counter[str]) -> str:
    """Returns the counts of verdicts as text, such as "8 inspected, 2 anomalous (25.0%), 1 not an image"."""
    inspected = counts["normal"] + counts["anomalous"]
    share = f" ({counts['anomalous'] / inspected:.1%})" if inspected else ""
    errors = f", {counts['error']} not an image" if counts["error"] else ""
    return f"{inspected} inspected, {counts['anomalous']} anomalous{share}{errors}"
