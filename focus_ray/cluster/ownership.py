"""Prevents that two processes use the folder of a run or a sweep, or resume it with changed images. Works without Ray.

The process that started the run ("driver") writes heartbeats to state.json. data.json contains fingerprints of the images.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from focus_ray.errors import DataError, FocusRayError
from focus_ray.storage.files import file_exists, join_path, read_bytes, write_bytes

STATE_FILE, FINGERPRINTS_FILE = "state.json", "data.json"
HEARTBEAT_S = 3.0


def write_image_fingerprints(root: str, fingerprints: Mapping[str, str]) -> None:
    """Writes the fingerprints of the images behind the results to data.json in the folder.

    Args:
        root: folder of the run or sweep.
        fingerprints: category -> `data_fingerprint` of its images.
    """
    write_bytes(join_path(root, FINGERPRINTS_FILE), (json.dumps(dict(fingerprints), indent=1) + "\n").encode())


def check_run_resumable(
    root: str,
    fingerprints: Mapping[str, str],
    error: type[FocusRayError],
    fixed_categories: Collection[str] | None = None,
) -> None:
    """Checks that no other process uses the folder of a run, and that its images have not changed since it was created.

    It may wait some seconds for a heartbeat, and may write data.json, see `check_images_unchanged`.

    Args:
        root: folder of the run or sweep.
        fingerprints: category -> `data_fingerprint` of its current images.
        error: exception type to raise if another process uses the folder.
        fixed_categories: categories whose images must be the same. Others may be new, missing or changed. None: all
            categories.

    Raises:
        error: another process uses the folder.
        DataError: the images have changed, or the storage fails.
    """
    state = read_run_state(root)
    if state["state"] == "running":
        raise error(
            f"{root}: still running, as process {state['pid']} on {state['host']}: wait for its end, or stop it first"
        )
    check_images_unchanged(root, fingerprints, fixed_categories)


def check_images_unchanged(
    root: str, fingerprints: Mapping[str, str], fixed_categories: Collection[str] | None = None
) -> None:
    """Checks that the images of a run have not changed since its folder was created, by the fingerprints in data.json.

    If the file does not exist, it is written. If `fixed_categories` is given, new fingerprints of others are written to it.

    Args:
        root: folder of the run or sweep.
        fingerprints: category -> `data_fingerprint` of its current images.
        fixed_categories: as in `check_run_resumable`.

    Raises: DataError: the images have changed, or the storage fails.
    """
    if not file_exists(join_path(root, FINGERPRINTS_FILE)):  # the driver died before it wrote the file
        write_image_fingerprints(root, fingerprints)
    stored = json.loads(read_bytes(join_path(root, FINGERPRINTS_FILE)))
    checked_names = (
        {*stored, *fingerprints} if fixed_categories is None else {*stored} & {*fingerprints} & {*fixed_categories}
    )
    changed = sorted(name for name in checked_names if stored.get(name) != fingerprints.get(name))
    if changed:
        raise DataError(
            f"{root}: the images of {', '.join(changed)} have changed since the run began, and its results would mix two "
            "data sets: start a new run under another name, or restore the previous data set"
        )
    if fixed_categories is not None and {**stored, **fingerprints} != stored:
        write_image_fingerprints(root, {**stored, **fingerprints})


class HeartbeatWriter:
    """Writes state.json every few seconds in a thread, so that other processes can see that this process still runs."""

    def __init__(self, root: str) -> None:
        """Writes state.json with the state "running", and starts the thread.

        Args: root: folder of the run or sweep.

        Raises: DataError: the file cannot be written.
        """
        self.path = join_path(root, STATE_FILE)
        self.facts = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self.beat = 0
        self._end = threading.Event()
        self._write_state("running")
        self._thread = threading.Thread(target=self._write_heartbeats, daemon=True)
        self._thread.start()

    def close(self, state: str) -> None:
        """Stops the thread and writes the final state.

        Args: state: finished, stopped or failed.

        Raises: DataError: the file cannot be written.
        """
        self._end.set()
        self._thread.join()
        self._write_state(state)

    def _write_heartbeats(self) -> None:
        """Writes heartbeats until `close` is called. It ignores failures of the storage."""
        while not self._end.wait(HEARTBEAT_S):
            try:
                self._write_state("running")
            except DataError:
                continue  # the storage is briefly not available; only the records matter, and their writes are retried

    def _write_state(self, state: str) -> None:
        """Writes a state and the next heartbeat number to state.json. Raises: DataError: the file cannot be written."""
        self.beat += 1
        content = {"state": state, **self.facts, "beat": self.beat, "time": time.time()}
        write_bytes(self.path, (json.dumps(content, indent=1) + "\n").encode())


def read_run_state(root: str, wait: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Returns the content of state.json, and checks whether a process that should be running still sends heartbeats.

    If the state is "running", the call waits two and a half intervals between heartbeats. The state becomes "lost" if no
    heartbeat follows. Without the file, the state is "lost".

    Args:
        root: folder of the run or sweep.
        wait: function that waits a number of seconds.

    Raises: DataError: the file cannot be read.
    """
    try:
        first: dict[str, Any] = json.loads(read_bytes(join_path(root, STATE_FILE)))
    except FileNotFoundError:
        return {"state": "lost"}
    if first["state"] != "running":
        return first
    wait(2.5 * HEARTBEAT_S)  # compares heartbeats and not times, because clocks of two machines may differ
    second: dict[str, Any] = json.loads(read_bytes(join_path(root, STATE_FILE)))
    if second["state"] == "running" and (second["owner"], second["beat"]) == (first["owner"], first["beat"]):
        return {**second, "state": "lost"}
    return second
