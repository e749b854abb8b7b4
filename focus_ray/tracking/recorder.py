"""Passes the records of a run to its trackers in a separate thread, so that a slow or broken tracker never delays the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from focus_ray.errors import ConfigError
from focus_ray.names import Log
from focus_ray.tracking.base import RunDescription, Tracker, TrackerRun
from focus_ray.tracking.registry import TRACKERS
from focus_ray.tracking.settings import TrackerConfig

CLOSE_TIMEOUT_S = 60.0  # longest time that the end of a run waits for trackers with unsent records


class Recorder:
    """Records runs in all trackers of a configuration. Without trackers, it does nothing.

    A tracker that fails is reported once and gets no more records.
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
        self._trackers: dict[str, Tracker] = {}  # without failed trackers
        for kind, tracker_settings in settings.items():
            location = TRACKERS[kind].check(tracker_settings, storage)
            try:
                self._trackers[kind] = TRACKERS[kind](tracker_settings, storage)
            except Exception as error:  # trackers raise many types
                raise ConfigError(
                    f"trackers.{kind}: {location} cannot be used ({describe_error(error)}): correct this, set "
                    f"trackers.{kind}.uri to another location, or remove trackers.{kind}"
                ) from error
            log(f"{kind}: recording to {location}")
        self.log = log
        self._settings = settings
        self._runs: dict[tuple[str, str], TrackerRun] = {}
        self._queue: queue.SimpleQueue[tuple[str, Callable[[str], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __bool__(self) -> bool:
        """True if there is at least one tracker."""
        return bool(self._settings)

    def record(self, run: RunDescription, write: Callable[[TrackerRun], None] = lambda tracker_run: None) -> None:
        """Calls a function with the run of every tracker, later and in the thread. Begins the run if necessary."""
        self._enqueue(lambda kind: write(self._begin(kind, run)))

    def end(self, run: RunDescription, failed: bool = False) -> None:
        """Ends a run."""

        def end_run(kind: str) -> None:
            self._begin(kind, run).end(failed)
            del self._runs[kind, run.key]

        self._enqueue(end_run)

    def record_finished(self, run: RunDescription, write: Callable[[TrackerRun], None]) -> None:
        """Records a run that has ended, unless a tracker already has it. write: writes all records and ends the run."""

        def write_run(kind: str) -> None:
            if not self._trackers[kind].has_run(run):
                write(self._trackers[kind].begin_run(run))

        self._enqueue(write_run)

    def close(self) -> None:
        """Waits until all records are delivered, at most CLOSE_TIMEOUT_S seconds. Ends all open runs as failed."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self.log(
                f"WARNING: {', '.join(self._trackers)}: some records were not delivered within {CLOSE_TIMEOUT_S:.0f} s; the "
                "results of the run are complete"
            )
            self._trackers.clear()
        self._thread = None

    def _enqueue(self, action: Callable[[str], None]) -> None:
        """Queues a call for every tracker; starts the thread for the first call."""
        if self._settings and self._thread is None:
            self._thread = threading.Thread(target=self._run_thread, daemon=True, name="trackers")
            self._thread.start()
        for kind in self._settings:
            self._queue.put((kind, action))

    # ---- executed in the thread

    def _run_thread(self) -> None:
        """Makes the queued calls until `close`, then ends all open runs as failed."""
        while (item := self._queue.get()) is not None:
            self._call(*item)
        for kind in self._settings:
            self._call(kind, self._fail_open_runs)

    def _fail_open_runs(self, kind: str) -> None:
        """Ends the open runs of a tracker as failed."""
        for (kind_of_run, _), tracker_run in self._runs.items():
            if kind_of_run == kind:
                tracker_run.end(True)

    def _call(self, kind: str, action: Callable[[str], None]) -> None:
        """Makes a call for a tracker. After the first exception of a tracker, it gets no more calls."""
        if kind not in self._trackers:
            return
        try:
            action(kind)
        except Exception as error:  # trackers raise many types; no failure of a tracker may end a training
            if self._trackers.pop(kind, None) is not None:
                self.log(f"WARNING: {kind} failed and records nothing more; the run goes on: {describe_error(error)}")

    def _begin(self, kind: str, run: RunDescription) -> TrackerRun:
        """Returns the begun run of a tracker; begins it if necessary."""
        if (kind, run.key) not in self._runs:
            self._runs[kind, run.key] = self._trackers[kind].begin_run(run)
        return self._runs[kind, run.key]


def describe_error(error: Exception) -> str:
    """Returns the type and the first line of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:300]}"
