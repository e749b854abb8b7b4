"""Sending commands to a Ray cluster as jobs, and following, listing and stopping them: the Jobs API, with checks first.

What is sent is this package's own code and the working directory without data, environments, hidden files and trained
weights. Credentials are never sent: a cluster's nodes hold their own, as a role or a secret, and a job's environment can be
read by all who can list jobs.
"""

from __future__ import annotations

import asyncio
import fnmatch
import getpass
import hashlib
import io
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from focus_ray import __version__
from focus_ray.cluster import RESERVED
from focus_ray.config import Config, config_to_yaml, load_config, read_mapping, unique_name
from focus_ray.errors import SubmissionError
from focus_ray.search import SweepConfig, load_sweep

MAX_PACKAGE_MIB = 64  # Ray refuses 512; every node fetches it through the head node
OLDEST_RAY = (2, 60)  # as the package itself requires
OLDEST_PYTHON = (3, 10)
LEFT_OUT = (
    "__pycache__",
    "*.egg-info",
    "node_modules",
    "*.pyc",
    "*.parquet",
    "*.safetensors",
    "*.pth",
    "*.pt",
    "*.ckpt",
)
LEFT_OUT_AT_TOP = ("data", "runs", "registry", "quickstart", "scratch")
# sent by name: where the S3 server is and how to reach it, never who may
PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_EC2_METADATA_DISABLED",
)
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|PRIVATE_KEY|API_?KEY", re.IGNORECASE)
_YAML = (".yaml", ".yml")
_CONFIGURED = {"train": "", "sweep": "base."}  # commands that take a configuration -> what leads its keys
_STOP_WAIT_S = 60.0
_START_WAIT_S = 60.0
_RECONNECTS = 6


@dataclass(frozen=True)
class Package:
    """The files that a job is sent with.

    content: a zip archive, the same bytes for the same files.  num_bytes: of the files, before compression.
    """

    content: bytes
    names: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        size = len(self.content) / 2**20
        return f"{len(self.names)} files, {self.num_bytes / 2**20:.1f} MiB ({size:.1f} MiB compressed)"


@dataclass(frozen=True)
class Job:
    """What a submission says to Ray. submission_id: names the job.  environment: variables of the job's processes."""

    submission_id: str
    entrypoint: str
    package: Package
    environment: Mapping[str, str]
    metadata: Mapping[str, str]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_gib: float = 0.0
    labels: Mapping[str, str] | None = None


def build_package(folder: str | Path, excludes: Sequence[str] = ()) -> Package:
    """Packs a folder, without what a job does not need, and this package where the folder does not hold it.

    Args:
        excludes: shell patterns of names or of paths below the folder, besides LEFT_OUT and LEFT_OUT_AT_TOP.

    Raises: SubmissionError: no such folder, or more than MAX_PACKAGE_MIB; it names the largest files.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise SubmissionError(f"{folder}: no such folder to send: give --working-dir")
    files = dict(_files_to_send(root, excludes))
    if "focus_ray/__init__.py" not in files:
        package = Path(__file__).resolve().parent
        files.update({f"focus_ray/{name}": path for name, path in _files_to_send(package, ())})
    sizes = {name: path.stat().st_size for name, path in files.items()}
    limit = MAX_PACKAGE_MIB * 2**20
    largest = ", ".join(
        f"{name} ({size / 2**20:.1f} MiB)" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:5]
    )
    too_large = (
        f"{folder}: more than {MAX_PACKAGE_MIB} MiB to send; the largest files are {largest}: "
        "leave out what the job does not need with --exclude, and put data on S3"
    )
    if sum(sizes.values()) > 8 * limit:  # not worth compressing
        raise SubmissionError(too_large)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # its date is 1980: the same files make the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    if len(buffer.getvalue()) > limit:
        raise SubmissionError(too_large)
    return Package(buffer.getvalue(), tuple(sorted(files)), sum(sizes.values()))


def _files_to_send(root: Path, excludes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name below the root, file)"""
    patterns = (*LEFT_OUT, *(pattern.rstrip("/") for pattern in excludes))

    def wanted(name: str, at_top: bool) -> bool:
        base = name.rpartition("/")[2]
        if base.startswith(".") or (at_top and base in LEFT_OUT_AT_TOP):
            return False
        return not any(fnmatch.fnmatchcase(base, p) or fnmatch.fnmatchcase(name, p) for p in patterns)

    for folder, folders, files in os.walk(root):
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(
            name
            for name in folders
            if wanted(prefix + name, not prefix) and not (Path(folder) / name / "pyvenv.cfg").is_file()
        )
        for name in files:
            path = Path(folder) / name
            if wanted(prefix + name, False) and path.is_file():
                yield prefix + name, path


def build_job(
    command: Sequence[str],
    *,
    commands: Collection[str] = (),
    team: str | None = None,
    category: str | None = None,
    working_dir: str | Path = ".",
    excludes: Sequence[str] = (),
    env: Sequence[str] = (),
    python: str = "python",
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    memory_gib: float = 0.0,
    labels: Mapping[str, str] | None = None,
) -> Job:
    """Checks a command and gathers what it needs; contacts nothing.

    Args:
        command: a `focus-ray` command, or a program and its arguments where the first word is none of `commands`.
        env: NAME (its value here) or NAME=value, for the job's environment.
        num_cpus, num_gpus, memory_gib, labels: what the job's own process asks of Ray; nothing puts it on the head node.

    Raises: SubmissionError, ConfigError: what cannot work on another machine.
    """
    if not command:
        raise SubmissionError(
            "nothing to submit: give a command, for instance: focus-ray submit train configs/run.yaml"
        )
    ours = command[0] in commands
    arguments = list(command)
    metadata = {"focus_ray": __version__, "submitted_by": _user(), "command": command[0]}
    if team is not None and any(word.endswith(_YAML) for word in command) and ours and command[0] in _CONFIGURED:
        arguments.append(f"{_CONFIGURED[command[0]]}cluster.team={team}")
    package = build_package(working_dir, excludes)
    if ours:
        metadata.update(_read_config(arguments, Path(working_dir), package))
    metadata.update({key: value for key, value in (("team", team), ("category", category)) if value})
    environment = dict(_environment(env))
    reserved = {key: value for key, value in (("CPU", num_cpus), ("GPU", num_gpus)) if value}
    if memory_gib:
        reserved["memory"] = memory_gib * 2**30
    if reserved:
        environment[RESERVED] = json.dumps(reserved)
    program = [python, "-m", "focus_ray.cli", *arguments] if ours else arguments
    name = unique_name(team, Path(command[0]).stem)
    return Job(
        name, shlex.join(program), package, environment, metadata, num_cpus, num_gpus, memory_gib, dict(labels or {})
    )


def _read_config(arguments: Sequence[str], working_dir: Path, package: Package) -> dict[str, str]:
    """Metadata of the configuration that a command names, once it is known to work where the job will run.

    Raises: ConfigError: as `load_config`.  SubmissionError: it would not be there, or its places would not.
    """
    files = [word for word in arguments[1:] if word.endswith(_YAML) and "=" not in word]
    if not files:
        return {}
    path = working_dir / files[0]
    if Path(os.path.normpath(files[0])).as_posix() not in package.names:
        raise SubmissionError(
            f"{files[0]}: not among the files that are sent from {working_dir}: give its path below --working-dir"
        )
    overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
    if arguments[0] not in _CONFIGURED:
        return {"config_sha256": hashlib.sha256(path.read_bytes() + "\n".join(overrides).encode()).hexdigest()}
    prefix = _CONFIGURED[arguments[0]]
    whole: Config | SweepConfig
    weights: list[str] = []
    if prefix:
        whole = load_sweep(path, overrides)
        config = whole.base_config()
        base_file = read_mapping(path).get("base_file")
        if base_file and Path(os.path.normpath(Path(files[0]).parent / base_file)).as_posix() not in package.names:
            raise SubmissionError(
                f"base_file {base_file} of {files[0]}: not among the files that are sent: put it beside it"
            )
        if "model.weights" in whole.space:
            weights = [str(value) for value in whole.space["model.weights"].samples()]
    else:
        whole = config = load_config(path, overrides)
    named = {config.model.weights, *weights} - {"default", "random"}
    places = [
        ("data.uri", config.data.uri),
        ("storage", config.storage),
        *(("model.weights", one) for one in sorted(named)),
    ]
    for key, place in places:
        sent = key == "model.weights" and place in package.names
        key = prefix + key
        if "://" not in place and not place.startswith("/") and not sent:
            raise SubmissionError(
                f"{key}={place}: a path below the folder that is sent, of which each node has a copy of its own: give an "
                "s3:// URI, or the absolute path of a folder that all nodes share"
            )
    return {
        "config_sha256": hashlib.sha256(config_to_yaml(whole).encode()).hexdigest(),
        "category": ",".join(config.data.categories or ("all",)),
        **{key: value for key in ("team", "priority") if (value := getattr(config.cluster, key))},
    }


def _environment(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The job's variables. Raises: SubmissionError: one is not set, or is a secret."""
    for name in PASSED_ON:
        if os.environ.get(name):
            yield name, _without_password(name, os.environ[name])
    for item in names:
        name, given, value = item.partition("=")
        if _SECRET.search(name):
            raise SubmissionError(
                f"--env {name}: a secret is not sent with a job, whose environment can be read by all who can list jobs: "
                "give the cluster's nodes a role, or a secret of their own (docs/JOBS.md)"
            )
        if not given and name not in os.environ:
            raise SubmissionError(f"--env {name}: not set here: set it, or give {name}=value")
        yield name, _without_password(name, value if given else os.environ[name])


def _without_password(name: str, value: str) -> str:
    if "://" in value and urllib.parse.urlsplit(value).password:
        raise SubmissionError(f"{name}: its address holds a password, which is not sent with a job: take it out")
    return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


# ---- the cluster's side


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
        answer = client._do_request("GET", "/api/v0/cluster_metadata")  # no public call tells the Python version
        answer.raise_for_status()
        found = answer.json()["data"]
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
