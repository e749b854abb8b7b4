"""Sweeps as jobs on a cluster of several nodes, tokens on, data and results on S3: what ends, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from job_nodes import REPOSITORY, Nodes, run_nodes
from s3_server import S3Server
from waiting import wait_for_records

from focus_ray.config import load_config
from focus_ray.storage import list_names, read_bytes
from focus_ray.sweep import records
from focus_ray.sweep.records import Record, read_records

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(600)]

CATEGORIES = ("bottle", "hazelnut_toy")


@pytest.fixture
def nodes(s3_server: S3Server, shared: Path) -> Iterator[Nodes]:
    """Three nodes, one of which a test may kill, and real images."""
    with run_nodes(s3_server, 3) as nodes:
        nodes.ingest(shared / "data/mvtec", ["bottle"])
        nodes.ingest(shared / "data", ["hazelnut_toy"])
        yield nodes


@pytest.fixture
def _keys(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in nodes.access.items():
        monkeypatch.setenv(name, value)


def words(nodes: Nodes, weights: Path, *overrides: str) -> list[str]:
    """Six settings of the density over both categories, at a small size."""
    return [
        "sweep", "configs/sweep.yaml", f"base.data.uri={nodes.root}/data", f"base.storage={nodes.root}/sweeps",
        f"base.model.weights={weights}", "base.model.image_size_px=96", "base.cluster.use_gpu=false", *overrides,
    ]  # fmt: skip


TRAINED = (  # six settings that take their time: a learning rate, at two widths of the predictor
    "base.train.epochs=4",
    "space={train.learning_rate: [1.0e-4, 1.0e-3, 1.0e-1], model.predictor_width: [32, 256]}",
    "max_concurrent_trials=2",
)


def in_order(found: list[Record]) -> list[float | None]:
    return [record.score for record in sorted(found, key=lambda record: record.number)]


@pytest.mark.usefixtures("_keys")
def test_a_sweep_by_ray_job_submit_ends_with_a_table(nodes: Nodes, resnet18_weights: Path) -> None:
    kept = ("base.cluster.labels={site: b}", "base.cluster.memory_gib_per_worker=0.25")  # on two of the three nodes
    arguments = words(nodes, resnet18_weights, "name=found", "base.cluster.team=press", *kept)
    ended = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", nodes.address,
            "--working-dir", str(REPOSITORY), "--", "python", "jobs/sweep.py", *arguments[1:],
        ],
        env=dict(nodes.environment), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    place = f"{nodes.root}/sweeps/found"
    found = read_records(place)
    assert [(record.status, sorted(record.categories)) for record in found] == [("finished", sorted(CATEGORIES))] * 6
    assert {part["shared"] for record in found for part in record.categories.values()} == {"features"}
    table = read_bytes(f"{place}/report.md").decode()
    print(table)
    assert table in ended.stdout
    assert all(category in table for category in CATEGORIES)
    best = records.best_of(found)[None]
    assert str(best.point["density.num_channels"]) in table


@pytest.mark.usefixtures("_keys")
def test_sweeps_of_two_teams_at_once_finish_and_keep_apart(nodes: Nodes, resnet18_weights: Path) -> None:
    def send(team: str) -> subprocess.CompletedProcess[str]:
        share = words(nodes, resnet18_weights, "cluster_share=0.5")
        return nodes.run("submit", "--team", team, *share)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(send, ("north", "south")))
    assert [run.returncode for run in ended] == [0, 0], ended[0].stdout[-2000:] + ended[1].stdout[-2000:]
    names = list_names(f"{nodes.root}/sweeps")
    assert sorted(name.split("-")[0] for name in names) == ["north", "south"]
    scores = []
    for name in names:
        place = f"{nodes.root}/sweeps/{name}"
        assert records.read_sweep(place).base_config().cluster.team == name.split("-")[0]
        found = read_records(place)
        assert len(found) == 6
        scores.append(in_order(found))
        assert "scratch" not in list_names(place)
        assert f"{place}/best.yaml" in next(run.stdout for run in ended if name in run.stdout)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    for team in ("north", "south"):
        listed = nodes.run("jobs", "list", "--team", team).stdout.splitlines()
        assert [line.split("\t")[0].split("-")[0] for line in listed] == [team]


def compare_with_an_undisturbed_one(nodes: Nodes, weights: Path, disturbed: list[Record]) -> None:
    whole = nodes.run("submit", *words(nodes, weights, *TRAINED, "name=whole"))
    assert whole.returncode == 0, whole.stdout[-3000:]
    expected = read_records(f"{nodes.root}/sweeps/whole")
    assert in_order(disturbed) == pytest.approx(in_order(expected), abs=1e-5)
    assert records.best_of(disturbed)[None].number == records.best_of(expected)[None].number


@pytest.mark.usefixtures("_keys")
def test_a_sweep_whose_driver_is_killed_is_resumed_as_a_job(
    nodes: Nodes, resnet18_weights: Path, tmp_path: Path
) -> None:
    place = f"{nodes.root}/sweeps/broken"
    follower = nodes.start("submit", *words(nodes, resnet18_weights, *TRAINED, "name=broken"))
    wait_for_records(place, 2, follower, 300.0)
    state: dict[str, Any] = json.loads(read_bytes(f"{place}/state.json"))
    os.kill(int(state["pid"]), signal.SIGKILL)
    out, _ = follower.communicate(timeout=120)
    assert follower.returncode == 137, out[-2000:]  # that of the job: 128 + SIGKILL
    before = {record.name: record for record in read_records(place)}
    assert 2 <= len(before) < 6
    resumed = nodes.run("submit", "--team", "press", "sweep", "resume", place)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    after = {record.name: record for record in read_records(place)}
    assert {name: after[name] for name in before} == before  # not one was run again
    (tmp_path / "best.yaml").write_bytes(read_bytes(f"{place}/best.yaml"))
    assert load_config(tmp_path / "best.yaml").train.epochs == 4
    compare_with_an_undisturbed_one(nodes, resnet18_weights, list(after.values()))


@pytest.mark.usefixtures("_keys")
def test_a_node_killed_during_a_sweep_costs_no_trial(nodes: Nodes, resnet18_weights: Path) -> None:
    place = f"{nodes.root}/sweeps/shaken"
    # four side by side on six CPUs of three nodes: some run on the node that goes
    follower = nodes.start(
        "submit", *words(nodes, resnet18_weights, *TRAINED, "max_concurrent_trials=4", "name=shaken")
    )
    wait_for_records(place, 1, follower, 300.0)
    before = {record.name: record for record in read_records(place)}
    nodes.kill_a_worker_node()
    out, err = follower.communicate(timeout=400)
    assert follower.returncode == 0, out[-3000:] + err[-1000:]
    after = {record.name: record for record in read_records(place)}
    assert {name: after[name] for name in before} == before
    assert [record.status for record in after.values()] == ["finished"] * 6
    compare_with_an_undisturbed_one(nodes, resnet18_weights, list(after.values()))
