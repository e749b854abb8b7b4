"""A cluster of several nodes that come and go, and that several teams share."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(300)]

START = """
import json, os, sys, time
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from focus_ray.cluster.capacity import ClusterCapacity, make_worker_options
from focus_ray.cluster.pool import FailedPiece, WorkerPool
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import TrainingError

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
messages = []

def connect():
    ray.init(address=nodes.address, logging_level="error", log_to_driver=False)

def make_pool(config, max_retries=0):
    capacity = ClusterCapacity(config, False, messages.append)
    return WorkerPool(capacity, make_worker_options(config, capacity.use_gpu), max_retries, messages.append)

def give(value):
    print("result:", json.dumps(value), flush=True)  # Ray prints lines of its own

def run(pool, function, pieces):
    pieces = iter(pieces)
    return [outcome for _, outcome in pool.run_pieces(function, lambda: next(pieces, None))]
"""


def run_script(script: str, *words: str) -> Any:
    """Runs a script on a cluster of its own, and returns the value that it gives."""
    ended = subprocess.run([sys.executable, "-c", START + script, *words], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (result,) = (line for line in ended.stdout.splitlines() if line.startswith("result:"))
    return json.loads(result.removeprefix("result:"))


def test_the_loss_of_a_node_is_no_failure_of_its_piece(tmp_path: Any) -> None:
    outcomes, messages = run_script(
        """
lost = nodes.add_node(num_cpus=1)
connect()
folder = Path(sys.argv[1])

def work(piece):
    first = not (folder / "started").exists()
    (folder / "started").touch()
    time.sleep(300 if first else 0)
    return "done"

def replace_node():
    if (folder / "started").exists() and not (folder / "replaced").exists():
        (folder / "replaced").touch()
        nodes.remove_node(lost, allow_graceful=False)
        nodes.add_node(num_cpus=1)

import dataclasses
pool = dataclasses.replace(make_pool(ClusterConfig()), listen=replace_node)
outcomes = run(pool, work, ["piece"])
give([[str(outcome) for outcome in outcomes], messages])
""",
        str(tmp_path),
    )
    assert outcomes == ["done"], messages
    assert any(message.startswith("node lost: ") for message in messages)


def test_workers_are_added_when_a_node_joins() -> None:
    num_nodes = run_script("""
nodes.add_node(num_cpus=1)
connect()

def get_node(piece):
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

pool, node_ids = make_pool(ClusterConfig()), set()
pieces = iter(range(200))
for number, node in pool.run_pieces(get_node, lambda: next(pieces, None)):
    node_ids.add(node)
    if number == 2:
        nodes.add_node(num_cpus=2)
    if len(node_ids) == 2:
        break
give(len(node_ids))
""")
    assert num_nodes == 2


def test_a_team_uses_at_most_its_quota() -> None:
    errors, counts, largest = run_script("""
nodes.add_node(num_cpus=4, resources={"team-press": 2, "team-weld": 2})
connect()
errors = []
for team in (None, "paint"):
    try:
        make_pool(ClusterConfig(team=team))
    except TrainingError as error:
        errors.append(str(error))
counts = [ClusterCapacity(ClusterConfig(team=team), False).count_trainings(0) for team in ("press", "weld")]

def work(piece):
    started = time.time()
    time.sleep(1)
    return started, time.time()

# more workers than the quota are requested, and Ray starts only two of them
options = make_worker_options(ClusterConfig(team="press"), False)
actors = [ray.remote(**options)(type("Worker", (), {"work": lambda self: work(0)})).remote() for _ in range(4)]
answers = [actor.work.remote() for actor in actors]
time.sleep(15)
done, _ = ray.wait(answers, num_returns=4, timeout=0)
give([errors, counts, len(done)])
""")
    assert ["press, weld" in error for error in errors] == [True, True]
    assert counts == [2, 2]
    assert largest == 2
