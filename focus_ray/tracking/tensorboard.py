"""TensorBoard: an event file a subject, in a folder of its group's. Written by tensorboardX, as Ray Tune does."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_ray.config import TrackerConfig
from focus_ray.extras import require_extra
from focus_ray.tracking.base import Picture, Subject, local_folder

_KEY = "subject.key"  # file beside the events: whose they are
_FLUSH_S = 10


class _Tracked:
    def __init__(self, writer: Any, subject: Subject) -> None:
        self.writer = writer
        # the HPARAMS tab reads these; what it shows beside them it takes from the scalars
        from tensorboardX.summary import hparams

        _, start, _ = hparams(dict(subject.parameters), {})
        self.writer.file_writer.add_summary(start)
        self.writer.add_text("parameters", _table(subject.parameters))
        self.tags: dict[str, str] = {}
        self.tag(subject.tags)

    def tag(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)
        self.writer.add_text("tags", _table(self.tags))

    def curve(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def figures(self, figures: Mapping[str, float]) -> None:
        self.curve(0, figures)

    def pictures(self, pictures: Sequence[Picture]) -> None:
        import numpy as np
        from PIL import Image

        for picture in pictures:
            pixels = np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB"))
            self.writer.add_image(f"heat_maps/{picture.name}", pixels, 0, dataformats="HWC")
        self.writer.add_text("heat_maps", _table({picture.name: picture.caption for picture in pictures}))
        self.writer.flush()

    def end(self, failed: bool) -> None:
        self.writer.close()


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _place(self, subject: Subject) -> Path:
        folder = self.folder / subject.name
        if _is_of(folder, subject.key):
            return folder
        # another run of that name, from another storage
        return folder.with_name(f"{folder.name}-{hashlib.sha256(subject.key.encode()).hexdigest()[:6]}")

    def has(self, subject: Subject) -> bool:
        return (self._place(subject) / _KEY).is_file()

    def begin(self, subject: Subject) -> _Tracked:
        import tensorboardX

        folder = self._place(subject)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _KEY).write_text(subject.key, encoding="utf-8")
        return _Tracked(tensorboardX.SummaryWriter(str(folder), flush_secs=_FLUSH_S), subject)


def _is_of(folder: Path, key: str) -> bool:
    file = folder / _KEY
    return not file.is_file() or file.read_text(encoding="utf-8") == key


def _table(rows: Mapping[str, Any]) -> str:
    """Markdown."""
    cells = (f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])


class TensorBoard:
    def check(self, settings: TrackerConfig, storage: str) -> str:
        require_extra("tensorboard", "trackers.tensorboard")
        return local_folder("tensorboard", settings, storage)

    def open(self, settings: TrackerConfig, storage: str) -> _TensorBoard:
        return _TensorBoard(local_folder("tensorboard", settings, storage))


TENSORBOARD = TensorBoard()
