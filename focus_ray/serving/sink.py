"""Inspected images and scores kept as Parquet for retraining: sampled, bounded in memory, deleted after their time.

    <uri>/team=<team>/category=<category>/date=2026-01-31/part-<id>.parquet

Columns: those of docs/SERVE.md. What cannot be written is dropped and counted; a request never waits for it, nor fails.
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
from typing import Any

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


class ImageSink:
    """Takes what was inspected; a thread writes it."""

    def __init__(self, settings: Sink, measures: Measures, log: Any = lambda message, **facts: None) -> None:
        self.settings, self.measures, self.log = settings, measures, log
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self._num_bytes = 0
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
        place = (version.team, version.category)
        full = False
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
                row.update(id=f"{request_id}/{number}", time=now, image=image)
                row.update(version=version.name, bundle=version.sha256, role=role)
                self._rows[place].append(row)
                self._num_bytes += len(image)
                self.measures.sink("kept", 1)
            full = len(self._rows[place]) >= self.settings.max_rows
        if full:
            self._writer.submit(self._write)

    def flush(self) -> None:
        """Writes what is there, and deletes what is past its time; waits for both."""
        self._writer.submit(self._write).result()

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()

    def _write(self) -> None:
        with self._lock:
            rows, self._rows, self._num_bytes = self._rows, defaultdict(list), 0
        for (team, category), found in rows.items():
            if not found:
                continue
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(found, schema=SCHEMA), sink, compression="none")
            date = found[-1]["time"].date().isoformat()
            folder = join(self.settings.uri, f"team={team}", f"category={category}", f"date={date}")
            try:
                write_bytes(join(folder, f"part-{uuid.uuid4().hex}.parquet"), sink.getvalue().to_pybytes())
                self.measures.sink("written", len(found))
            except DataError as error:
                self.measures.sink("failed", len(found))
                self.log("the sink could not be written", error=str(error), num_images=len(found))
        now = datetime.now(timezone.utc)
        if self._cleaned is None or now - self._cleaned > timedelta(hours=1):
            self._cleaned = now
            try:
                remove_old(self.settings.uri, now - timedelta(days=self.settings.retention_days))
            except DataError as error:
                self.log("old images could not be deleted from the sink", error=str(error))


def remove_old(uri: str, before: datetime) -> list[str]:
    """Deletes the days that end before a time. Returns: their folders. Raises: DataError: the place cannot be reached."""
    removed = []
    for team in (name for name in list_names(uri) if name.startswith("team=")):
        for category in (name for name in list_names(join(uri, team)) if name.startswith("category=")):
            for day in list_names(join(uri, team, category)):
                match = _DATE.fullmatch(day)
                if match is None:
                    continue
                ended = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc) + timedelta(days=1)
                if ended <= before:
                    remove_folder(join(uri, team, category, day))
                    removed.append(join(uri, team, category, day))
    return removed
