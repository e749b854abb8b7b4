"""The request for a job: this module builds and checks it before anything contacts the cluster."""

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
from focus_ray.errors import SubmissionError
from focus_ray.fitting.settings import Config, load_config
from focus_ray.names import unique_name
from focus_ray.settings.sections import config_to_yaml, read_mapping
from focus_ray.settings.standard import COMMANDS, standard_folder, standard_names
from focus_ray.submission.package import Package, build_package
from focus_ray.sweep.settings import SweepConfig, load_sweep

# Variables that are sent with every job: the address of the S3 server and how to reach it, never credentials.
SENT_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_EC2_METADATA_DISABLED",
)
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|PRIVATE_KEY|API_?KEY", re.IGNORECASE)
YAML_SUFFIXES = (".yaml", ".yml")
_KEY_PREFIXES = {
    "train": "",
    "sweep": "base.",
}  # command with a configuration -> prefix of the configuration's keys


@dataclass(frozen=True)
class JobRequest:
    """The command, files and resources of a job that is sent to Ray.

    Attributes:
        submission_id: Unique name of the job.
        entrypoint: Shell command that the job runs.
        package: Files that are sent with the job.
        environment: Environment variables of the job's processes.
        metadata: Texts about the job: team, category, user and more.
        num_cpus, num_gpus, memory_gib: Resources that Ray reserves for the process of the command; 0 reserves nothing.
        labels: Labels of the node on which this process must run.
    """

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
) -> JobRequest:
    """Checks a command and collects everything that its job needs. Does not contact the cluster.

    Args:
        command: A `focus-ray` command with its arguments; or any program, if the first word is not in `commands`.
        commands: Names of the `focus-ray` commands.
        team: Team that owns the job.
        category: Category that the job is about; replaces the categories of the configuration.
        working_dir: Folder that is sent with the job.
        excludes: Shell patterns of files that are not sent.
        env: "NAME" (takes the value on this machine) or "NAME=value", for the job's environment.
        python: Python program on the cluster.
        num_cpus, num_gpus, memory_gib, labels: Resources and node labels of the command's own process. Without them, Ray
            may start this process on any node.

    Raises:
        SubmissionError, ConfigError: The job cannot work on another machine.
    """
    if not command:
        raise SubmissionError(
            "nothing to submit: give a command, for instance: focus-ray submit train configs/run.yaml"
        )
    is_focus_ray = command[0] in commands
    arguments = list(command)
    metadata = {"focus_ray": __version__, "submitted_by": user_name(), "command": command[0]}
    has_config = _find_standard_config(command, working_dir) is not None or any(
        word.endswith(YAML_SUFFIXES) for word in command
    )
    if team is not None and has_config and is_focus_ray and command[0] in _KEY_PREFIXES:
        arguments.append(f"{_KEY_PREFIXES[command[0]]}cluster.team={team}")
    package = build_package(working_dir, excludes)
    if is_focus_ray:
        metadata.update(_check_config(arguments, Path(working_dir), package))
    metadata.update({key: value for key, value in (("team", team), ("category", category)) if value})
    environment = dict(_list_environment(env))
    reserved = {key: value for key, value in (("CPU", num_cpus), ("GPU", num_gpus)) if value}
    if memory_gib:
        reserved["memory"] = memory_gib * 2**30
    if reserved:
        environment[RESERVED] = json.dumps(reserved)
    program = [python, "-m", "focus_ray.cli", *arguments] if is_focus_ray else arguments
    name = unique_name(team, Path(command[0]).stem)
    return JobRequest(
        name, shlex.join(program), package, environment, metadata, num_cpus, num_gpus, memory_gib, dict(labels or {})
    )


def _check_config(arguments: Sequence[str], working_dir: Path, package: Package) -> dict[str, str]:
    """Checks that the configuration of a command can work on the cluster, and returns metadata about it.

    Args:
        arguments: The command and its arguments.
        working_dir: Folder that is sent.
        package: Files that are sent.

    Returns:
        config_sha256, and for `train` and `sweep` also category and team. Empty if the command names no
        configuration.

    Raises:
        ConfigError: The configuration is not valid.
        SubmissionError: The configuration, or a path in it, does not exist on the cluster.
    """
    words = [word.removeprefix("--config=") for word in arguments[1:]]
    files = [word for word in words if word.endswith(YAML_SUFFIXES) and "=" not in word]
    standard = _find_standard_config(arguments, working_dir)
    if standard is None and not files:
        return {}
    path = standard or working_dir / files[0]
    if standard is None and Path(os.path.normpath(files[0])).as_posix() not in package.names:
        raise SubmissionError(
            f"{files[0]}: is not one of the files that are sent from {working_dir}: give a path below --working-dir"
        )
    overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
    if arguments[0] not in _KEY_PREFIXES:
        return {"config_sha256": hashlib.sha256(path.read_bytes() + "\n".join(overrides).encode()).hexdigest()}
    prefix = _KEY_PREFIXES[arguments[0]]
    full_config: Config | SweepConfig
    weights: list[str] = []
    if prefix:
        full_config = load_sweep(path, overrides)
        config = full_config.config_at()
        base_file = read_mapping(path).get("base_file")
        if (
            standard is None
            and base_file
            and Path(os.path.normpath(Path(files[0]).parent / base_file)).as_posix() not in package.names
        ):
            raise SubmissionError(
                f"base_file {base_file} of {files[0]}: is not one of the files that are sent: put it into the same folder"
            )
        if "model.weights" in full_config.space:
            weights = [str(value) for value in full_config.space["model.weights"].samples()]
    else:
        full_config = config = load_config(path, overrides)
    weight_files = {config.model.weights, *weights} - {"default", "random"}
    locations = [
        ("data.uri", config.data.uri),
        ("storage", config.storage),
        *(("model.weights", file) for file in sorted(weight_files)),
        *([("density.metric", config.density.metric)] if config.density.metric else []),
    ]
    for key, location in locations:
        is_sent = key == "model.weights" and location in package.names
        key = prefix + key
        if "://" not in location and not location.startswith("/") and not is_sent:
            raise SubmissionError(
                f"{key}={location}: a relative path is below the folder that is sent, and each node has its own copy of this "
                "folder: give an s3:// URI, or the absolute path of a folder that all nodes share"
            )
    return {
        "config_sha256": hashlib.sha256(config_to_yaml(full_config).encode()).hexdigest(),
        "category": ",".join(config.data.categories or ("all",)),
        **({"team": config.cluster.team} if config.cluster.team else {}),
    }


def _find_standard_config(command: Sequence[str], working_dir: str | Path) -> Path | None:
    """Returns the path of the standard configuration in a command; None if the command names no standard configuration."""
    kind_of_command = {command: kind for kind, command in COMMANDS.items()}
    if command[0] not in kind_of_command:
        return None
    names = standard_names(kind_of_command[command[0]])
    words = (word.removeprefix("--config=") for word in command[1:])
    config_name = next((word for word in words if word in names and not (Path(working_dir) / word).is_file()), None)
    return None if config_name is None else standard_folder() / f"{config_name}.yaml"


def _list_environment(variables: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of the job's environment variables: SENT_VARIABLES that are set here, then `variables`.

    Args:
        variables: "NAME" (takes the value on this machine) or "NAME=value".

    Raises:
        SubmissionError: A variable is not set on this machine, its name looks like a secret, or its value is an address
            with a password.
    """
    for name in SENT_VARIABLES:
        if os.environ.get(name):
            yield name, _check_no_password(name, os.environ[name])
    for item in variables:
        name, equals, value = item.partition("=")
        if _SECRET.search(name):
            raise SubmissionError(
                f"--env {name}: a secret is not sent with a job, because everyone who can list jobs can read it: give the nodes "
                "of the cluster a role or their own secret (docs/use/jobs.md)"
            )
        if not equals and name not in os.environ:
            raise SubmissionError(
                f"--env {name}: this variable is not set on this machine: set it, or give {name}=value"
            )
        yield name, _check_no_password(name, value if equals else os.environ[name])


def _check_no_password(name: str, value: str) -> str:
    """Returns the value of an environment variable unchanged.

    Raises:
        SubmissionError: The value is an address with a password.
    """
    if "://" in value and urllib.parse.urlsplit(value).password:
        raise SubmissionError(
            f"{name}: the address contains a password, which is not sent with a job: remove the password"
        )
    return value


def user_name() -> str:
    """Returns the name of the user on this machine, or "unknown"."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user can have a number without a name
        return "unknown"
