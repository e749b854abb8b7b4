"""Whose a run's or a sweep's folder is: a driver's sign of life, and the images that it was begun with. No Ray.

state.json  data.json
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
from focus_ray.storage import exists, join, read_bytes, write_bytes

STATE, FINGERPRINTS = "state.json", "data.json"
HEARTBEAT_S = 3.0


def write_fingerprints(root: str, fingerprints: Mapping[str, str]) -> None:
    """Category -> `data_fingerprint` of the images that the folder's results come from."""
    write_bytes(join(root, FINGERPRINTS), (json.dumps(dict(fingerprints), indent=1) + "\n").encode())


def check_resumable(
    root: str,
    fingerprints: Mapping[str, str],
    error: type[FocusRayError],
    binding: Collection[str] | None = None,
    watch: Callable[[float], None] = time.sleep,
) -> None:
    """Raises: `error`: another driver is at it.  DataError: the images are no longer those that the folder began with.

    Args:
        binding: the categories whose images must be the same; others may have changed, joined or been left out. None: all, and
            none may join or be left out.
    """
    state = read_state(root, watch)
    if state["state"] == "running":
        raise error(
            f"{root}: still running, as process {state['pid']} on {state['host']}: wait for it, or end it first"
        )
    check_fingerprints(root, fingerprints, binding)


def check_fingerprints(root: str, fingerprints: Mapping[str, str], binding: Collection[str] | None = None) -> None:
    """Raises: DataError: the images are no longer those that the folder began with."""
    if not exists(join(root, FINGERPRINTS)):  # its driver died as it began
        write_fingerprints(root, fingerprints)
    former = json.loads(read_bytes(join(root, FINGERPRINTS)))
    looked_at = {*former, *fingerprints} if binding is None else {*former} & {*fingerprints} & {*binding}
    changed = sorted(name for name in looked_at if former.get(name) != fingerprints.get(name))
    if changed:
        raise DataError(
            f"{root}: the images of {', '.join(changed)} have changed since it began, and its results would be of two sets: "
            "start anew under another name, or bring the former data set back"
        )
    if binding is not None and {**former, **fingerprints} != former:
        write_fingerprints(root, {**former, **fingerprints})


class Heartbeat:
    """Writes state.json every few seconds, so that others can tell a running driver from one that was killed."""

    def __init__(self, root: str) -> None:
        self.place = join(root, STATE)
        self.owner, self.beat = uuid.uuid4().hex, 0
        self._end = threading.Event()
        self._write("running")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, state: str, **facts: Any) -> None:
        """Says how it ended: finished, stopped or failed."""
        self._end.set()
        self._thread.join()
        self._write(state, **facts)

    def _run(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            try:
                self._write("running")
            except DataError:
                continue  # the storage is away for a moment; the records are what counts, and they are retried

    def _write(self, state: str, **facts: Any) -> None:
        self.beat += 1
        content = {
            "state": state,
            "owner": self.owner,
            "beat": self.beat,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            **facts,
        }
        write_bytes(self.place, (json.dumps(content, indent=1) + "\n").encode())


def read_state(root: str, watch: Callable[[float], None] | None = time.sleep) -> dict[str, Any]:
    """state.json, where 'running' becomes 'lost' if no sign of life follows within two and a half beats.

    Args:
        watch: waits that many seconds; None takes what is written as it is.
    """
    try:
        first: dict[str, Any] = json.loads(read_bytes(join(root, STATE)))
    except FileNotFoundError:
        return {"state": "lost"}
    if first["state"] != "running" or watch is None:
        return first
    watch(2.5 * HEARTBEAT_S)  # not the clock: that of another machine may be off
    second: dict[str, Any] = json.loads(read_bytes(join(root, STATE)))
    if second["state"] == "running" and (second["owner"], second["beat"]) == (first["owner"], first["beat"]):
        return {**second, "state": "lost"}
    return second
