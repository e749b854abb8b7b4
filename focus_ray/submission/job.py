"""A job as it will be sent, checked before anything is contacted."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shlex
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from focus_ray import __version__
from focus_ray.cluster.preflight import RESERVED
from focus_ray.config import Config, config_to_yaml, load_config, read_mapping
from focus_ray.errors import SubmissionError
from focus_ray.names import unique_name
from focus_ray.standard import COMMANDS, standard_folder, standard_names
from focus_ray.submission.package import Package, build_package
from focus_ray.sweep.settings import SweepConfig, load_sweep

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
YAML = (".yaml", ".yml")
_CONFIGURED = {"train": "", "sweep": "base."}  # commands that take a configuration -> what leads its keys


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
    metadata = {"focus_ray": __version__, "submitted_by": user(), "command": command[0]}
    configured = _standard_in(command, working_dir) is not None or any(word.endswith(YAML) for word in command)
    if team is not None and configured and ours and command[0] in _CONFIGURED:
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
    words = [word.removeprefix("--config=") for word in arguments[1:]]
    files = [word for word in words if word.endswith(YAML) and "=" not in word]
    standard = _standard_in(arguments, working_dir)
    if standard is None and not files:
        return {}
    path = standard or working_dir / files[0]
    if standard is None and Path(os.path.normpath(files[0])).as_posix() not in package.names:
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
        if (
            standard is None
            and base_file
            and Path(os.path.normpath(Path(files[0]).parent / base_file)).as_posix() not in package.names
        ):
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
        *([("density.metric", config.density.metric)] if config.density.metric else []),
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


def _standard_in(command: Sequence[str], working_dir: str | Path) -> Path | None:
    """The standard configuration that a command names, which goes along with the package; None where it names none."""
    kinds = {command: kind for kind, command in COMMANDS.items()}
    if command[0] not in kinds:
        return None
    names = standard_names(kinds[command[0]])
    words = (word.removeprefix("--config=") for word in command[1:])
    found = next((word for word in words if word in names and not (Path(working_dir) / word).is_file()), None)
    return None if found is None else standard_folder() / f"{found}.yaml"


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
                "give the cluster's nodes a role, or a secret of their own (docs/use/jobs.md)"
            )
        if not given and name not in os.environ:
            raise SubmissionError(f"--env {name}: not set here: set it, or give {name}=value")
        yield name, _without_password(name, value if given else os.environ[name])


def _without_password(name: str, value: str) -> str:
    if "://" in value and urllib.parse.urlsplit(value).password:
        raise SubmissionError(f"{name}: its address holds a password, which is not sent with a job: take it out")
    return value


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
