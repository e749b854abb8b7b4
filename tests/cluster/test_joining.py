"""Processes join a cluster of two nodes: with right and wrong tokens, and with RAY_TRAIN_* variables for tasks on other nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from places import free_port

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

TOKEN = "a-token-for-tests-0123456789abcdef"
NODES = """
import json, sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": int(sys.argv[1])}
nodes = Cluster(initialize_head=True, head_node_args=head)
nodes.add_node(num_cpus=1, resources={"far": 1})
nodes.wait_for_nodes()
print(json.dumps({"gcs": nodes.address, "client": f"ray://{nodes.head_node.node_ip_address}:{sys.argv[1]}"}), flush=True)
sys.stdin.readline()
nodes.shutdown()
"""
JOIN = """
import ray
from focus_ray.cluster.connect import connect_to_ray
from focus_ray.errors import TrainingError

@ray.remote(resources={"far": 1})
def read_variables():
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    return get_env_vars_to_propagate()["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]

try:
    print(connect_to_ray(), ray.get(read_variables.remote()))
except TrainingError as error:
    print(error)
"""
INIT = """
import sys
from focus_ray.cluster.connect import _init_ray
_init_ray("cannot join", address=sys.argv[1])
"""


def make_environment(**variables: str) -> dict[str, str]:
    """Returns the environment of this process without the variables of Ray, and with time for a busy machine."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**clean, "RAY_raylet_start_wait_time_s": "120", **variables}


def run_python(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=make_environment(**variables), capture_output=True, text=True, timeout=200)


@contextmanager
def run_cluster(**variables: str) -> Iterator[dict[str, str]]:
    """Runs two nodes in another process. Yields the addresses: "gcs", and "client" for Ray Client."""
    folder = tempfile.mkdtemp(prefix="frj-", dir="/tmp")
    command = [sys.executable, "-c", NODES, str(free_port())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=make_environment(RAY_TMPDIR=folder, **variables), text=True, **pipes) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate("end\n", timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def with_token() -> Iterator[dict[str, str]]:
    with run_cluster(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as addresses:
        yield addresses


@pytest.fixture(scope="module")
def without_token() -> Iterator[dict[str, str]]:
    with run_cluster(RAY_AUTH_MODE="disabled") as addresses:
        yield addresses


REFUSED = [
    ({}, "the cluster requires a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
    ({"RAY_AUTH_TOKEN": TOKEN}, "only with RAY_AUTH_MODE=token: set it"),
    ({"RAY_AUTH_MODE": "token"}, "this process has no token: set RAY_AUTH_TOKEN"),
    (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another" * 5},
        "the token of this process is wrong: set RAY_AUTH_TOKEN",
    ),
]


@pytest.mark.parametrize("kind", ["gcs", "client"])
@pytest.mark.parametrize(("variables", "message"), REFUSED)
def test_a_refused_token_is_reported_with_its_reason(
    with_token: dict[str, str], kind: str, variables: dict[str, str], message: str
) -> None:
    ended = run_python(JOIN, RAY_ADDRESS=with_token[kind], HOME="/nowhere", **variables)
    assert message in ended.stdout, ended.stdout + ended.stderr
    assert with_token[kind] in ended.stdout


@pytest.mark.parametrize(("variables", "message"), REFUSED[:1] + REFUSED[2:])
def test_an_error_of_ray_init_about_a_token_is_reported_with_its_reason(
    with_token: dict[str, str], variables: dict[str, str], message: str
) -> None:
    ended = run_python(INIT, with_token["gcs"], HOME="/nowhere", **variables)
    assert "TrainingError: cannot join: " in ended.stderr
    assert message in ended.stderr
    assert "busy machine" not in ended.stderr


@pytest.mark.parametrize("kind", ["gcs", "client"])
def test_variables_of_ray_train_reach_a_task_on_another_node(with_token: dict[str, str], kind: str) -> None:
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.7"}
    ended = run_python(JOIN, RAY_ADDRESS=with_token[kind], **variables)
    assert ended.stdout.splitlines()[-1:] == ["False 0.7"], ended.stdout + ended.stderr


def test_variables_that_a_job_sets_in_its_runtime_environment_do_not_conflict(without_token: dict[str, str]) -> None:
    job = {"runtime_env": {"env_vars": {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.7"}}, "metadata": {}}
    variables = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.7"}
    ended = run_python(JOIN, RAY_ADDRESS=without_token["gcs"], **variables)
    assert ended.stdout.splitlines()[-1:] == ["False 0.7"], ended.stdout + ended.stderr


def test_a_token_does_not_prevent_joining_a_cluster_without_tokens(without_token: dict[str, str]) -> None:
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    ended = run_python(JOIN, RAY_ADDRESS=without_token["gcs"], **variables)
    assert ended.stdout.splitlines()[-1:] == ["False 1.0"], ended.stdout + ended.stderr
