"""Inspected images and scores kept as Parquet for retraining: sampled, bounded in memory, deleted after their time.

    <uri>/team=<team>/date=2026-01-31/part-<id>.parquet

A flush writes one file a team, with what waits of all its categories. Columns: those of docs/use/serving.md. A file that cannot
be written waits, within the same bound, for the next flush; for what comes beyond the bound there is no room: it is dropped and
counted. A request never waits for the sink, nor fails. No error ends the writer: it logs the error and goes on.
"""

from __future__ import annotations

import random
import re
import threading
import uuid
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.errors import DataError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.serving.measures import Measures
from focus_ray.serving.settings import MIB, Sink
from focus_ray.storage import join, list_names, remove_folder, write_bytes

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # request id and the image's place in it
        pa.field("category", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the file as it came
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("p_value", pa.float64(), nullable=False),
        pa.field("anomalous", pa.bool_(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("bundle", pa.string(), nullable=False),  # SHA-256 of the manifest
        pa.field("role", pa.string(), nullable=False),  # answer, canary or shadow
    ]
)
_DATE = re.compile(r"date=(\d{4}-\d{2}-\d{2})")


class _File(NamedTuple):
    """What is to be written. size: of the images in it, as they count in the buffer."""

    uri: str
    content: bytes
    num_images: int
    size: int


class ImageSink:
    """Takes what was inspected; a thread writes it."""

    def __init__(self, settings: Sink, measures: Measures, log: Any = lambda message, **facts: None) -> None:
        self.settings, self.measures, self.log = settings, measures, log
        self._lock = threading.Lock()
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by team
        self._num_bytes = 0  # of images that wait, as rows and in files
        self._waiting: list[_File] = []  # could not be written so far; the writer's own
        self._is_asked = False  # full, and the writer has been told
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._cleaned: datetime | None = None

    def offer(
        self,
        version: Version,
        request_id: str,
        images: Sequence[bytes],
        results: Sequence[Inspection | ImageError],
        role: str = "answer",
    ) -> None:
        """Keeps a sample; returns at once."""
        now = datetime.now(timezone.utc)
        with self._lock:
            for number, (image, result) in enumerate(zip(images, results, strict=True)):
                if isinstance(result, ImageError):
                    continue
                share = self.settings.share_anomalous if result.anomalous else self.settings.share
                if random.random() >= share:
                    continue
                if self._num_bytes + len(image) > self.settings.max_buffer_mb * MIB:
                    self.measures.sink("dropped", 1)
                    continue
                row: dict[str, Any] = {
                    name: getattr(result, name) for name in ("width", "height", "score", "p_value", "anomalous")
                }
                row.update(id=f"{request_id}/{number}", category=version.category, time=now, image=image)
                row.update(version=version.name, bundle=version.sha256, role=role)
                self._rows[version.team].append(row)
                self._num_bytes += len(image)
                self.measures.sink("kept", 1)
            full = len(self._rows[version.team]) >= self.settings.max_rows and not self._is_asked
            self._is_asked |= full
        if full:
            self._writer.submit(self._write)

    def flush(self) -> None:
        """Writes what is there, and deletes what is past its time; waits for both. Raises nothing: errors are logged."""
        try:
            self._writer.submit(self._write).result()
        except RuntimeError as error:  # after `close`
            self.log("the sink was flushed after its end", error=str(error))

    def close(self) -> None:
        """Writes what is there; what cannot be written now is lost, and counted."""
        self.flush()
        self._writer.shutdown()
        if self._waiting:
            self.measures.sink("failed", sum(file.num_images for file in self._waiting))

    def _write(self) -> None:
        for step in (self._write_files, self._clean):
            try:
                step()
            except Exception as error:  # whatever it is, the next flush must come
                self.log("a flush of the sink failed", error=f"{type(error).__name__}: {error}")

    def _write_files(self) -> None:
        with self._lock:
            rows, self._rows, self._is_asked = self._rows, defaultdict(list), False
        files, self._waiting = self._waiting, []
        new = [file for team, waiting in rows.items() if waiting and (file := self._file(team, waiting))]
        for number, file in enumerate([*files, *new]):
            try:
                # under the name of the first attempt: one whose answer alone was lost is written over and not doubled
                write_bytes(file.uri, file.content)
            except Exception as error:  # of any storage
                if number >= len(files):
                    self.measures.sink("delayed", file.num_images)
                self.log("the sink could not be written", error=str(error), num_images=file.num_images)
                self._waiting.append(file)
                continue
            self.measures.sink("written", file.num_images)
            self._release(file.size)

    def _clean(self) -> None:
        now = datetime.now(timezone.utc)
        if self._cleaned is None or now - self._cleaned > timedelta(hours=1):
            self._cleaned = now
            try:
                before = now - timedelta(days=self.settings.retention_days)
            except OverflowError:  # kept for longer than dates go back
                return
            remove_old(self.settings.uri, before, self.log)

    def _release(self, size: int) -> None:
        with self._lock:
            self._num_bytes -= size

    def _file(self, team: str, rows: Sequence[dict[str, Any]]) -> _File | None:
        """The file of a team's rows; None where they do not fit the schema: they are lost, and counted."""
        size = sum(len(row["image"]) for row in rows)
        sink = pa.BufferOutputStream()
        try:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), sink, compression="none")
        except (pa.ArrowException, ValueError, OverflowError) as error:
            self.log("images do not fit the sink's columns", error=str(error), num_images=len(rows), team=team)
            self.measures.sink("failed", len(rows))
            self._release(size)
            return None
        folder = join(self.settings.uri, f"team={team}", f"date={rows[-1]['time'].date().isoformat()}")
        return _File(join(folder, f"part-{uuid.uuid4().hex}.parquet"), sink.getvalue().to_pybytes(), len(rows), size)


def remove_old(uri: str, before: datetime, log: Any = lambda message, **facts: None) -> list[str]:
    """Deletes the days that end before a time. A folder that is no day stays; a day that cannot be deleted is logged.

    Returns: the folders that went.  Raises: DataError: the place cannot be listed.
    """
    removed = []
    for team in (join(uri, name) for name in list_names(uri) if name.startswith("team=")):
        days = [join(team, name) for name in list_names(team)]
        for category in [place for place in days if "/category=" in place.removeprefix(team)]:  # so it once was
            days += [join(category, name) for name in list_names(category)]
        for day in days:
            match = _DATE.fullmatch(day.rpartition("/")[2])
            if match is None:
                continue
            try:
                ended = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc) + timedelta(days=1)
                if ended <= before:
                    remove_folder(day)
                    removed.append(day)
            except (ValueError, OverflowError) as error:
                log("a folder of the sink names no day, and stays", folder=day, error=str(error))
            except DataError as error:
                log("old images could not be deleted from the sink", folder=day, error=str(error))
    return removed
