"""Passes the records of a run to its trackers in a separate thread, so that a slow or broken tracker never delays the run."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from focus_ray.errors import ConfigError
from focus_ray.names import Log
from focus_ray.settings.kinds import TRACKERS
from focus_ray.tracking.base import Picture, RunDescription, Tracker, TrackerRun
from focus_ray.tracking.settings import TrackerConfig

MAX_PICTURES = 6  # heat maps of test images that an evaluation records for each category
CLOSE_TIMEOUT_S = 60.0  # longest time that the end of a run waits for trackers with unsent records


class Recorder:
    """Records runs in all trackers of a configuration. Without trackers, it does nothing.

    A tracker that fails is reported once and gets no more records.

    Attributes:
        num_images: Largest number of pictures of a run; 0 without trackers.
    """

    def __init__(self, settings: Mapping[str, TrackerConfig], storage: str, log: Log) -> None:
        """Checks and opens all trackers of a configuration.

        Args:
            settings: Kind of each tracker -> its settings.
            storage: Storage of the runs; a tracker writes below it if its settings name no other place.
            log: Takes messages.

        Raises:
            MissingPackageError: The extra of a tracker is not installed.
            ConfigError: The folder of a tracker cannot be written, or its server cannot be reached.
        """
        self._trackers: dict[str, Tracker] = {}
        for kind, tracker_settings in settings.items():
            location = TRACKERS[kind].check(tracker_settings, storage)
            try:
                self._trackers[kind] = TRACKERS[kind].open(tracker_settings, storage)
            except Exception as error:  # trackers raise many types
                raise ConfigError(
                    f"trackers.{kind}: {location} cannot be used ({describe_error(error)}): correct this, set "
                    f"trackers.{kind}.uri to another location, or remove trackers.{kind}"
                ) from error
            log(f"{kind}: recording to {location}")
        self.log = log
        self._settings = settings
        self.num_images = MAX_PICTURES if settings else 0
        self._failed_kinds: set[str] = set()
        self._runs: dict[tuple[str, str], TrackerRun] = {}
        self._queue: queue.SimpleQueue[tuple[RunDescription, str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __bool__(self) -> bool:
        """True if there is at least one tracker."""
        return bool(self._settings)

    def begin(self, run: RunDescription) -> None:
        """Begins a run in all trackers."""
        self._enqueue(run, "begin")

    def set_tags(self, run: RunDescription, tags: Mapping[str, str]) -> None:
        """Adds tags to a run."""
        self._enqueue(run, "set_tags", dict(tags))

    def log_step(self, run: RunDescription, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the curves of a run at a step."""
        self._enqueue(run, "log_step", step, dict(metrics))

    def log_metrics(self, run: RunDescription, metrics: Mapping[str, float]) -> None:
        """Sets metrics of a run."""
        self._enqueue(run, "log_metrics", dict(metrics))

    def log_pictures(self, run: RunDescription, pictures: Sequence[Picture]) -> None:
        """Adds pictures to a run; at most `num_images`."""
        self._enqueue(run, "log_pictures", list(pictures))

    def end(self, run: RunDescription, failed: bool = False) -> None:
        """Ends a run."""
        self._enqueue(run, "end", failed)

    def log_finished_run(
        self,
        run: RunDescription,
        curves: Sequence[tuple[int, dict[str, float]]],
        metrics: Mapping[str, float],
        failed: bool,
    ) -> None:
        """Records a run that has ended, unless the tracker already has it.

        Args:
            run: Description of the run.
            curves: (step, metrics at this step).
            metrics: Metrics with one value.
            failed: True if the run failed.
        """
        self._enqueue(run, "log_finished_run", list(curves), dict(metrics), failed)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits until all records are delivered, at most `timeout_s` seconds. Ends all open runs as failed."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            unfinished_kinds = [kind for kind in self._settings if kind not in self._failed_kinds]
            self._failed_kinds.update(unfinished_kinds)
            self.log(
                f"WARNING: {', '.join(unfinished_kinds)}: some records were not delivered within {timeout_s:.0f} s; the "
                "results of the run are complete"
            )
        self._thread = None

    # ---- executed in the thread, except _enqueue
    def _enqueue(self, run: RunDescription, method: str, *arguments: Any) -> None:
        """Queues the call of a method for all trackers; starts the thread for the first call."""
        if not self._settings:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_thread, daemon=True, name="trackers")
            self._thread.start()
        self._queue.put((run, method, arguments))

    def _run_thread(self) -> None:
        """Delivers queued calls until `close`, then ends all open runs as failed."""
        while (item := self._queue.get()) is not None:
            run, method, arguments = item
            for kind in self._settings:
                with self._report_failure(kind):
                    self._deliver(kind, run, method, arguments)
        for (kind, _), tracker_run in list(self._runs.items()):
            with self._report_failure(kind):
                tracker_run.end(True)

    def _deliver(self, kind: str, run: RunDescription, method: str, arguments: tuple[Any, ...]) -> None:
        """Calls a method of a run in one tracker; begins the run if necessary."""
        if kind in self._failed_kinds:
            return
        tracker, run_id = self._trackers[kind], (kind, run.key)
        if method == "log_finished_run":
            if not tracker.has_run(run):
                _log_finished_run(tracker.begin_run(run), *arguments)
            return
        if run_id not in self._runs:
            self._runs[run_id] = tracker.begin_run(run)
        if method == "begin":
            return
        getattr(self._runs[run_id], method)(*arguments)
        if method == "end":
            del self._runs[run_id]

    @contextlib.contextmanager
    def _report_failure(self, kind: str) -> Any:
        """Logs the first exception of a tracker in a `with` block, and stops recording with this tracker."""
        try:
            yield
        except Exception as error:  # trackers raise many types; no failure of a tracker may end a training
            if kind not in self._failed_kinds:
                self._failed_kinds.add(kind)
                self.log(f"WARNING: {kind} failed and records nothing more; the run goes on: {describe_error(error)}")
            for run_id in [run_id for run_id in self._runs if run_id[0] == kind]:
                del self._runs[run_id]


def _log_finished_run(
    run: TrackerRun, curves: Sequence[tuple[int, dict[str, float]]], metrics: Mapping[str, float], failed: bool
) -> None:
    """Writes the curves and metrics of an ended run into a tracker, and ends the tracker's run."""
    for step, values in curves:
        run.log_step(step, values)
    run.log_metrics(metrics)
    run.end(failed)


def describe_error(error: Exception) -> str:
    """Returns the type and the first line of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:300]}"
