"""All commands on a cluster that starts from zero: its head has no CPU, and an autoscaler adds nodes when they are requested."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from autoscaling_nodes import AutoscaledCluster, run_autoscaled_cluster
from places import free_port
from small_set import draw_parts, ingest_parts
from waiting import wait_for

from focus_ray.sweep.records import read_trial_records

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]

GROUPS = {
    "cpu": {"resources": {"CPU": 2}, "max_workers": 4},
    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 1},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscaledCluster]:
    with run_autoscaled_cluster(GROUPS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small network for the categories of `ingest_parts`, as a file."""
    folder = tmp_path_factory.mktemp("zero")
    settings = {
        "name": "small",
        "storage": str(folder / "runs"),
        "data": {"uri": ingest_parts(folder)},
        "model": {"weights": "random", "image_size_px": 64},
        "density": {"num_channels": 32, "reduction": "semi_orthogonal"},
        "calibration": {"method": "split"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def trained(cluster: AutoscaledCluster, config_file: Path) -> str:
    """The folder of a run whose categories were trained on nodes that did not exist before. Also checks the command."""
    output = cluster.run("train", str(config_file))
    assert "side by side: up to 2, each with 1 worker(s) of 1 CPU; room for 0 now" in output
    return str(config_file.parent / "runs" / "small")


def test_trained_bundles_are_evaluated_and_inspect_images(cluster: AutoscaledCluster, trained: str) -> None:
    cluster.run("evaluate", trained, "--workers", "2")
    report = json.loads(Path(trained, "report", "report.json").read_text())
    assert set(report["categories"]) == {"board", "gear"}
    assert not any("error" in result for result in report["categories"].values())
    data = Path(trained).parents[1] / "data"
    cluster.run("inspect-batch", f"{trained}/bundles", str(data), f"{trained}/inspected", "--actors", "2")
    assert len(list(Path(trained, "inspected").glob("category=*/*.parquet"))) >= 2


def test_images_are_ingested(cluster: AutoscaledCluster, tmp_path: Path) -> None:
    cluster.run("ingest", str(draw_parts(tmp_path / "images")), str(tmp_path / "data"), "--workers", "auto")
    assert {path.name for path in (tmp_path / "data").glob("category=*")} == {"category=board", "category=gear"}


def test_the_trials_of_a_sweep_run_in_parallel(cluster: AutoscaledCluster, config_file: Path, tmp_path: Path) -> None:
    base = yaml.safe_load(config_file.read_text())
    base["storage"] = str(tmp_path)
    space = {"density.num_channels": [8, 16, 24, 32], "density.shrinkage": ["0.5 absolute", "4.0 absolute"]}
    sweep = {"name": "search", "base": base, "space": space, "searcher": "grid", "share_work": False}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    output = cluster.run("sweep", str(tmp_path / "sweep.yaml"))
    assert "side by side: up to 64" in output
    records = read_trial_records(str(tmp_path / "search"))
    assert [record.status for record in records] == ["finished"] * 8
    # each trial runs from `ended_at - seconds` to `ended_at`; the largest number of overlapping trials
    starts = [record.ended_at - record.seconds for record in records]
    assert max(sum(s <= t < r.ended_at for s, r in zip(starts, records, strict=True)) for t in starts) >= 3


def test_training_with_ddp_waits_for_its_nodes(cluster: AutoscaledCluster, config_file: Path, tmp_path: Path) -> None:
    cluster.run(
        "train", str(config_file), f"storage={tmp_path}", "name=ddp", "data.categories=[gear]", "train.steps=1",
        "cluster.num_workers=3",
    )  # fmt: skip
    assert (tmp_path / "ddp" / "bundles" / "gear" / "manifest.json").is_file()


def test_a_service_gets_its_node(cluster: AutoscaledCluster, trained: str) -> None:
    port = free_port()
    process = cluster.start("serve", f"{trained}/bundles", "--port", str(port))
    try:

        def is_ready() -> bool:
            assert process.poll() is None, process.communicate()[0][-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        wait_for(is_ready, 240, "the service is ready", every_s=1.0)
    finally:
        process.terminate()
        process.communicate(timeout=120)


def test_a_run_that_the_cluster_cannot_hold_says_what_it_waits_for(
    cluster: AutoscaledCluster, config_file: Path, tmp_path: Path
) -> None:
    process = cluster.start(
        "train", str(config_file), f"storage={tmp_path}", "data.categories=[gear]", "cluster.use_gpu=true",
        "cluster.num_workers=2", "train.steps=1",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if "waiting for " in line), "")
        assert re.search(r"waiting for .*GPU.* for \d+ min; the cluster has .* GPU", line), line
    finally:
        process.kill()
        process.communicate()
