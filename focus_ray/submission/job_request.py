"""The request for a job: this module builds and checks it before anything contacts the cluster."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_ray.cluster.capacity import RESERVED_RESOURCES_VARIABLE
from focus_ray.errors import SubmissionError
from focus_ray.fitting.settings import load_config
from focus_ray.names import make_unique_name, suggest_similar_name
from focus_ray.settings.sections import config_to_yaml, read_yaml_mapping
from focus_ray.settings.standard import COMMANDS, find_standard_config_folder, list_standard_configs
from focus_ray.submission.package import NO_FILES, JobPackage, build_job_package
from focus_ray.version import __version__

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
# scheme://user:password@host, and https://token@host as package indexes and Git servers take it
_ADDRESS_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@|https?://[^/@\s]+@")
# Keys of Ray's runtime environment that a user may set. `submit` sets working_dir itself, and --exclude replaces excludes.
RUNTIME_ENV_KEYS = ("pip", "uv", "conda", "image_uri", "py_executable", "env_vars", "config")
# command with a configuration -> prefix of the configuration's keys
_KEY_PREFIXES = {"train": "", "sweep": "base."}


@dataclass(frozen=True)
class JobRequest:
    """The command, files and resources of a job that is sent to Ray.

    Attributes:
        submission_id: Unique name of the job.
        entrypoint: Shell command that the job runs.
        package: Files that are sent with the job. They are empty if the job runs in a container image.
        environment: Environment variables of the job's processes.
        runtime_env: Further keys of Ray's runtime environment, such as pip; without working_dir and env_vars.
        metadata: Texts about the job: team, category, user and more.
        resources: Resources and node labels of the process of the command, as arguments of Ray's `submit_job`.
    """

    submission_id: str
    entrypoint: str
    package: JobPackage
    environment: Mapping[str, str]
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]
    resources: Mapping[str, Any]


def build_job_request(
    command: Sequence[str],
    load_sweep_config: Callable[[Path, Sequence[str]], Any],
    *,
    commands: Collection[str] = (),
    team: str | None = None,
    category: str | None = None,
    working_dir: str | Path = ".",
    excludes: Sequence[str] = (),
    env: Sequence[str] = (),
    runtime_env: str | Path | None = None,
    python: str = "python",
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    memory_gib: float = 0.0,
    labels: Mapping[str, str] | None = None,
) -> JobRequest:
    """Checks a command and collects everything that its job needs. Does not contact the cluster.

    Args:
        command: A `focus-ray` command with its arguments; or any program, if the first word is not in `commands`.
        load_sweep_config: `sweep.settings.load_sweep_config`, which reads and checks the configuration of a sweep.
        commands: Names of the `focus-ray` commands.
        team: Team that owns the job.
        category: Category that the job is about; replaces the categories of the configuration.
        working_dir: Folder that is sent with the job.
        excludes: Shell patterns of files that are not sent.
        env: "NAME" (takes the value on this machine) or "NAME=value", for the job's environment.
        runtime_env: YAML or JSON file with keys of Ray's runtime environment (RUNTIME_ENV_KEYS). `env` overrides its env_vars.
        python: Python program on the cluster.
        num_cpus, num_gpus, memory_gib, labels: Resources and node labels of the command's own process. Without them, Ray
            may start this process on any node.

    Raises:
        SubmissionError, ConfigError: The job cannot work on another machine.
    """
    if not command:
        raise SubmissionError("nothing to submit: give a command, such as: focus-ray submit train configs/run.yaml")
    arguments = list(command)
    name = make_unique_name(team, Path(command[0]).stem)
    runtime_keys = {} if runtime_env is None else read_runtime_env(runtime_env)
    file_variables = runtime_keys.pop("env_vars", {})
    # Ray refuses image_uri together with working_dir, so the image must contain focus_ray
    package = NO_FILES if "image_uri" in runtime_keys else build_job_package(working_dir, excludes)
    metadata = {"focus_ray": __version__, "submitted_by": get_user_name(), "command": command[0]}
    if command[0] in commands:
        file = _find_config_file(command, Path(working_dir), package)
        if file is not None:
            if team is not None and command[0] in _KEY_PREFIXES:
                arguments.append(f"{_KEY_PREFIXES[command[0]]}cluster.team={team}")
            run_name, config_metadata = _check_config_for_cluster(
                arguments, file, Path(working_dir), package, load_sweep_config
            )
            metadata.update(config_metadata)
            if command[0] in _KEY_PREFIXES and run_name in (None, "auto") and "--resume" not in command:
                # a job that starts again, for instance after a preemption, then continues its run
                arguments = [word for word in arguments if word != "name=auto"] + [f"name={name}", "--resume"]
        arguments = [python, "-m", "focus_ray.cli", *arguments]
    metadata.update({key: value for key, value in (("team", team), ("category", category)) if value})
    environment = _collect_environment_variables(env, file_variables)
    _refuse_passwords_in_addresses({**environment, **runtime_keys})
    memory = int(memory_gib * 2**30)
    reserved = {kind: value for kind, value in (("CPU", num_cpus), ("GPU", num_gpus), ("memory", memory)) if value}
    if reserved:
        environment[RESERVED_RESOURCES_VARIABLE] = json.dumps(reserved)
    resources = {
        "entrypoint_num_cpus": num_cpus or None,
        "entrypoint_num_gpus": num_gpus or None,
        "entrypoint_memory": memory or None,
        "entrypoint_label_selector": dict(labels) if labels else None,
    }
    return JobRequest(name, shlex.join(arguments), package, environment, runtime_keys, metadata, resources)


def read_runtime_env(path: str | Path) -> dict[str, Any]:
    """Reads keys of Ray's runtime environment from a YAML or JSON file, and checks them with Ray's own rules.

    A requirements file of `pip` or `uv` becomes the list of its packages. Its path is relative to the current folder.

    Raises:
        ConfigError: The file cannot be read, or is not a YAML mapping.
        SubmissionError: A key is unknown or belongs to `submit`, or a value is not valid.
    """
    from ray.runtime_env import RuntimeEnv

    settings = read_yaml_mapping(path)
    for key in settings:
        if key in ("working_dir", "excludes"):
            raise SubmissionError(
                f"{path}: {key}: submit sets this key itself: use --working-dir and --exclude instead"
            )
        if key not in RUNTIME_ENV_KEYS:
            hint = suggest_similar_name(str(key), RUNTIME_ENV_KEYS)
            raise SubmissionError(f"{path}: {key}: unknown key; {hint or 'expected ' + ', '.join(RUNTIME_ENV_KEYS)}")
    for key in ("image_uri", "py_executable"):  # Ray does not check their types
        if not isinstance(settings.get(key, ""), str):
            raise SubmissionError(f"{path}: {key}: expected a text, got {settings[key]!r}")
    try:
        checked = RuntimeEnv(**settings)
    except (TypeError, ValueError, OSError) as error:
        raise SubmissionError(f"{path}: {' '.join(str(error).split())}") from error
    return {key: checked[key] for key in settings if key in checked}


def _find_config_file(command: Sequence[str], working_dir: Path, package: JobPackage) -> str | None:
    """Finds the configuration of a `focus-ray` command.

    Returns: The name of a YAML file that is sent, or the absolute path of a standard configuration; None if the command names
        no configuration.

    Raises:
        SubmissionError: The YAML file is not sent.
    """
    kind_of_command = {command: kind for kind, command in COMMANDS.items()}
    names = list_standard_configs(kind_of_command[command[0]]) if command[0] in kind_of_command else []
    for word in command[1:]:
        word = word.removeprefix("--config=")
        if word in names and not (working_dir / word).is_file():
            return str(find_standard_config_folder() / f"{word}.yaml")
        if word.endswith((".yaml", ".yml")) and "=" not in word:
            _check_file_is_sent(word, package)
            return word
    return None


def _check_file_is_sent(file: str, package: JobPackage) -> None:
    """Checks that a file is sent. Raises: SubmissionError: it is not."""
    if package is NO_FILES:
        raise SubmissionError(
            f"{file}: with image_uri no files are sent: name a standard configuration, and give key=value"
        )
    if Path(os.path.normpath(file)).as_posix() not in package.names:
        raise SubmissionError(f"{file}: is not one of the files that are sent: give a path below --working-dir")


def _check_config_for_cluster(
    arguments: Sequence[str],
    file: str,
    working_dir: Path,
    package: JobPackage,
    load_sweep_config: Callable[[Path, Sequence[str]], Any],
) -> tuple[str | None, dict[str, str]]:
    """Checks that the configuration of a command can work on the cluster, and returns its name and metadata about it.

    Args:
        arguments: The command and its arguments.
        file: Result of `_find_config_file`.
        working_dir: Folder that is sent.
        package: Files that are sent.
        load_sweep_config: See `build_job_request`.

    Returns:
        The name of the run or sweep ("auto" or None if it has no fixed name), and config_sha256; for `train` and `sweep` the
        metadata also has category and team.

    Raises:
        ConfigError: The configuration is not valid.
        SubmissionError: A path in the configuration does not exist on the cluster.
    """
    path = working_dir / file
    overrides = [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
    if arguments[0] not in _KEY_PREFIXES:
        return None, {"config_sha256": hashlib.sha256(path.read_bytes() + "\n".join(overrides).encode()).hexdigest()}
    prefix = _KEY_PREFIXES[arguments[0]]
    weights: set[str] = set()
    if prefix:
        full_config = load_sweep_config(path, overrides)
        config = full_config.make_trial_config()
        base_file = read_yaml_mapping(path).get("base_file")
        if base_file and not Path(file).is_absolute():
            _check_file_is_sent(os.path.join(os.path.dirname(file), base_file), package)
        weights.update(map(str, full_config.list_setting_values("model.weights")))
    else:
        full_config = config = load_config(path, overrides)
    weights = {config.model.weights, *weights} - {"default", "random", *package.names}
    locations = [("data.uri", config.data.uri), ("storage", config.storage), ("density.metric", config.density.metric)]
    locations += [("model.weights", weights_file) for weights_file in sorted(weights)]
    for key, location in locations:
        if location and "://" not in location and not location.startswith("/"):
            raise SubmissionError(
                f"{prefix}{key}={location}: a relative path is below the folder that is sent, and each node has its own copy of "
                "this folder: give an s3:// URI, or the absolute path of a folder that all nodes share"
            )
    return full_config.name, {
        "config_sha256": hashlib.sha256(config_to_yaml(full_config).encode()).hexdigest(),
        "category": ",".join(config.data.categories or ("all",)),
        **({"team": config.cluster.team} if config.cluster.team else {}),
    }


def _collect_environment_variables(variables: Sequence[str], file_variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the job's environment variables: SENT_VARIABLES that are set here, then `file_variables`, then `variables`.

    Args:
        variables: "NAME" (takes the value on this machine) or "NAME=value".
        file_variables: env_vars of the file of --runtime-env.

    Raises:
        SubmissionError: A variable is not set on this machine, or its name looks like a secret.
    """
    environment = {name: os.environ[name] for name in SENT_VARIABLES if os.environ.get(name)}
    pairs: list[tuple[str, str | None]] = [*file_variables.items()]
    for item in variables:
        name, equals, text = item.partition("=")
        pairs.append((name, text if equals else os.environ.get(name)))
    for name, value in pairs:
        if _SECRET.search(name):
            raise SubmissionError(
                f"{name}: a secret is not sent with a job, because everyone who can list jobs can read it: give the nodes "
                "of the cluster a role or their own secret (docs/use/jobs.md)"
            )
        if value is None:
            raise SubmissionError(f"--env {name}: is not set on this machine: set it, or give {name}=value")
        environment[name] = value
    return environment


def _refuse_passwords_in_addresses(values: Mapping[str, Any]) -> None:
    """Checks that no address in the values contains a password. Raises: SubmissionError: it names the key, not the value."""
    for name, value in values.items():
        if _ADDRESS_WITH_PASSWORD.search(str(value)):
            raise SubmissionError(f"{name}: an address contains a password, which is not sent with a job: remove it")


def get_user_name() -> str:
    """Returns the name of the user on this machine, or "unknown"."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user can have a number without a name
        return "unknown"
