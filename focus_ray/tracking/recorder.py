"""Sends metrics, tags and pictures to experiment trackers in a separate thread, so that a slow tracker never delays training."""

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


class BackgroundRecorder:
    """Writes runs to all trackers of a configuration, in a separate thread. Without trackers, it does nothing.

    The first exception of a tracker is logged, and this tracker then gets no more data. `close` must be called at the end.
    """

    def __init__(self, settings: Mapping[str, TrackerConfig], storage: str, log: Log) -> None:
        """Checks and opens all trackers of a configuration.

        Args:
            settings: Kind of each tracker, such as "mlflow" -> its settings.
            storage: Folder of all training runs; a tracker writes below it if its settings name no other place.
            log: Function that receives messages.

        Raises:
            MissingPackageError: The package extra of a tracker is not installed.
            ConfigError: The folder of a tracker cannot be written, its server cannot be reached, a key is missing, or the
                tracker fails when it is opened.
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
        """Returns True if the configuration has at least one tracker, even after the tracker has failed."""
        return bool(self._settings)

    def write_to_run(self, run: RunDescription, write: Callable[[TrackerRun], None] = lambda tracker_run: None) -> None:
        """Writes data to a run in every tracker. Returns at once; the thread makes the calls later.

        Args:
            run: Description of the run. The thread opens the run in a tracker if it is not open.
            write: Function that receives the open run of a tracker and writes to it; by default the run is only opened.
        """
        self._enqueue_for_trackers(lambda kind: write(self._get_or_begin_run(kind, run)))

    def end_run(self, run: RunDescription, failed: bool = False) -> None:
        """Ends a run in every tracker, as finished or as failed. Returns at once; the thread makes the calls later."""

        def end_run_of_tracker(kind: str) -> None:
            self._get_or_begin_run(kind, run).end(failed)
            del self._runs[kind, run.key]

        self._enqueue_for_trackers(end_run_of_tracker)

    def write_finished_run(self, run: RunDescription, write: Callable[[TrackerRun], None]) -> None:
        """Writes a complete run to every tracker that does not have it. Returns at once; the thread makes the calls later.

        Args:
            run: Description of the run, for instance of a finished trial.
            write: Function that receives the open run of a tracker, writes all data to it, and ends it.
        """

        def write_run_to_tracker(kind: str) -> None:
            if not self._trackers[kind].has_run(run):
                write(self._trackers[kind].begin_run(run))

        self._enqueue_for_trackers(write_run_to_tracker)

    def close(self) -> None:
        """Waits until the trackers have all data, at most CLOSE_TIMEOUT_S seconds. Ends all runs that are still open as failed.

        After the timeout it logs a warning, and no tracker gets further data.
        """
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

    def _enqueue_for_trackers(self, action: Callable[[str], None]) -> None:
        """Queues the call `action(kind)` for every tracker. The first call starts the thread."""
        if self._settings and self._thread is None:
            self._thread = threading.Thread(target=self._process_queue, daemon=True, name="trackers")
            self._thread.start()
        for kind in self._settings:
            self._queue.put((kind, action))

    # ---- executed in the thread

    def _process_queue(self) -> None:
        """Makes the queued calls one after the other until `close`, then ends all open runs as failed."""
        while (item := self._queue.get()) is not None:
            self._call_tracker(*item)
        for kind in self._settings:
            self._call_tracker(kind, self._fail_open_runs)

    def _fail_open_runs(self, kind: str) -> None:
        """Ends all open runs of the tracker `kind` as failed."""
        for (kind_of_run, _), tracker_run in self._runs.items():
            if kind_of_run == kind:
                tracker_run.end(True)

    def _call_tracker(self, kind: str, action: Callable[[str], None]) -> None:
        """Calls `action(kind)` and logs an exception. After the first exception of a tracker, the tracker gets no more calls."""
        if kind not in self._trackers:
            return
        try:
            action(kind)
        except Exception as error:  # trackers raise many types; no failure of a tracker may end a training
            if self._trackers.pop(kind, None) is not None:
                self.log(f"WARNING: {kind} failed and records nothing more; the run goes on: {describe_error(error)}")

    def _get_or_begin_run(self, kind: str, run: RunDescription) -> TrackerRun:
        """Returns the open run of the tracker `kind` for a description, and opens it if it is not open."""
        if (kind, run.key) not in self._runs:
            self._runs[kind, run.key] = self._trackers[kind].begin_run(run)
        return self._runs[kind, run.key]


def describe_error(error: Exception) -> str:
    """Returns the type and the first line of an error, such as "OSError: disk full". The line is cut to 300 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:300]}"
