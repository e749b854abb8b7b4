"""Words such as cluster.labels.site=a set nodes and resources of evaluate, inspect-batch and ingest, by one code path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from focus_ray.cli.main import main
from focus_ray.cluster.settings import ClusterConfig, parse_cluster_settings
from focus_ray.errors import ConfigError
from focus_ray.evaluation.batch_inspection import inspect_dataset
from focus_ray.evaluation.run import evaluate_bundles
from focus_ray.ingestion.cluster import ingest_on_cluster


def test_words_of_the_command_line_become_cluster_settings() -> None:
    words = ["cluster.labels.site=a", "cluster.gpus_per_worker=0.5", "cluster.team=press"]
    config = parse_cluster_settings(words)
    assert config == ClusterConfig(labels={"site": "a"}, gpus_per_worker=0.5, team="press")
    assert config.ray_namespace == "focus-ray-press"
    with pytest.raises(ConfigError, match=r"^train: .*cluster\.labels\.site=a"):
        parse_cluster_settings(["train.steps=1"])


def evaluate_nothing(cluster: ClusterConfig) -> Any:
    return evaluate_bundles({}, "out", max_side_px=64, exact_pixels=0, cluster=cluster)


def inspect_nothing(cluster: ClusterConfig) -> Any:
    return inspect_dataset({}, "data", "out", cluster=cluster)


def ingest_nothing(cluster: ClusterConfig) -> Any:
    return ingest_on_cluster("source", "out", cluster=cluster)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        (
            evaluate_nothing,
            {"min_workers": 1},
            r"^cluster\.min_workers=1 has no effect on evaluate: .*cluster\.labels, ",
        ),
        (
            inspect_nothing,
            {"max_concurrent_categories": 2},
            r"^cluster\.max_concurrent_categories=2 .*on inspect-batch: ",
        ),
        (
            ingest_nothing,
            {"max_gpus": 2},
            r"^cluster\.max_gpus=2\.0 .*on ingest: .*cluster\.labels, .*cluster\.max_cpus$",
        ),
        (ingest_nothing, {"num_workers": 2}, r"^cluster\.num_workers=2 has no effect on ingest: use --workers\. "),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_settings_that_have_one(
    run: Callable[[ClusterConfig], Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(ClusterConfig(**settings))


@pytest.mark.parametrize("command", ["evaluate {0}", "inspect-batch {0} {0} {0}/out", "ingest {0} {0}/out --workers 2"])
def test_each_command_names_a_misspelt_setting(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.format(tmp_path).split(), "cluster.label.site=a"]) == 1
    assert "cluster: label: unknown key; did you mean 'labels'?" in capsys.readouterr().err


def test_ingest_in_its_own_process_refuses_cluster_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", str(tmp_path), str(tmp_path / "out"), "cluster.labels.site=a"]) == 1
    assert "cluster.labels.site=a: has an effect only with --workers" in capsys.readouterr().err
