"""Sending commands to a Ray cluster as jobs, and following, listing and stopping them: the Jobs API, with checks first.

What is sent is this package's own code and the working directory without data, environments, hidden files and trained
weights. Credentials are never sent: a cluster's nodes hold their own, as a role or a secret, and a job's environment can be
read by all who can list jobs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from focus_ray.cluster.ray_private import cluster_metadata
from focus_ray.errors import SubmissionError
from focus_ray.submission.job import Job

OLDEST_RAY = (2, 60)  # as the package itself requires
OLDEST_PYTHON = (3, 10)

_STOP_WAIT_S = 60.0
_START_WAIT_S = 60.0
_RECONNECTS = 6


def connect(address: str | None = None) -> Any:
    """A client of the cluster's Jobs API.

    Args:
        address: http://host:8265; None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises: SubmissionError: no address, no answer, or a token that is missing or wrong.
    """
    variable = "RAY_API_SERVER_ADDRESS"
    address = address or os.environ.get(variable) or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SubmissionError("which cluster? give --address http://HEAD:8265, or set RAY_ADDRESS")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells every upload
    former = os.environ.get(variable)
    os.environ[variable] = address  # Ray 2.60 prefers RAY_ADDRESS to an argument
    try:
        with _job_errors(address):
            return JobSubmissionClient(address)
    finally:
        if former is None:
            del os.environ[variable]
        else:
            os.environ[variable] = former


@contextmanager
def _job_errors(address: str, job: str | None = None) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise SubmissionError(
            f"{address}: the cluster wants another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            f"RAY_AUTH_TOKEN_PATH) as it was started with [{str(error).splitlines()[0]}]"
        ) from error
    except ConnectionError as error:
        raise SubmissionError(f"{address}: no Ray cluster answers there: mend --address, or start it") from error
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        if job is not None and "404" in text:
            raise SubmissionError(f"{address}: no job {job!r} there: `focus-ray jobs list` names them") from error
        raise SubmissionError(f"{address}: {text[:500]}") from error


def check_versions(client: Any, say: Callable[[str], None]) -> None:
    """Whether what is sent can run there; says where versions differ from those here.

    Raises: SubmissionError: the cluster's Ray or Python is too old.
    """
    import ray

    address = client.get_address()
    with _job_errors(address):
        found = cluster_metadata(client)
    there, python = str(found["rayVersion"]), str(found["pythonVersion"])
    if _numbers(there) < OLDEST_RAY:
        raise SubmissionError(
            f"{address}: the cluster runs Ray {there}; focus_ray needs {'.'.join(map(str, OLDEST_RAY))} or newer"
        )
    if _numbers(python) < OLDEST_PYTHON:
        raise SubmissionError(f"{address}: the cluster runs Python {python}; focus_ray needs 3.10 or newer")
    if _numbers(there) != _numbers(ray.__version__):
        say(f"WARNING: the cluster runs Ray {there}, here is {ray.__version__}")
    here = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if _numbers(python) != _numbers(here):
        say(f"WARNING: the cluster runs Python {python}, here is {here}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def submit(client: Any, job: Job, say: Callable[[str], None] = lambda message: None) -> str:
    """Checks the cluster's versions, sends the job. Returns: its id. Raises: SubmissionError."""
    check_versions(client, say)
    with tempfile.TemporaryDirectory(prefix="focus-ray-") as folder, _job_errors(client.get_address()):
        archive = Path(folder) / "package.zip"
        archive.write_bytes(job.package.content)
        deadline = time.monotonic() + _START_WAIT_S
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=job.entrypoint,
                        submission_id=job.submission_id,
                        runtime_env={"working_dir": str(archive), "env_vars": dict(job.environment)},
                        metadata=dict(job.metadata),
                        entrypoint_num_cpus=job.num_cpus or None,
                        entrypoint_num_gpus=job.num_gpus or None,
                        entrypoint_memory=int(job.memory_gib * 2**30) or None,
                        entrypoint_label_selector=dict(job.labels) if job.labels else None,
                    )
                )
            except RuntimeError as error:  # a head node that has just started has no job agent yet (Ray 2.60)
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                say("the cluster's head node is still starting: trying again")


def follow(client: Any, job: str, write: Callable[[str], object]) -> int:
    """Writes a job's log as it comes, until the job ends; a connection that breaks is made again.

    Returns: an exit status: 0 where it succeeded, 130 where it was stopped, otherwise its process's own (or 1).

    Raises: SubmissionError: no such job, or the cluster is gone.
    """
    from aiohttp import ClientError

    address = client.get_address()
    written = 0

    async def tail() -> None:
        nonlocal written
        seen = 0
        async for text in client.tail_job_logs(job):  # from the log's beginning, each time
            fresh = text[max(0, written - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
                written += len(fresh)

    broken = 0
    while True:
        with _job_errors(address, job):
            info = client.get_job_info(job)
        before = written
        try:
            asyncio.run(tail())
        except (RuntimeError, OSError, ClientError) as error:
            broken = 0 if written > before else broken + 1
            if broken > _RECONNECTS:
                raise SubmissionError(f"{address}: the log of {job!r} breaks off: {error}") from error
        with _job_errors(address, job):
            info = client.get_job_info(job)
            if info.status.is_terminal():
                write(client.get_job_logs(job)[written:])  # what came after the last look
                return exit_status(info)
        time.sleep(min(5.0, 0.2 * 2**broken))


def exit_status(info: Any) -> int:
    """Of a job that has ended."""
    if str(info.status) == "SUCCEEDED":
        return 0
    if str(info.status) == "STOPPED":
        return 130
    code = info.driver_exit_code
    return code if isinstance(code, int) and 0 < code < 256 else 1


def describe(client: Any, job: str) -> dict[str, Any]:
    """A job's state, for people and programs. Raises: SubmissionError: no such job."""
    with _job_errors(client.get_address(), job):
        return _as_dict(client.get_job_info(job))


def list_jobs(client: Any, team: str | None = None) -> list[dict[str, Any]]:
    """Submitted jobs, newest first; of one team where it is named."""
    with _job_errors(client.get_address()):
        found = [_as_dict(info) for info in client.list_jobs() if info.submission_id]
    wanted = [job for job in found if team is None or job["team"] == team]
    return sorted(wanted, key=lambda job: job["started"] or "", reverse=True)


def stop(client: Any, job: str) -> str:
    """Stops a job and waits until it has ended. Returns: its status. Raises: SubmissionError: no such job, or it goes on."""
    with _job_errors(client.get_address(), job):
        if client.get_job_info(job).status.is_terminal():
            return str(client.get_job_info(job).status)
        client.stop_job(job)
        deadline = time.monotonic() + _STOP_WAIT_S
        while time.monotonic() < deadline:
            status = client.get_job_info(job).status
            if status.is_terminal():
                return str(status)
            time.sleep(0.2)
    raise SubmissionError(f"{job}: still running {_STOP_WAIT_S:.0f} s after it was told to stop: ask again later")


def _as_dict(info: Any) -> dict[str, Any]:
    def time_of(milliseconds: int | None) -> str | None:
        if not milliseconds:
            return None
        return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")

    metadata = info.metadata or {}
    return {
        "id": info.submission_id,
        "status": str(info.status),
        "team": metadata.get("team"),
        "category": metadata.get("category"),
        "config_sha256": metadata.get("config_sha256"),
        "submitted_by": metadata.get("submitted_by"),
        "started": time_of(info.start_time),
        "ended": time_of(info.end_time),
        "exit_code": info.driver_exit_code,
        "entrypoint": info.entrypoint,
        "message": info.message,
    }
