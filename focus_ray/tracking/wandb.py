"""The tracker Weights & Biases: one run per category or trial, in the group of its training or sweep.

Without an API key, runs are written to local files (offline), which `wandb sync` uploads.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from focus_ray.errors import ConfigError, check_extra_is_installed
from focus_ray.tracking.base import CaptionedPicture, RunDescription, Tracker, find_writable_folder
from focus_ray.tracking.settings import PROJECT, TrackerConfig

STEP = "step"  # metric on the x axis of curves
_TIMEOUT_S = 30  # for a server's first answer


class _WandbRun:
    """An open run in Weights & Biases, as `TrackerRun`."""

    def __init__(self, wandb_run: Any, run: RunDescription) -> None:
        """Sets the x axis of the curves and adds the tags of a run. wandb_run: run that `wandb.init` returned."""
        self.wandb_run = wandb_run
        self.wandb_run.define_metric(STEP, hidden=True)
        self.wandb_run.define_metric("*", step_metric=STEP)
        self.set_tags(run.tags)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or replaces existing tags."""
        self.wandb_run.config.update({"tags": {**self.wandb_run.config.get("tags", {}), **tags}}, allow_val_change=True)

    def log_step_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the value of each metric to its curve at a step."""
        self.wandb_run.log({STEP: step, **metrics})

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sets metrics that have one value per run."""
        self.wandb_run.summary.update(dict(metrics))

    def log_pictures(self, pictures: Sequence[CaptionedPicture]) -> None:
        """Adds pictures with their captions."""

        import wandb
        from PIL import Image

        images = [
            wandb.Image(Image.open(io.BytesIO(picture.jpeg)), caption=f"{picture.name}: {picture.caption}")
            for picture in pictures
        ]
        self.wandb_run.log({STEP: 0, "heat_maps": images})

    def end(self, failed: bool) -> None:
        """Ends the run as finished or as failed."""
        self.wandb_run.finish(exit_code=int(failed))


class WandbTracker(Tracker):
    """The tracker Weights & Biases, opened: a project, with a local folder for the files of its runs."""

    @classmethod
    def check_usable(cls, settings: TrackerConfig, storage: str) -> str:
        """Checks that wandb is installed, the folder can be written, and the mode online has an API key. Does not connect.

        Returns:
            The folder and the mode, such as "runs/trackers/wandb (offline)".

        Raises:
            MissingPackageError: The package extra `wandb` is not installed.
            ConfigError: The folder cannot be written, or the mode is online without an API key.
        """
        check_extra_is_installed("wandb", "trackers.wandb")
        mode = _find_wandb_mode()
        return f"{find_writable_folder('wandb', settings, storage)} ({mode})"

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        """Checks the folder and the mode; does not connect. Raises: ConfigError: see `check_usable`."""
        self.folder, self.mode = find_writable_folder("wandb", settings, storage), _find_wandb_mode()

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if the local folder has files of the run. Does not ask the server."""
        return any(Path(self.folder, "wandb").glob(f"*run-*-{_hash_run_id(run)}"))

    def begin_run(self, run: RunDescription) -> _WandbRun:
        """Continues the run with the key `run.key`, or creates it with its parameters; then adds the tags."""

        import wandb

        wandb_run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_hash_run_id(run),
            name=run.name,
            group=(run.parent or run).name,
            job_type=run.tags.get("kind"),
            config=dict(run.parameters),
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
        return _WandbRun(wandb_run, run)


def _hash_run_id(run: RunDescription) -> str:
    """Returns the id of a run in Weights & Biases: a hash of `run.key`."""
    return hashlib.sha256(run.key.encode()).hexdigest()[:16]


def _find_wandb_mode() -> str:
    """Returns the mode of Weights & Biases, from the environment: the value of WANDB_MODE, such as "online" or "offline".

    Without WANDB_MODE, the mode is online if WANDB_API_KEY is set, otherwise offline.

    Raises:
        ConfigError: The mode is online, but there is no API key.
    """
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    if mode == "online" and not has_key:
        raise ConfigError("trackers.wandb: WANDB_MODE=online needs a key: set WANDB_API_KEY, or WANDB_MODE=offline")
    return mode
