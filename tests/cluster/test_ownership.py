"""The owner of a run's folder: races for a generation, heartbeats, lost and slow owners, and folders of earlier versions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3Server

from focus_ray.cluster.ownership import (
    LEASE_S,
    OWNERS_FOLDER,
    STATE_FILE,
    FolderOwner,
    check_folder_owned,
    find_next_generation,
    read_run_state,
)
from focus_ray.errors import FocusRayError, SweepError, TrainingError
from focus_ray.storage.files import MAX_ATTEMPTS, join_path, list_folder_entries, read_bytes, write_bytes

REMOTE = {
    "owner": "a",
    "host": "another-machine",
    "pid": 7,
}  # state.json has no other facts in folders of earlier versions


def write_state(root: str, state: str = "running", **facts: object) -> None:
    write_bytes(join_path(root, STATE_FILE), json.dumps({"state": state, **REMOTE, "beat": 1, **facts}).encode())


def read_state(root: str) -> dict[str, object]:
    return dict(json.loads(read_bytes(join_path(root, STATE_FILE))))


class FakeClock:
    """Waits without waiting: adds up the seconds, and calls an action when a number of seconds has passed."""

    def __init__(self, action_at_s: float = float("inf"), action: Callable[[], object] = lambda: None) -> None:
        self.now_s, self._action_at_s, self._action = 0.0, action_at_s, action

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        if self.now_s >= self._action_at_s:
            self._action_at_s = float("inf")
            self._action()


def race_for_generation(root: str) -> None:
    """Lets eight drivers become the owner of one generation at the same moment. Exactly one may succeed."""
    barrier = threading.Barrier(8)

    def become_owner(_: int) -> FolderOwner | FocusRayError:
        generation = find_next_generation(root, TrainingError)
        barrier.wait()
        try:
            return FolderOwner(root, generation, TrainingError)
        except TrainingError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(become_owner, range(8)))
    (owner,) = (outcome for outcome in outcomes if isinstance(outcome, FolderOwner))
    errors = {str(outcome) for outcome in outcomes if isinstance(outcome, TrainingError)}
    assert len(errors) == 1
    assert f"{root}: process {os.getpid()} on {socket.gethostname()}" in errors.pop()
    owner.close("finished")
    assert (read_state(root)["state"], read_state(root)["generation"]) == ("finished", owner.generation)


def test_of_several_drivers_one_owns_a_new_folder_and_later_one_resumes_it(tmp_path: Path) -> None:
    for generation in (1, 2):
        race_for_generation(str(tmp_path))
        assert len(list_folder_entries(tmp_path / OWNERS_FOLDER)) == generation


@pytest.mark.s3
def test_of_several_drivers_one_owns_a_folder_on_s3(s3: S3Server) -> None:
    root = s3.new_uri()
    race_for_generation(root)
    race_for_generation(root)


def test_the_lease_outlasts_all_retries_of_a_request_and_a_slow_heartbeat() -> None:
    longest_retries_s = sum(min(5.0, 0.1 * 2.0**attempt) for attempt in range(1, MAX_ATTEMPTS))
    assert longest_retries_s > 25
    assert longest_retries_s + 30 < LEASE_S < 120


@pytest.mark.parametrize("delay_s", [7.5, 20.0, 45.0])
def test_a_driver_whose_heartbeat_is_delayed_keeps_its_run(tmp_path: Path, delay_s: float) -> None:
    root = str(tmp_path)
    write_state(root)
    clock = FakeClock(delay_s, lambda: write_state(root, beat=2))
    with pytest.raises(SweepError, match="still running, as process 7 on another-machine"):
        find_next_generation(root, SweepError, wait=clock.wait)


def test_a_driver_of_another_machine_is_lost_after_the_lease_and_the_wait_is_announced(tmp_path: Path) -> None:
    write_state(str(tmp_path))
    clock = FakeClock()
    messages: list[str] = []
    assert find_next_generation(str(tmp_path), TrainingError, messages.append, clock.wait) == 1
    assert LEASE_S <= clock.now_s < LEASE_S + 5
    (message,) = messages
    assert f"waiting at most {LEASE_S:.0f} s" in message
    assert "process 7 on another-machine" in message


def test_a_run_that_ends_during_the_wait_can_be_resumed_at_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_state(root)
    clock = FakeClock(6.0, lambda: write_state(root, "stopped"))
    assert find_next_generation(root, TrainingError, wait=clock.wait) == 1
    assert clock.now_s < 10


def fail_to_wait(seconds: float) -> None:
    raise AssertionError(f"waits {seconds} s")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_killed_driver_of_this_machine_is_lost_at_once(tmp_path: Path, is_reaped: bool) -> None:
    code = f"""
import time
from focus_ray.cluster.ownership import FolderOwner
FolderOwner({str(tmp_path)!r}, 1, RuntimeError)
print("owned", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        process.kill()
        if is_reaped:
            process.wait()
        else:  # waits until the process is a zombie, and leaves it one
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read_run_state(str(tmp_path), wait=fail_to_wait)["state"] == "lost"
        assert find_next_generation(str(tmp_path), TrainingError, wait=fail_to_wait) == 2


def test_an_owner_that_has_not_written_its_state_yet_counts_as_running(tmp_path: Path) -> None:
    root = str(tmp_path)
    write_state(root, "failed", generation=1)
    write_bytes(join_path(root, OWNERS_FOLDER, "000002.json"), json.dumps(REMOTE).encode())
    clock = FakeClock(3.0, lambda: write_state(root, generation=2))
    with pytest.raises(TrainingError, match="still running"):
        find_next_generation(root, TrainingError, wait=clock.wait)


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_folder_of_an_earlier_version_is_resumed_as_its_first_generation(tmp_path: Path, state: str) -> None:
    root = str(tmp_path)
    write_state(root, state)
    owner = FolderOwner(root, find_next_generation(root, TrainingError, wait=fail_to_wait), TrainingError)
    assert read_state(root)["state"] == "running"
    owner.close("finished")
    assert owner.generation == 1
    assert read_run_state(root, wait=fail_to_wait)["state"] == "finished"


def test_an_owner_that_is_taken_over_notices_it_and_does_not_write_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.cluster.ownership.HEARTBEAT_S", 0.01)
    root, noticed = str(tmp_path), threading.Event()
    former = FolderOwner(root, 1, SweepError, noticed.set)
    former.check_owned()
    check_folder_owned(root, 1, SweepError)
    current = FolderOwner(root, 2, SweepError)
    assert noticed.wait(60)
    message = rf"{root}: process {os.getpid()} on {socket.gethostname()} has taken over"
    for check in (
        former.check_owned,
        lambda: former.close("finished"),
        lambda: check_folder_owned(root, 1, SweepError),
    ):
        with pytest.raises(SweepError, match=message):
            check()
    assert read_state(root)["generation"] == 2
    current.close("stopped")
    assert read_state(root)["state"] == "stopped"
