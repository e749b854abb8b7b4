"""Checks before a run: how many trainings fit, with the arithmetic; node labels; access to storage from every node."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import S3Server

from focus_ray.cluster.capacity import (
    RESERVED_RESOURCES_VARIABLE,
    ClusterCapacity,
    compute_worker_resources,
    do_workers_use_gpu,
)
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.cluster.ray_private import labels_match_selector
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, TrainingError

pytestmark = pytest.mark.ray


# The session's cluster is one node of four CPUs and no GPU.


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"num_workers": 4}, {}, 1),
        ({}, {}, 4),
        ({}, {"streams": True}, 2),
        ({}, {"limit": 3}, 3),
        ({}, {"share": 0.5}, 2),
        ({}, {"share": 0.5, "limit": 1}, 1),
        ({"max_cpus": 8}, {"is_private": False}, 8),
        ({"max_cpus": 8}, {"is_private": False, "limit": 6}, 6),
        ({"num_workers": 8, "max_cpus": 8}, {"is_private": False}, 1),  # after growth
        ({"num_workers": 3, "max_cpus": 8}, {"is_private": False, "share": 0.5}, 1),  # after growth
        ({"num_workers": 8, "min_workers": 2}, {}, 1),
    ],
)
def test_concurrent_trainings_are_counted(
    ray_cluster: None, settings: dict[str, Any], options: dict[str, Any], expected: int
) -> None:
    capacity = ClusterCapacity(ClusterConfig(**settings), **{"is_private": True, **options})
    assert capacity.count_trainings(0) == expected


REFUSED = [
    ({"num_workers": 5}, {}, r"^5 worker\(s\) of 1 CPU need 5 CPU; this machine has 4 CPU.*room for 4 .*lower cluster"),
    ({"num_workers": 4}, {"streams": True}, r"1 CPU for the stream .* need 5 CPU; .* raise data\.memory_budget_mb"),
    ({"use_gpu": True}, {}, r"1 CPU \+ 1 GPU need 1 CPU \+ 1 GPU; .* has 4 CPU \+ 0 GPU, and room for 0"),
    ({"memory_gib_per_worker": 1e6}, {}, r"need 1 CPU \+ 1e\+06 GiB memory; this machine has 4 CPU \+ "),
    ({"labels": {"gpu": "h100"}}, {}, r"room for 0 such worker\(s\) on its 0 node\(s\) labelled {'gpu': 'h100'}"),
    ({"num_workers": 3}, {"share": 0.5}, r"3 worker\(s\) .* a share of 0\.5 .* raise cluster_share"),
    ({"num_workers": 5}, {"is_private": False}, r"the cluster has 4 CPU.* or set cluster\.max_cpus"),
    ({"num_workers": 9, "max_cpus": 8}, {"is_private": False}, r"9 CPU; .* can grow to 8 CPU: lower cluster"),
    (
        {"num_workers": 5, "max_cpus": 8},
        {"is_private": False, "share": 0.5, "prefix": "base."},
        r" lower base\.cluster",
    ),
]


@pytest.mark.parametrize(("settings", "options", "message"), REFUSED)
def test_a_training_that_never_fits_is_refused_with_the_arithmetic(
    ray_cluster: None, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        ClusterCapacity(ClusterConfig(**settings), **{"is_private": True, **options})


def test_gpus_that_the_cluster_can_grow_to_are_used(ray_cluster: None) -> None:
    assert not do_workers_use_gpu(ClusterConfig())
    assert do_workers_use_gpu(ClusterConfig(max_gpus=2))
    resources = compute_worker_resources(ClusterConfig(max_gpus=2, memory_gib_per_worker=2), use_gpu=True)
    assert resources == {"CPU": 1.0, "GPU": 1.0, "memory": 2 * 2**30}


def test_resources_of_the_jobs_own_process_are_not_counted(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESERVED_RESOURCES_VARIABLE, json.dumps({"CPU": 1}))
    assert ClusterCapacity(ClusterConfig(num_workers=3), is_private=False).count_trainings(0) == 1
    with pytest.raises(TrainingError, match=r"the cluster has 4 CPU, .* process uses 1 CPU, and room"):
        ClusterCapacity(ClusterConfig(num_workers=4), is_private=False)


@given(
    st.dictionaries(st.sampled_from("ab"), st.sampled_from("xyz")),
    st.sampled_from("ab"),
    st.lists(st.sampled_from("xyz"), min_size=1, unique=True),
)
def test_a_selector_and_its_negation_never_agree(labels: dict[str, str], key: str, values: list[str]) -> None:
    listed = f"in({','.join(values)})"
    assert labels_match_selector(labels, {key: listed}) == (labels.get(key) in values)
    assert labels_match_selector(labels, {key: listed}) != labels_match_selector(labels, {key: f"!{listed}"})
    assert labels_match_selector(labels, {key: values[0]}) != labels_match_selector(labels, {key: f"!{values[0]}"})
    assert labels_match_selector(labels, {})


def test_a_run_is_refused_where_its_storage_cannot_be_written(
    ray_cluster: None, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        DataError, match=r"S3 bucket 'focus-ray-tests', key '.*/_probe-\w+' at .*: cannot write: access"
    ):
        check_storage_on_nodes([], [s3.new_uri()], {}, print)
