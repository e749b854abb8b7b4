"""Weights & Biases: a run a subject, in its group; offline, in files that `wandb sync` uploads, unless a key is set."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from focus_ray.config import TrackerConfig
from focus_ray.errors import ConfigError
from focus_ray.extras import require_extra
from focus_ray.tracking.base import Picture, Subject, local_folder

STEP = "step"  # what curves are drawn over
_TIMEOUT_S = 30  # for a server's first answer


class _Tracked:
    def __init__(self, run: Any, subject: Subject) -> None:
        self.run = run
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)
        self.tag(subject.tags)

    def tag(self, tags: Mapping[str, str]) -> None:
        self.run.config.update({"tags": {**self.run.config.get("tags", {}), **tags}}, allow_val_change=True)

    def curve(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({STEP: step, **figures})

    def figures(self, figures: Mapping[str, float]) -> None:
        self.run.summary.update(dict(figures))

    def pictures(self, pictures: Sequence[Picture]) -> None:
        import wandb
        from PIL import Image

        images = [
            wandb.Image(Image.open(io.BytesIO(picture.jpeg)), caption=f"{picture.name}: {picture.caption}")
            for picture in pictures
        ]
        self.run.log({STEP: 0, "heat_maps": images})

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Wandb:
    def __init__(self, folder: str, mode: str, project: str) -> None:
        self.folder, self.mode, self.project = folder, mode, project

    def has(self, subject: Subject) -> bool:
        return any(Path(self.folder, "wandb").glob(f"*run-*-{_id(subject)}"))

    def begin(self, subject: Subject) -> _Tracked:
        import wandb

        run = wandb.init(
            project=self.project,
            id=_id(subject),
            name=subject.name,
            group=(subject.group or subject).name,
            job_type=subject.tags.get("kind"),
            config=dict(subject.parameters),
            mode=cast(Any, self.mode),
            dir=self.folder,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=_TIMEOUT_S,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
            ),
        )
        return _Tracked(run, subject)


def _id(subject: Subject) -> str:
    return hashlib.sha256(subject.key.encode()).hexdigest()[:16]


def _mode(settings: TrackerConfig) -> str:
    """online or offline. Raises: ConfigError: online is asked for, and there is no key."""
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    told = os.environ.get("WANDB_MODE", "")
    mode = settings.mode if settings.mode != "auto" else told or ("online" if has_key else "offline")
    if mode == "online" and not has_key:
        raise ConfigError(
            "trackers.wandb: online needs a key: set the environment variable WANDB_API_KEY, or trackers.wandb.mode=offline"
        )
    return mode


class Wandb:
    def check(self, settings: TrackerConfig, storage: str) -> str:
        require_extra("wandb", "trackers.wandb")
        mode = _mode(settings)
        return f"{local_folder('wandb', settings, storage)} ({mode})"

    def open(self, settings: TrackerConfig, storage: str) -> _Wandb:
        return _Wandb(local_folder("wandb", settings, storage), _mode(settings), settings.project)


WANDB = Wandb()
