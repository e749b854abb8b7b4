"""Submits commands to a Ray cluster as jobs; follows, lists and stops jobs. Uses Ray's Jobs API and checks jobs first.

A job is sent with the code of this package and the working directory, without data, virtual environments, hidden files and
trained weights. Credentials are never sent: everyone who can list jobs can read the environment of a job. The nodes of the
cluster have their own credentials, as a role or a secret.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from packaging.version import Version

from focus_ray.cluster.ray_private import fetch_cluster_metadata
from focus_ray.errors import SubmissionError
from focus_ray.names import Log
from focus_ray.retries import compute_retry_pause_s
from focus_ray.submission.job_request import JobRequest

MIN_RAY_VERSION = "2.60"  # the same as in pyproject.toml
MIN_PYTHON_VERSION = "3.10"
HEADERS_VARIABLE = "RAY_JOB_HEADERS"  # JSON object; Ray's own commands read it too

_STOP_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 60.0
_MAX_FAILURES = 7
_POLL_INTERVAL_S = 1.0


def connect_to_cluster(
    address: str | None = None, headers: Sequence[str] = (), cookies: Sequence[str] = (), verify: str = "true"
) -> Any:
    """Returns a client of the Jobs API of a cluster.

    Args:
        address: "http://host:8265"; None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS from the environment.
        headers: HTTP headers that a proxy requires, as "NAME=VALUE" or "NAME=@FILE" (the value is the content of the file).
            They are added to the headers of RAY_JOB_HEADERS.
        cookies: Cookies in the same form.
        verify: Check of the server's certificate: "true", "false", or a file or folder with trusted certificates.

    Raises:
        SubmissionError: There is no address, a header or a cookie cannot be read, the cluster does not answer, or the token is
            missing or wrong.
    """
    server = os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # Ray 2.60 prefers this variable to the argument
    address = address or server or os.environ.get("RAY_ADDRESS")
    if not address:
        raise SubmissionError("no cluster is named: give --address http://HEAD:8265, or set RAY_ADDRESS")
    all_headers = {**_read_headers_variable(), **_read_named_values("--header", headers)}
    trust = {"true": True, "false": False}.get(verify.lower(), verify)
    if not trust:  # otherwise urllib3 warns at every request
        warnings.filterwarnings("ignore", message="Unverified HTTPS request")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # otherwise it logs every upload
    with _translate_ray_errors(address):
        return JobSubmissionClient(
            address, headers=all_headers, cookies=_read_named_values("--cookie", cookies), verify=trust
        )


def _read_headers_variable() -> dict[str, str]:
    """Returns the HTTP headers of RAY_JOB_HEADERS. Raises: SubmissionError: the variable holds no JSON object of texts."""
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE) or "{}")
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise SubmissionError(f'{HEADERS_VARIABLE}: expected a JSON object of texts, such as {{"X-Key": "..."}}')
    return headers


def _read_named_values(option: str, items: Sequence[str]) -> dict[str, str]:
    """Returns name -> value of headers or cookies.

    Args:
        option: Name of the command's option, for messages.
        items: "NAME=VALUE", or "NAME=@FILE" for the content of a file.

    Raises:
        SubmissionError: An item has another form, or its file cannot be read. The message contains no value.
    """
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise SubmissionError(f"{option}: expected NAME=VALUE or NAME=@FILE")
        if value.startswith("@"):
            file = Path(value[1:]).expanduser()
            try:
                value = file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SubmissionError(f"{option} {name}: cannot read {file}: {error}") from error
        values[name] = value
    return values


@contextmanager
def _translate_ray_errors(address: str, job_id: str | None = None) -> Iterator[None]:
    """Context manager: turns errors of Ray's client into SubmissionError with the address and advice.

    Args:
        address: Address of the cluster.
        job_id: Submission id that the calls in the block use; None if they use no job.

    Raises:
        SubmissionError: A call in the block failed.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise SubmissionError(
            f"{address}: the cluster requires another token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to the token that the cluster was started with; a proxy in front of it may also require "
            f"--header or --cookie [{str(error).splitlines()[0][:200]}]"
        ) from error
    except requests.exceptions.JSONDecodeError as error:
        raise SubmissionError(
            f"{address}: the server answers, but not as Ray's dashboard does: correct --address; a proxy that shows a login "
            "page requires --header or --cookie"
        ) from error
    except ConnectionError as error:
        if isinstance(error.__context__, requests.exceptions.SSLError):
            reason = str(error.__context__).rpartition("] ")[2].rstrip("')")
            raise SubmissionError(
                f"{address}: the certificate of the server is not trusted: give --verify FILE with the certificate of its "
                f"authority [{reason}]"
            ) from error
        raise SubmissionError(
            f"{address}: no Ray cluster answers at this address: correct --address, or start the cluster"
        ) from error
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        if job_id is not None and "404" in text:
            raise SubmissionError(
                f"{address}: the cluster has no job {job_id!r}: `focus-ray jobs list` shows its jobs"
            ) from error
        raise SubmissionError(f"{address}: {text[:500]}") from error


def check_cluster_versions(client: Any, say: Log, runtime_env: Mapping[str, Any] | None = None) -> None:
    """Checks that the cluster runs supported versions of Ray and Python, and warns if they differ from the local versions.

    Args:
        client: Client of the Jobs API.
        say: Prints a warning.
        runtime_env: Keys of the job's runtime environment. A key that replaces the interpreter gives a note, because Ray
            refuses a driver or worker whose version differs from the cluster's.

    Raises:
        SubmissionError: Ray or Python on the cluster is too old, or the cluster does not answer.
    """
    import ray

    address = client.get_address()
    with _translate_ray_errors(address):
        metadata = fetch_cluster_metadata(client)
    local_python = ".".join(map(str, sys.version_info[:3]))
    versions = (
        ("Ray", metadata["rayVersion"], MIN_RAY_VERSION, ray.__version__),
        ("Python", metadata["pythonVersion"], MIN_PYTHON_VERSION, local_python),
    )
    for program, version, oldest, local in versions:
        if Version(version) < Version(oldest):
            raise SubmissionError(
                f"{address}: the cluster runs {program} {version}; focus_ray needs {program} {oldest} or newer"
            )
        if Version(version).release[:2] != Version(local).release[:2]:
            say(f"WARNING: the cluster runs {program} {version}, this machine has {program} {local}")
    for key in ("image_uri", "py_executable", "conda"):
        if key in (runtime_env or {}):
            cluster = " and ".join(f"{program} {version}" for program, version, _, _ in versions)
            say(f"note: {key} replaces the interpreter of the job: it needs {cluster}, the versions of the cluster")


def submit_job(client: Any, request: JobRequest, say: Log) -> str:
    """Checks the versions of the cluster and submits the job.

    Args:
        client: Client of the Jobs API.
        request: The job.
        say: Prints warnings and progress.

    Returns:
        The submission id of the job.

    Raises:
        SubmissionError: The cluster is too old, does not answer or refuses the job.
    """
    check_cluster_versions(client, say, request.runtime_env)
    runtime_env = {**request.runtime_env, "env_vars": dict(request.environment)}
    with tempfile.TemporaryDirectory(prefix="focus-ray-") as folder, _translate_ray_errors(client.get_address()):
        if request.package.names:
            archive = Path(folder) / "package.zip"
            archive.write_bytes(request.package.content)
            runtime_env["working_dir"] = str(archive)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=request.entrypoint,
                        submission_id=request.submission_id,
                        runtime_env=runtime_env,
                        metadata=dict(request.metadata),
                        **request.resources,
                    )
                )
            except RuntimeError as error:  # a head node has no job agent during its first seconds (Ray 2.60)
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                say("the head node of the cluster is still starting: trying again")


def follow_job_log(client: Any, job_id: str, write: Callable[[str], object]) -> int:
    """Writes the log of a job until the job ends. Reads the log again if the cluster does not answer for some time.

    Args:
        client: Client of the Jobs API.
        job_id: Submission id of the job.
        write: Takes each new piece of the log.

    Returns:
        The exit status of the job; see `get_exit_status`.

    Raises:
        SubmissionError: The job does not exist, or the cluster did not answer _MAX_FAILURES times in a row.
    """
    num_written, num_failures = 0, 0
    describe_job(client, job_id)  # fails at once if the job does not exist
    while True:
        start = time.monotonic()
        try:
            with _translate_ray_errors(client.get_address(), job_id):
                info = client.get_job_info(job_id)
                log = client.get_job_logs(job_id)  # from its beginning
        except SubmissionError:
            num_failures += 1
            if num_failures >= _MAX_FAILURES:
                raise
            time.sleep(compute_retry_pause_s(num_failures))
            continue
        num_failures = 0
        write(log[num_written:])
        num_written = len(log)
        if info.status.is_terminal():
            return get_exit_status(info)
        time.sleep(max(_POLL_INTERVAL_S, 5 * (time.monotonic() - start)))  # so that a long log loads the cluster little


def get_exit_status(info: Any) -> int:
    """Returns the exit status of a job that has ended: 0 after success, 130 after a stop, otherwise the process's status or 1.

    Args:
        info: Ray's JobDetails.
    """
    code = info.driver_exit_code
    failure_status = code if isinstance(code, int) and 0 < code < 256 else 1
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(str(info.status), failure_status)


def describe_job(client: Any, job_id: str) -> dict[str, Any]:
    """Returns the state of a job as a dict of JSON values: id, status, team, times, exit code and more.

    Raises:
        SubmissionError: The job does not exist, or the cluster does not answer.
    """
    with _translate_ray_errors(client.get_address(), job_id):
        return _convert_job_details(client.get_job_info(job_id))


def list_jobs(client: Any, team: str | None = None) -> list[dict[str, Any]]:
    """Returns the states of submitted jobs as `describe_job` does, newest first; only jobs of `team` if it is given."""
    with _translate_ray_errors(client.get_address()):
        all_jobs = [_convert_job_details(info) for info in client.list_jobs() if info.submission_id]
    team_jobs = [job for job in all_jobs if team is None or job["team"] == team]
    return sorted(team_jobs, key=lambda job: job["started"] or "", reverse=True)


def stop_job(client: Any, job_id: str) -> str:
    """Stops a job and waits until it has ended.

    Returns:
        The status of the job.

    Raises:
        SubmissionError: The job does not exist, or it is still running after _STOP_TIMEOUT_S.
    """
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    with _translate_ray_errors(client.get_address(), job_id):
        client.stop_job(job_id)  # does nothing if the job has ended
        while time.monotonic() < deadline:
            if (status := client.get_job_info(job_id).status).is_terminal():
                return str(status)
            time.sleep(0.2)
    raise SubmissionError(f"{job_id}: still running {_STOP_TIMEOUT_S:.0f} s after the request to stop: try again later")


def _convert_job_details(info: Any) -> dict[str, Any]:
    """Returns the state of a job as a dict of JSON values (the result of `describe_job`).

    Args:
        info: Ray's JobDetails.
    """
    metadata = info.metadata or {}
    return {
        "id": info.submission_id,
        "status": str(info.status),
        **{key: metadata.get(key) for key in ("team", "category", "config_sha256", "submitted_by")},
        "started": _format_utc_time(info.start_time),
        "ended": _format_utc_time(info.end_time),
        "exit_code": info.driver_exit_code,
        "entrypoint": info.entrypoint,
        "message": info.message,
    }


def _format_utc_time(milliseconds: int | None) -> str | None:
    """Returns a time as ISO text in UTC; None if Ray gives no time."""
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")
