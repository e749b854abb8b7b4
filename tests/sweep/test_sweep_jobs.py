"""Sweeps as jobs on a cluster of several nodes that require tokens, with data and results on S3; drivers and nodes are killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from job_nodes import REPOSITORY, Nodes, run_nodes
from s3_server import S3Server
from waiting import wait_for_records

from focus_ray.storage.files import list_folder_entries, read_bytes
from focus_ray.sweep import records
from focus_ray.sweep.records import read_trial_records

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]

CATEGORIES = ("bottle", "hazelnut_toy")


@pytest.fixture
def nodes(s3_server: S3Server, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Three nodes with real images, whose S3 keys this process has. A test may kill one node."""
    with run_nodes(s3_server, 3) as nodes:
        for name, value in nodes.access.items():
            monkeypatch.setenv(name, value)
        nodes.ingest(shared / "data/mvtec", ["bottle"])
        nodes.ingest(shared / "data", ["hazelnut_toy"])
        yield nodes


def sweep_words(nodes: Nodes, weights: Path, *overrides: str) -> list[str]:
    """Returns the command of a sweep over both categories with small images."""
    return [
        "sweep", "configs/sweep.yaml", f"base.data.uri={nodes.root}/data", f"base.storage={nodes.root}/sweeps",
        f"base.model.weights={weights}", "base.model.image_size_px=96", "base.cluster.use_gpu=false", *overrides,
    ]  # fmt: skip


DENSITIES = (  # six settings that share features
    "space={density.num_channels: [16, 32, 64], density.shrinkage: [0.5, 4.0]}",
    "base.density={reduction: semi_orthogonal, coreset: 0}",
)
TRAINED = (  # six settings whose training takes some time
    "base.train.steps=4",
    "space={train.learning_rate: [1.0e-4, 1.0e-3, 1.0e-1], model.predictor_width: [32, 256]}",
    "max_concurrent_trials=2",
)


def read_scores(root: str) -> list[float | None]:
    """Returns the scores of a sweep, sorted by the number of the trial."""
    return [record.score for record in read_trial_records(root)]


def test_a_sweep_started_with_ray_job_submit_prints_a_table(nodes: Nodes, resnet18_weights: Path) -> None:
    two_nodes = ("base.cluster.labels={site: b}", "base.cluster.memory_gib_per_worker=0.25")
    arguments = sweep_words(nodes, resnet18_weights, *DENSITIES, "name=search", "base.cluster.team=press", *two_nodes)
    process = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", nodes.address,
            "--working-dir", str(REPOSITORY), "--", "python", "jobs/sweep.py", *arguments[1:],
        ],
        env=dict(nodes.environment), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-2000:]
    root = f"{nodes.root}/sweeps/search"
    trials = read_trial_records(root)
    assert [(record.status, sorted(record.categories)) for record in trials] == [("finished", sorted(CATEGORIES))] * 6
    assert {result["shared"] for record in trials for result in record.categories.values()} == {"features"}
    table = read_bytes(f"{root}/report.md").decode().partition("\n**all categories**")[0]
    assert table in process.stdout
    assert all(category in table for category in CATEGORIES)


def test_simultaneous_sweeps_of_two_teams_finish_separately(nodes: Nodes, resnet18_weights: Path) -> None:
    def send(team: str) -> subprocess.CompletedProcess[str]:
        share = sweep_words(nodes, resnet18_weights, *DENSITIES, "cluster_share=0.5")
        return nodes.run("submit", "--team", team, *share)

    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(send, ("north", "south")))
    assert [run.returncode for run in processes] == [0, 0], processes[0].stdout[-2000:] + processes[1].stdout[-2000:]
    names = list_folder_entries(f"{nodes.root}/sweeps")
    assert sorted(name.split("-")[0] for name in names) == ["north", "south"]
    scores = []
    for name in names:
        root = f"{nodes.root}/sweeps/{name}"
        assert records.read_sweep_config(root).make_trial_config().cluster.team == name.split("-")[0]
        scores.append(read_scores(root))
        assert "scratch" not in list_folder_entries(root)
        assert f"{root}/best.yaml" in next(run.stdout for run in processes if name in run.stdout)
    assert len(scores[0]) == 6
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    for team in ("north", "south"):
        listed = nodes.run("jobs", "list", "--team", team).stdout.splitlines()
        assert [line.split("\t")[0].split("-")[0] for line in listed] == [team]


def test_a_node_that_is_killed_during_a_sweep_loses_no_trial(nodes: Nodes, resnet18_weights: Path) -> None:
    root = f"{nodes.root}/sweeps/shaken"
    # Four trials run at once on six CPUs of three nodes, so some run on the killed node.
    follower = nodes.start(
        "submit", *sweep_words(nodes, resnet18_weights, *TRAINED, "max_concurrent_trials=4", "name=shaken")
    )
    wait_for_records(root, 1, follower, 300.0)
    before = read_trial_records(root)
    nodes.kill_a_worker_node()
    out, err = follower.communicate(timeout=400)
    assert follower.returncode == 0, out[-3000:] + err[-1000:]
    assert [record for record in read_trial_records(root) if record in before] == before  # no trial was run again
    undisturbed = nodes.run("submit", *sweep_words(nodes, resnet18_weights, *TRAINED, "name=undisturbed"))
    assert undisturbed.returncode == 0, undisturbed.stdout[-3000:]
    expected = read_scores(f"{nodes.root}/sweeps/undisturbed")
    assert len(expected) == 6
    assert read_scores(root) == pytest.approx(expected, abs=1e-5)
