"""A private cluster requires a token. Without the token, the error message names the variables to set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

START = """
import json, os, sys
import ray
from focus_ray.cluster.connect import connect_to_ray
is_private = connect_to_ray(num_cpus=1)
node = ray._private.worker._global_node
token = os.environ.get("RAY_AUTH_TOKEN", "")
told = {"is_private": is_private, "gcs": node.gcs_address}
told |= {"dashboard": node.webui_url, "mode": os.environ["RAY_AUTH_MODE"], "token": token}
assert ray.get(ray.remote(num_cpus=1)(lambda: 5).remote()) == 5
print(json.dumps(told), flush=True)
sys.stdin.readline()
"""


def make_ray_folder_path(folder: Path) -> Path:
    """Returns a folder with a short path, because the paths of the sockets of Ray are below it."""
    return Path("/tmp") / f"ray-{folder.name[:16]}-{os.getpid()}"


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of a user without a token."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    (folder / "home").mkdir(exist_ok=True)
    return {**clean, "HOME": str(folder / "home"), "RAY_TMPDIR": str(make_ray_folder_path(folder)), **variables}


def run_python(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", command]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Starts a private cluster in another process, with RAY_ADDRESS=local.

    Returns gcs, dashboard, mode, token, the result of `connect_to_ray` (is_private) and the folder of its user.
    """
    folder = tmp_path_factory.mktemp("t")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    variables = environment(folder, RAY_ADDRESS="local")
    with subprocess.Popen([sys.executable, "-c", START], env=variables, text=True, **pipes) as process:
        assert process.stdout is not None
        yield {**json.loads(process.stdout.readline()), "folder": folder}
        process.communicate("end\n", timeout=120)
    shutil.rmtree(make_ray_folder_path(folder), ignore_errors=True)


def request_status(url: str, token: str | None = None, body: bytes | None = None) -> int:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body, headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_address_local_starts_a_private_cluster(private: dict[str, Any]) -> None:
    assert private["is_private"]


def test_the_random_token_of_a_private_cluster_is_not_on_the_disk(private: dict[str, Any]) -> None:
    assert private["mode"] == "token"
    assert len(private["token"]) == 64
    assert not (private["folder"] / "home/.ray/auth_token").exists()


def test_a_request_without_the_token_to_the_jobs_of_a_private_cluster_is_refused(private: dict[str, Any]) -> None:
    jobs = f"http://{private['dashboard']}/api/jobs/"
    submission = json.dumps({"entrypoint": "touch /tmp/never"}).encode()
    assert (request_status(jobs), request_status(jobs, body=submission)) == (401, 401)
    assert request_status(jobs, "0" * 64, submission) in (401, 403)
    assert request_status(jobs, private["token"]) == 200


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "the cluster requires a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "the cluster's"}, "only with RAY_AUTH_MODE=token: set it"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            "the token of this process is wrong: set RAY_AUTH_TOKEN",
        ),
        ({"RAY_AUTH_MODE": "token"}, "this process has no token: set RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the cluster's"}, ""),
    ],
)
def test_joining_without_the_token_names_the_variables_to_set(
    private: dict[str, Any], variables: dict[str, str], message: str
) -> None:
    if variables.get("RAY_AUTH_TOKEN") == "the cluster's":
        variables = {**variables, "RAY_AUTH_TOKEN": private["token"]}
    command = (
        f"from focus_ray.cluster.address import find_cluster_problem; print(find_cluster_problem({private['gcs']!r}))"
    )
    ended = run_python(command, environment(private["folder"], **variables))
    assert message in ended.stdout, ended.stdout + ended.stderr
    assert bool(ended.stdout.strip()) == bool(message)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "disabled None"),
        ({"RAY_AUTH_TOKEN": "of the user"}, "token of the user"),
    ],
)
def test_token_settings_of_the_user_are_kept(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    command = "import os, ray; from focus_ray.cluster import ray_private; ray_private.require_private_cluster_token(); "
    command += "print(os.environ['RAY_AUTH_MODE'], os.environ.get('RAY_AUTH_TOKEN'))"
    printed = run_python(command, environment(tmp_path, **variables)).stdout
    assert printed.strip() == expected
