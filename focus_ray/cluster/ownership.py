"""Gives the folder of a run or a sweep one owner at a time, and prevents a resume with changed images. Works without Ray.

The process that runs a training or a sweep ("driver") owns its folder. Each driver creates the next of the files
owners/000001.json, owners/000002.json and so on with a conditional write, so that only one of several drivers succeeds. The
number of the file is the generation of the folder. The owner writes heartbeats to state.json. A resume takes the folder over if
the owner has ended, or has sent no heartbeat for `LEASE_S`. An owner that finds the file of the next generation stops, and its
workers write nothing more. data.json contains fingerprints of the images.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from focus_ray.errors import DataError, FocusRayError
from focus_ray.names import Log
from focus_ray.retries import compute_longest_wait_s
from focus_ray.storage.files import (
    CONNECT_TIMEOUT_S,
    MAX_ATTEMPTS,
    QUICK_ATTEMPTS,
    QUICK_TIMEOUT_S,
    file_exists,
    join_path,
    list_folder_entries,
    read_bytes,
    write_bytes,
    write_bytes_if_absent,
)

STATE_FILE, FINGERPRINTS_FILE, OWNERS_FOLDER = "state.json", "data.json", "owners"
HEARTBEAT_S = 3.0
# An owner is silent while the storage is away for as long as all other writes are retried, and while one heartbeat fails slowly.
_SLOWEST_HEARTBEAT_S = HEARTBEAT_S + QUICK_ATTEMPTS * (CONNECT_TIMEOUT_S + QUICK_TIMEOUT_S)
LEASE_S = compute_longest_wait_s(MAX_ATTEMPTS) + _SLOWEST_HEARTBEAT_S


def write_image_fingerprints(root: str, fingerprints: Mapping[str, str]) -> None:
    """Writes the fingerprints of a run's images to data.json in the folder of the run. Replaces an existing file.

    Args:
        root: folder of the run or sweep.
        fingerprints: category -> `data_fingerprint` of its images.

    Raises: DataError: the file cannot be written.
    """
    write_bytes(join_path(root, FINGERPRINTS_FILE), (json.dumps(dict(fingerprints), indent=1) + "\n").encode())


def check_images_unchanged(
    root: str, fingerprints: Mapping[str, str], fixed_categories: Collection[str] | None = None
) -> None:
    """Checks that the images of a run have not changed since the run began: compares `fingerprints` with data.json.

    If data.json does not exist, it is written with `fingerprints`. Without `fixed_categories`, all categories of data.json and
    of `fingerprints` are compared, so that a new or missing category is a change too. With `fixed_categories`, only categories
    that are in this list, in data.json and in `fingerprints` are compared; all new or changed fingerprints are then added to
    data.json.

    Args:
        root: folder of the run or sweep.
        fingerprints: category -> `data_fingerprint` of its current images.
        fixed_categories: the categories that are compared; None: all.

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


class FolderOwner:
    """Owns the folder of a run or a sweep: a thread writes heartbeats, and notices when another driver takes the folder over."""

    def __init__(
        self,
        root: str,
        generation: int,
        error: type[FocusRayError],
        on_taken_over: Callable[[], object] = lambda: None,
    ) -> None:
        """Becomes the owner of a generation, writes state.json with the state "running", and starts the thread.

        Args:
            root: folder of the run or sweep.
            generation: result of `find_next_generation`; 1 for a new folder.
            error: exception type to raise if another driver owns the folder.
            on_taken_over: called in the thread when another driver has taken the folder over.

        Raises:
            error: another driver became the owner of this generation first.
            DataError: a file cannot be written.
        """
        self.root, self.generation = root, generation
        self._error, self._on_taken_over = error, on_taken_over
        self._facts = {
            "generation": generation,
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _identify_machine(),
        }
        self._newer_owner: dict[str, Any] | None = None
        if not write_bytes_if_absent(_get_owner_file(root, generation), json.dumps(self._facts).encode()):
            owner = json.loads(read_bytes(_get_owner_file(root, generation)))
            raise error(
                f"{root}: process {owner['pid']} on {owner['host']} started or resumed this run first: wait for its end, or "
                "give another name"
            )
        self._beat = 0
        self._end = threading.Event()
        self._write_state("running")
        self._thread = threading.Thread(target=self._write_heartbeats, daemon=True)
        self._thread.start()

    @property
    def is_taken_over(self) -> bool:
        """Whether this process has noticed that another driver took the folder over."""
        return self._newer_owner is not None

    def check_owned(self, ask_storage: bool = False) -> None:
        """Raises the error of `__init__` if another driver has taken the folder over.

        Args: ask_storage: look into the storage now; False: the thread has looked a few seconds ago.

        Raises:
            error (see `__init__`): another driver has taken the folder over.
            DataError: the storage fails.
        """
        if ask_storage and self._newer_owner is None:
            self._newer_owner = _find_newer_owner(self.root, self.generation)
        if self._newer_owner is not None:
            raise _make_loss_error(self.root, self._newer_owner, self._error)

    def close(self, state: str) -> None:
        """Stops the thread and writes the final state, unless another driver has taken the folder over.

        Args: state: finished, stopped or failed.

        Raises:
            error (see `__init__`): another driver has taken the folder over.
            DataError: the file cannot be written.
        """
        self._end.set()
        self._thread.join()
        self.check_owned(ask_storage=True)
        self._write_state(state)

    def _write_heartbeats(self) -> None:
        """Writes a heartbeat every `HEARTBEAT_S` seconds until `close` is called, or until another driver takes the folder over.

        Failures of the storage are ignored.
        """
        while not self._end.wait(HEARTBEAT_S):
            try:
                self._newer_owner = _find_newer_owner(self.root, self.generation, is_quick=True)
                if self.is_taken_over:
                    self._on_taken_over()
                    return
                self._write_state("running", is_quick=True)
            except DataError:
                continue  # the storage is briefly not available; only the records matter, and their writes are retried

    def _write_state(self, state: str, is_quick: bool = False) -> None:
        """Writes a state and the next heartbeat number to state.json. Raises: DataError: the file cannot be written."""
        self._beat += 1
        content = {"state": state, **self._facts, "beat": self._beat, "time": time.time()}
        write_bytes(join_path(self.root, STATE_FILE), (json.dumps(content, indent=1) + "\n").encode(), is_quick)


def check_folder_owned(root: str, generation: int, error: type[FocusRayError]) -> None:
    """Checks in the storage that no driver has taken a folder over since a generation. Workers call it before they write results.

    Raises:
        error: another driver has taken the folder over.
        DataError: the storage fails.
    """
    owner = _find_newer_owner(root, generation)
    if owner is not None:
        raise _make_loss_error(root, owner, error)


def find_next_generation(
    root: str,
    error: type[FocusRayError],
    log: Log = lambda message: None,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Checks that no driver runs in a folder, and returns the generation that the next `FolderOwner` of the folder takes.

    Args:
        root: folder of the run or sweep, which may not exist yet.
        error: exception type to raise if another driver runs.
        log, wait: see `read_run_state`.

    Raises:
        error: another driver runs in the folder.
        DataError: the storage fails.
    """
    # read before the state: if a driver begins in between, the generation is taken, and `FolderOwner` fails
    generation = _read_generation(root) + 1
    state = read_run_state(root, log, wait)
    if state["state"] == "running":
        raise error(
            f"{root}: still running, as process {state['pid']} on {state['host']}: wait for its end, or stop it first"
        )
    return generation


def read_run_state(
    root: str, log: Log = lambda message: None, wait: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Returns the content of state.json, with the state "lost" if the owner of the folder has ended without a final state.

    An owner on this machine is lost if its process does not exist. Another owner is lost if the function sees no heartbeat
    for `LEASE_S`, and so the function may wait. Without an owner, the result has only the state "lost".

    Args:
        root: folder of the run or sweep.
        log: receives a line with the longest time of waiting.
        wait: function that waits a number of seconds.

    Raises: DataError: a file cannot be read.
    """
    first = _read_latest_state(root)
    if first["state"] != "running":
        return first
    if _has_ended_on_this_machine(first):
        return {**first, "state": "lost"}
    log(
        f"{root}: waiting at most {LEASE_S:.0f} s for a heartbeat of its owner, process {first['pid']} on {first['host']}"
    )
    for _ in range(math.ceil(LEASE_S / HEARTBEAT_S)):
        wait(HEARTBEAT_S)  # compares heartbeats and not times, because clocks of two machines may differ
        state = _read_latest_state(root)
        if state != first:
            return state
    return {**first, "state": "lost"}


def _read_latest_state(root: str) -> dict[str, Any]:
    """Returns the content of state.json, or of the latest owner file if this owner has not written state.json yet.

    Raises: DataError: a file cannot be read.
    """
    generation = _read_generation(root)
    try:
        state: dict[str, Any] = json.loads(read_bytes(join_path(root, STATE_FILE)))
    except FileNotFoundError:
        state = {"state": "lost"}
    if state.get("generation", 0) < generation:
        return {"state": "running", **json.loads(read_bytes(_get_owner_file(root, generation)))}
    return state


def _read_generation(root: str) -> int:
    """Returns the latest generation of a folder; 0 if it has no owner yet, or only an owner that wrote no owner file."""
    names = (name.removesuffix(".json") for name in list_folder_entries(join_path(root, OWNERS_FOLDER)))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _get_owner_file(root: str, generation: int) -> str:
    """Returns the path or URI of the file that names the owner of a generation."""
    return join_path(root, OWNERS_FOLDER, f"{generation:06d}.json")


def _find_newer_owner(root: str, generation: int, is_quick: bool = False) -> dict[str, Any] | None:
    """Returns facts about the driver that took a folder over from the owner of a generation; None if there is none.

    Raises: DataError: the storage fails.
    """
    try:
        return dict(json.loads(read_bytes(_get_owner_file(root, generation + 1), is_quick)))
    except FileNotFoundError:
        return None


def _make_loss_error(root: str, owner: Mapping[str, Any], error: type[FocusRayError]) -> FocusRayError:
    """Returns the error for a driver whose folder another owner has taken over."""
    return error(
        f"{root}: process {owner['pid']} on {owner['host']} has taken over this run with --resume, because no heartbeat of this "
        "process arrived: this process stops and writes no more results"
    )


def _identify_machine() -> str:
    """Returns an id of this boot of the machine and of the namespace of process ids; "" where the system does not give them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers of one machine have the same boot
    except OSError:
        return ""


def _has_ended_on_this_machine(state: Mapping[str, Any]) -> bool:
    """Returns whether an owner ran on this machine and its process does not exist any more."""
    if not state.get("machine") or state["machine"] != _identify_machine() or state["host"] != socket.gethostname():
        return False
    try:
        os.kill(state["pid"], 0)  # sends no signal
        fields = Path(f"/proc/{state['pid']}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:  # the process of another user
        return False
    return fields.split()[0] == "Z"  # killed, and its parent has not asked for its exit status
