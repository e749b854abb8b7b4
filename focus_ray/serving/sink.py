"""Stores a sample of the inspected images and scores as Parquet for retraining, and deletes it after the retention time.

    <uri>/team=<team>/date=2026-01-31/part-<id>.parquet

A row of a file holds an image and its result. A flush writes one file for each team, with the waiting rows of all its
categories. docs/use/serving.md lists the columns. If a file cannot be written, it waits for the next flush. Waiting rows and
files share one memory limit; images above the limit are dropped and counted. A request never waits for the sink, and no error
of the sink makes a request fail. The writer logs errors and continues.
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
from focus_ray.detect.inspection import Inspection
from focus_ray.errors import DataError
from focus_ray.serving.logs import log_event
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.settings import SinkSettings
from focus_ray.storage.files import join_path, list_folder_entries, remove_folder, write_bytes

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # request id, and the number of the image in the request
        pa.field("category", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # the file of the request, unchanged
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
FLUSH_EVERY_S = 60.0  # a crash loses the images of a minute at most
MAX_ROWS = 256  # a file is written earlier when a team has this number of waiting images
MAX_BUFFER_BYTES = 64 * 2**20  # of images that wait to be written; further images are dropped
_DATE = re.compile(r"date=(\d{4}-\d{2}-\d{2})")


class _PendingFile(NamedTuple):
    """A Parquet file that waits to be written.

    Attributes:
        uri: location of the file.
        content: bytes of the file.
        num_images: number of its images.
        size: number of bytes of its images, which counts towards the memory limit.
    """

    uri: str
    content: bytes
    num_images: int
    size: int


class ImageSink:
    """Stores a random sample of the inspected images and their results; a thread writes them as Parquet files."""

    def __init__(self, settings: SinkSettings, metrics: MetricsRecorder) -> None:
        self.settings, self.metrics = settings, metrics
        self._lock = threading.Lock()
        self._rows_by_team: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by team
        self._num_bytes = 0  # of the images in waiting rows and files
        self._unwritten_files: list[_PendingFile] = []  # of earlier flushes; only the writer thread uses it
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._last_cleanup: datetime | None = None

    def sample_images(
        self,
        version: Version,
        request_id: str,
        images: Sequence[bytes],
        results: Sequence[Inspection | ImageError],
        role: str = "answer",
    ) -> None:
        """Chooses images of a request at random, and holds them in memory until the next write. Does not block.

        Images above the memory limit are dropped and counted. Images that cannot be read are never chosen.

        Args:
            version: version that scored the images.
            images: encoded image files of the request.
            results: result of each image, in order.
            role: role of the version: answer, canary or shadow.
        """
        now = datetime.now(timezone.utc)
        is_full = False
        with self._lock:
            rows = self._rows_by_team[version.team]
            for number, (image, result) in enumerate(zip(images, results, strict=True)):
                if isinstance(result, ImageError):
                    continue
                share = self.settings.share_anomalous if result.anomalous else self.settings.share
                if random.random() >= share:
                    continue
                if self._num_bytes + len(image) > MAX_BUFFER_BYTES:
                    self._count_images("dropped", 1)
                    continue
                columns = ("width", "height", "score", "p_value", "anomalous")
                row = {name: getattr(result, name) for name in columns}
                row.update(id=f"{request_id}/{number}", category=version.category, time=now, image=image)
                row.update(version=version.name, bundle=version.sha256, role=role)
                rows.append(row)
                self._num_bytes += len(image)
                self._count_images("kept", 1)
                is_full |= len(rows) == MAX_ROWS
        if is_full:
            self._writer.submit(self._write_and_clean_up)

    def flush(self) -> None:
        """Writes the waiting images and deletes old images; waits for both. Logs errors instead of raising them."""
        self._writer.submit(self._write_and_clean_up).result()

    def close(self) -> None:
        """Writes the waiting images, and ends the writer thread. Logs errors instead of raising them.

        Images in files that cannot be written now are lost, and counted as failed.
        """
        self.flush()
        self._writer.shutdown()
        if self._unwritten_files:
            self._count_images("failed", sum(file.num_images for file in self._unwritten_files))

    def _count_images(self, outcome: str, count: int) -> None:
        """Adds `count` images to the metric `sink_images`.

        Args: outcome: what happened to the images: kept (wait for writing), dropped (above the memory limit), written, delayed
            (the first write failed) or failed (lost at the end).
        """
        self.metrics.record("sink_images", count, outcome=outcome)

    def _write_and_clean_up(self) -> None:
        """Writes files and deletes old images; runs in the writer thread. Logs errors instead of raising them."""
        for step in (self._write_files, self._delete_expired_images):
            try:
                step()
            except Exception as error:  # any error: the next flush must still run
                log_event("a flush of the sink failed", error=f"{type(error).__name__}: {error}")

    def _write_files(self) -> None:
        """Writes the files that failed before, and a file for each team with waiting rows. A failed file waits for a retry."""
        with self._lock:
            rows_by_team, self._rows_by_team = self._rows_by_team, defaultdict(list)
        delayed_files, self._unwritten_files = self._unwritten_files, []
        new_files = [self._encode_rows(team, rows) for team, rows in rows_by_team.items() if rows]
        for file in (*delayed_files, *new_files):
            try:
                # A retry uses the same name. If the file was written and only the answer was lost, the retry overwrites it.
                write_bytes(file.uri, file.content)
            except Exception as error:  # any error of any storage
                if file in new_files:
                    self._count_images("delayed", file.num_images)
                log_event("the sink could not be written", error=str(error), num_images=file.num_images)
                self._unwritten_files.append(file)
                continue
            self._count_images("written", file.num_images)
            with self._lock:
                self._num_bytes -= file.size

    def _delete_expired_images(self) -> None:
        """Deletes images that are older than the retention time. Does nothing within an hour after the last deletion.

        Raises: DataError: as `delete_old_images`.
        """
        now = datetime.now(timezone.utc)
        if self._last_cleanup is None or now - self._last_cleanup > timedelta(hours=1):
            self._last_cleanup = now
            retention = timedelta(
                days=min(self.settings.retention_days, 100_000.0)
            )  # so that the limit is a valid date
            delete_old_images(self.settings.uri, now - retention)

    def _encode_rows(self, team: str, rows: Sequence[dict[str, Any]]) -> _PendingFile:
        """Encodes the rows of a team as a Parquet file, and chooses its location."""
        size = sum(len(row["image"]) for row in rows)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), sink, compression="none")
        folder = join_path(self.settings.uri, f"team={team}", f"date={rows[-1]['time'].date().isoformat()}")
        return _PendingFile(
            join_path(folder, f"part-{uuid.uuid4().hex}.parquet"), sink.getvalue().to_pybytes(), len(rows), size
        )


def delete_old_images(uri: str, limit: datetime) -> list[str]:
    """Deletes the sink's folders of days (`date=2026-01-31`, in UTC) that ended at or before `limit`, for all teams.

    Other folders stay. If a folder cannot be deleted or has an invalid date, logs this and continues with the next folder.

    Args:
        uri: location of the sink.
        limit: time with a time zone.

    Returns: the deleted folders.

    Raises: DataError: `uri`, the folder of a team or the folder of a category cannot be listed. All later folders stay.
    """
    deleted = []
    for team in (join_path(uri, name) for name in list_folder_entries(uri) if name.startswith("team=")):
        days = [join_path(team, name) for name in list_folder_entries(team)]
        # old releases had a folder for each category
        for category in [folder for folder in days if "/category=" in folder.removeprefix(team)]:
            days += [join_path(category, name) for name in list_folder_entries(category)]
        for day in days:
            match = _DATE.fullmatch(day.rpartition("/")[2])
            if match is None:
                continue
            try:
                ended = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc) + timedelta(days=1)
                if ended <= limit:
                    remove_folder(day)
                    deleted.append(day)
            except (ValueError, OverflowError) as error:
                log_event("a folder of the sink has an invalid date and stays", folder=day, error=str(error))
            except DataError as error:
                log_event("old images could not be deleted from the sink", folder=day, error=str(error))
    return deleted
