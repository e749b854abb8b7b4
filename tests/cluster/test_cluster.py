"""Checks before a run: how many trainings fit, with the arithmetic; node labels; access to storage from every node."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import S3Server

from focus_ray.cluster.connect import resources_per_worker, uses_gpu
from focus_ray.cluster.preflight import RESERVED, count_concurrent_runs, matches, probe_nodes
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, TrainingError

pytestmark = pytest.mark.ray


# The session's cluster is one node of four CPUs and no GPU.


def test_concurrent_trainings_are_counted_with_the_cpu_of_the_stream(ray_cluster: None) -> None:
    assert count_concurrent_runs(ClusterConfig(num_workers=4), is_private=True) == 1
    assert count_concurrent_runs(ClusterConfig(num_workers=1), is_private=True) == 4
    assert count_concurrent_runs(ClusterConfig(num_workers=1), is_private=True, streams=True) == 2
    assert count_concurrent_runs(ClusterConfig(num_workers=1), is_private=True, limit=3) == 3


def test_a_share_of_the_cluster_is_used_and_the_arithmetic_is_logged(ray_cluster: None) -> None:
    said: list[str] = []
    assert count_concurrent_runs(ClusterConfig(num_workers=1), True, False, said.append, share=0.5) == 2
    assert said == ["side by side: 2 of 1 worker(s) of 1 CPU, in 0.5 of 4 CPU"]
    assert count_concurrent_runs(ClusterConfig(num_workers=1), True, False, said.append, share=0.5, limit=1) == 1
    assert said[1] == "side by side: 1 as set; room for 2"
    with pytest.raises(
        TrainingError,
        match=r"^0\.5 of the cluster .* 3 worker\(s\), which need 3 CPU of its 4 CPU",
    ):
        count_concurrent_runs(ClusterConfig(num_workers=3), is_private=True, share=0.5)
    assert count_concurrent_runs(ClusterConfig(num_workers=3, max_cpus=8), is_private=False, share=0.5) == 1
    with pytest.raises(TrainingError, match=r"grow to 8 CPU, .* 0\.5 .*: lower base\.cluster\.num_w"):
        count_concurrent_runs(ClusterConfig(num_workers=5, max_cpus=8), is_private=False, share=0.5, prefix="base.")


@pytest.mark.parametrize(
    ("config", "streams", "message"),
    [
        (
            {"num_workers": 5},
            False,
            r"^5 worker\(s\) of 1 CPU need 5 CPU; this machine has 4 CPU, and room for 4 such worker\(s\) on its 1 "
            r"node\(s\): lower cluster\.num_workers",
        ),
        (
            {"num_workers": 4},
            True,
            r"^4 worker\(s\) of 1 CPU \+ 1 CPU for the stream of images need 5 CPU; .* raise data\.memory_budget_mb",
        ),
        (
            {"use_gpu": True},
            False,
            r"of 1 CPU \+ 1 GPU need 1 CPU \+ 1 GPU; this machine has 4 CPU \+ 0 GPU, and room for 0",
        ),
        ({"memory_gib_per_worker": 1e6}, False, r"need 1 CPU \+ 1e\+06 GiB memory; this machine has 4 CPU \+ "),
        (
            {"labels": {"gpu": "h100"}},
            False,
            r"room for 0 such worker\(s\) on its 1 node\(s\) labelled {'gpu': 'h100'}",
        ),
    ],
)
def test_a_training_that_never_fits_is_refused_with_the_arithmetic(
    ray_cluster: None, config: dict[str, object], streams: bool, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        count_concurrent_runs(ClusterConfig(**config), is_private=True, streams=streams)  # type: ignore[arg-type]


def test_a_cluster_without_known_growth_refuses(ray_cluster: None) -> None:
    with pytest.raises(TrainingError, match=r"the cluster has 4 CPU.* or set cluster\.max_cpus"):
        count_concurrent_runs(ClusterConfig(num_workers=5), is_private=False)


def test_a_cluster_that_can_grow_enough_waits_and_one_that_cannot_refuses(ray_cluster: None) -> None:
    said: list[str] = []
    assert count_concurrent_runs(ClusterConfig(num_workers=8, max_cpus=8), False, False, said.append) == 1
    assert len(said) == 1
    assert "WARNING: 8 worker(s) of 1 CPU need 8 CPU; the cluster has 4 CPU" in said[0]
    assert "waiting for it to grow; otherwise stop, and lower cluster.num_workers" in said[0]
    with pytest.raises(TrainingError, match=r"need 9 CPU; .* and can grow to 8 CPU: lower cluster\.num_workers"):
        count_concurrent_runs(ClusterConfig(num_workers=9, max_cpus=8), is_private=False)


def test_gpus_that_the_cluster_can_grow_to_are_used(ray_cluster: None) -> None:
    assert not uses_gpu(ClusterConfig())
    assert uses_gpu(ClusterConfig(max_gpus=2))
    resources = resources_per_worker(ClusterConfig(max_gpus=2, memory_gib_per_worker=2), use_gpu=True)
    assert resources == {"CPU": 1.0, "GPU": 1.0, "memory": 2 * 2**30}


def test_resources_of_the_jobs_own_process_are_not_counted(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESERVED, json.dumps({"CPU": 1}))
    assert count_concurrent_runs(ClusterConfig(num_workers=3), is_private=False) == 1
    with pytest.raises(TrainingError, match=r"the cluster has 4 CPU, .* process uses 1 CPU, and room"):
        count_concurrent_runs(ClusterConfig(num_workers=4), is_private=False)


@given(
    st.dictionaries(st.sampled_from("ab"), st.sampled_from("xyz")),
    st.sampled_from("ab"),
    st.lists(st.sampled_from("xyz"), min_size=1, unique=True),
)
def test_a_selector_and_its_negation_never_agree(labels: dict[str, str], key: str, values: list[str]) -> None:
    listed = f"in({', '.join(values)})"
    assert matches(labels, {key: listed}) == (labels.get(key) in values)
    assert matches(labels, {key: listed}) != matches(labels, {key: f"!{listed}"})
    assert matches(labels, {key: values[0]}) != matches(labels, {key: f"!{values[0]}"})
    assert matches(labels, {})


def test_a_run_is_refused_where_its_storage_cannot_be_written(
    ray_cluster: None, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        DataError, match=r"S3 bucket 'focus-ray-tests', key '.*/_probe-\w+' at .*: cannot write: access"
    ):
        probe_nodes([], [s3.new_uri()])


WRONG_NODE = """
import os, sys
from ray.cluster_utils import Cluster
import ray
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.errors import DataError
if __name__ == "__main__":
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    right, os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ["AWS_SECRET_ACCESS_KEY"], "wrong"
    nodes.add_node(num_cpus=1)  # its processes have this environment
    os.environ["AWS_SECRET_ACCESS_KEY"] = right
    ray.init(address=nodes.address, logging_level="error")
    try:
        probe_nodes([], [sys.argv[1]])
    except DataError as error:
        print(error)
    ray.shutdown()
    nodes.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.s3
def test_a_node_whose_own_credentials_are_wrong_is_named(s3: S3Server) -> None:
    arguments = [sys.executable, "-c", WRONG_NODE, s3.new_uri()]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert "cannot write: the credentials are wrong or expired" in ended.stdout, ended.stdout + ended.stderr[-2000:]
    assert ended.stdout.startswith("node ")
