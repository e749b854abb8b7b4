"""The tracker TensorBoard: one folder with event files per run, below the folder of its parent run. Uses tensorboardX.

An event file is TensorBoard's file format for curves, texts and pictures.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_ray.errors import check_extra_is_installed
from focus_ray.tracking.base import Picture, RunDescription, Tracker, find_writable_folder
from focus_ray.tracking.settings import TrackerConfig

_KEY = "subject.key"  # file next to the events with the key of their run
_FLUSH_S = 10


class _TensorBoardRun:
    """An open run in TensorBoard, as `TrackerRun`; it writes an event file."""

    def __init__(self, writer: Any, run: RunDescription) -> None:
        """Writes parameters and tags of a run to an event file. writer: a `tensorboardX.SummaryWriter`."""
        self.writer = writer
        # The HPARAMS tab of TensorBoard reads this summary, and takes the metrics from the scalars.
        from tensorboardX.summary import hparams

        _, start, _ = hparams(dict(run.parameters), {})
        self.writer.file_writer.add_summary(start)
        self.writer.add_text("parameters", _format_markdown_table(run.parameters))
        self.tags: dict[str, str] = {}
        self.set_tags(run.tags)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or replaces existing tags."""
        self.tags.update(tags)
        self.writer.add_text("tags", _format_markdown_table(self.tags))

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the value of each metric to its curve at a step."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics that have one value per run, as curves with one point at step 0."""
        self.log_step(0, metrics)

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Adds pictures, and a table with their captions."""

        import numpy as np
        from PIL import Image

        for picture in pictures:
            pixels = np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB"))
            self.writer.add_image(f"heat_maps/{picture.name}", pixels, 0, dataformats="HWC")
        self.writer.add_text(
            "heat_maps", _format_markdown_table({picture.name: picture.caption for picture in pictures})
        )
        self.writer.flush()

    def end(self, failed: bool) -> None:
        """Closes the event file. TensorBoard does not store whether a run failed."""
        self.writer.close()


class TensorBoardTracker(Tracker):
    """The tracker TensorBoard, opened: a folder of event files on this machine."""

    @classmethod
    def check(cls, settings: TrackerConfig, storage: str) -> str:
        """Checks that tensorboardX is installed and that the folder can be written. Returns the folder for the event files.

        Raises:
            MissingPackageError: The package extra `tensorboard` is not installed.
            ConfigError: The folder is not on this machine, or cannot be written.
        """
        check_extra_is_installed("tensorboard", "trackers.tensorboard")
        return find_writable_folder("tensorboard", settings, storage)

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        """Checks that the folder for the event files can be written. Raises: ConfigError: it cannot."""
        self.folder = Path(find_writable_folder("tensorboard", settings, storage))

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if the folder of the run exists and belongs to this run."""
        return (self._find_run_folder(run) / _KEY).is_file()

    def begin_run(self, run: RunDescription) -> _TensorBoardRun:
        """Opens a new event file in the folder of the run with the key `run.key`. Creates the folder if it does not exist."""
        import tensorboardX

        folder = self._find_run_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _KEY).write_text(run.key, encoding="utf-8")
        return _TensorBoardRun(tensorboardX.SummaryWriter(str(folder), flush_secs=_FLUSH_S), run)

    def _find_run_folder(self, run: RunDescription) -> Path:
        """Returns the folder of a run. It has the name of the run, and a suffix if a run with another key uses this folder."""
        folder = self.folder / run.name
        file = folder / _KEY
        if not file.is_file() or file.read_text(encoding="utf-8") == run.key:
            return folder
        # The folder belongs to a run with the same name from another storage: add a part of the key.
        return folder.with_name(f"{folder.name}-{hashlib.sha256(run.key.encode()).hexdigest()[:6]}")


def _format_markdown_table(rows: Mapping[str, Any]) -> str:
    """Returns a Markdown table with one row (name, value) for each entry of a mapping."""
    cells = (f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])
