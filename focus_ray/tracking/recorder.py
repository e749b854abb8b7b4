"""Hands what a run says to its trackers, on a thread of its own: none that is slow or gone costs the run anything."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from focus_ray.config import TrackerConfig
from focus_ray.errors import ConfigError
from focus_ray.kinds import TRACKERS
from focus_ray.names import Log
from focus_ray.tracking.base import Picture, Subject, Tracked, Tracker

PATIENCE_S = 60.0  # that the end of a run waits for trackers which have not taken everything


class Recorder:
    """Takes figures of subjects for all trackers that a configuration asks for; with none, does nothing.

    A tracker that fails is told of once, and is let alone from there on.
    """

    def __init__(self, settings: Mapping[str, TrackerConfig], storage: str, log: Log) -> None:
        """
        Args: storage: of the runs, where a tracker keeps its files unless told.

        Raises: MissingPackageError: a tracker's extra is not installed.  ConfigError: a place cannot be written or reached.
        """
        self._trackers: dict[str, Tracker] = {}
        for kind, asked in settings.items():
            place = TRACKERS[kind].check(asked, storage)
            try:
                self._trackers[kind] = TRACKERS[kind].open(asked, storage)
            except Exception as error:  # of any type: trackers are many packages
                raise ConfigError(
                    f"trackers.{kind}: {place} cannot be used ({reason_of(error)}): mend that, set trackers.{kind}.uri to "
                    f"another place, or leave trackers.{kind} out"
                ) from error
            log(f"{kind}: recording to {place}")
        self.log = log
        self.num_images = max((asked.num_images for asked in settings.values()), default=0)
        self._settings = settings
        self._lost: set[str] = set()
        self._begun: dict[tuple[str, str], Tracked] = {}
        self._queue: queue.SimpleQueue[tuple[Subject, str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __bool__(self) -> bool:
        """Whether there is any tracker."""
        return bool(self._settings)

    def begin(self, subject: Subject) -> None:
        self._put(subject, "begin")

    def tag(self, subject: Subject, tags: Mapping[str, str]) -> None:
        self._put(subject, "tag", dict(tags))

    def curve(self, subject: Subject, step: int, figures: Mapping[str, float]) -> None:
        self._put(subject, "curve", step, dict(figures))

    def figures(self, subject: Subject, figures: Mapping[str, float]) -> None:
        self._put(subject, "figures", dict(figures))

    def pictures(self, subject: Subject, pictures: Sequence[Picture]) -> None:
        self._put(subject, "pictures", list(pictures))

    def end(self, subject: Subject, failed: bool = False) -> None:
        self._put(subject, "end", failed)

    def whole(
        self,
        subject: Subject,
        curves: Sequence[tuple[int, dict[str, float]]],
        figures: Mapping[str, float],
        failed: bool,
    ) -> None:
        """All that there is to say of a subject; a tracker that has it already is told nothing. curves: steps with figures."""
        self._put(subject, "whole", list(curves), dict(figures), failed)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Waits until everything is handed over; what has not ended by then is ended as failed."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            late = [kind for kind in self._settings if kind not in self._lost]
            self._lost.update(late)
            self.log(
                f"WARNING: {', '.join(late)}: not everything was taken within {patience_s:.0f} s; the results do not hang on it"
            )
        self._thread = None

    # ---- on its own thread
    def _put(self, subject: Subject, what: str, *given: Any) -> None:
        if not self._settings:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="trackers")
            self._thread.start()
        self._queue.put((subject, what, given))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            subject, what, given = item
            for kind in self._settings:
                with self._losing(kind):
                    self._hand(kind, subject, what, given)
        for (kind, _), tracked in list(self._begun.items()):
            with self._losing(kind):
                tracked.end(True)

    def _hand(self, kind: str, subject: Subject, what: str, given: tuple[Any, ...]) -> None:
        if kind in self._lost:
            return
        tracker, at = self._trackers[kind], (kind, subject.key)
        if what == "whole":
            if not tracker.has(subject):
                _tell_whole(tracker.begin(subject), *given)
            return
        if at not in self._begun:
            self._begun[at] = tracker.begin(subject)
        if what == "begin":
            return
        if what == "pictures":
            given = (given[0][: self._settings[kind].num_images],)
        getattr(self._begun[at], what)(*given)
        if what == "end":
            del self._begun[at]

    @contextlib.contextmanager
    def _losing(self, kind: str) -> Any:
        """A tracker's failure is told once, and is nobody else's."""
        try:
            yield
        except Exception as error:  # of any type: trackers are many packages, and none may end a training
            if kind not in self._lost:
                self._lost.add(kind)
                self.log(
                    f"WARNING: {kind} has failed and records nothing more of this run, which goes on: {reason_of(error)}"
                )
            for at in [at for at in self._begun if at[0] == kind]:
                del self._begun[at]


def _tell_whole(
    tracked: Tracked, curves: Sequence[tuple[int, dict[str, float]]], figures: Mapping[str, float], failed: bool
) -> None:
    for step, values in curves:
        tracked.curve(step, values)
    tracked.figures(figures)
    tracked.end(failed)


def reason_of(error: Exception) -> str:
    """An error's type and first line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:300]}"
