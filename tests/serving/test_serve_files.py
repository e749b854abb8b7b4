"""serve/ and the RayService manifest: Serve and the service accept them; alerts and dashboard use existing metrics."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest
import yaml
from places import REPOSITORY

from focus_ray.errors import ConfigError
from focus_ray.serving.settings import parse_settings

FOLDER = REPOSITORY / "serve"
MANIFEST = REPOSITORY / "configs" / "cluster" / "rayservice.yaml"


def ray_service() -> dict[str, Any]:
    """Returns the RayService of the manifest, which also has the front proxy."""
    documents = yaml.safe_load_all(MANIFEST.read_text())
    return next(document for document in documents if document["kind"] == "RayService")


def serve_configs() -> dict[str, dict[str, Any]]:
    """Returns the Serve configurations by file name."""
    return {
        "deploy.yaml": yaml.safe_load((FOLDER / "deploy.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(ray_service()["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["deploy.yaml", "rayservice.yaml"])
def test_serve_and_the_service_accept_the_deploy_yaml(name: str) -> None:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    tree = serve_configs()[name]
    ServeDeploySchema.model_validate(tree)
    assert set(tree) <= set(ServeDeploySchema.model_fields)  # Serve ignores unknown keys
    for application in tree["applications"]:
        assert set(application) <= set(ServeApplicationSchema.model_fields)
        settings = parse_settings(application["args"])
        assert tree["http_options"]["request_timeout_s"] > settings.limits.timeout_s
        module, _, builder = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), builder))


def test_build_refuses_an_unknown_key() -> None:
    from focus_ray.serving.app import build

    with pytest.raises(
        ConfigError, match=r"args of the application: pool\.num_gpu: unknown key; did you mean 'num_gpus'"
    ):
        build({"registry": "x", "tokens": "y", "pool": {"num_gpu": 1}})


def test_the_manifest_gives_replicas_time_to_finish_and_enough_gpus() -> None:
    spec = ray_service()["spec"]
    arguments = parse_settings(serve_configs()["rayservice.yaml"]["applications"][0]["args"])
    (group,) = (group for group in spec["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "gpu")
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > arguments.pool.graceful_shutdown_s + arguments.limits.timeout_s
    gpus = float(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert arguments.pool.scaling.max_replicas * arguments.pool.num_gpus <= gpus * group["maxReplicas"]


def exported() -> set[str]:
    """Returns the names of all metrics in Prometheus: Ray adds the prefix `ray_`, and `_total` to counters."""
    source = (REPOSITORY / "focus_ray" / "serving" / "metrics.py").read_text()
    names = set()
    for kind, name in re.findall(r"(Counter|Gauge|Histogram)\(\s*\"(focus_ray_\w+)\"", source):
        endings = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}[kind]
        names.update(f"ray_{name}{ending}" for ending in endings)
    return names


def test_alerts_and_dashboard_use_existing_metrics() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    metric_names = {name for expression in expressions for name in re.findall(r"ray_focus_ray_\w+", expression)}
    assert metric_names
    assert metric_names - exported() == set()
    recorded = {rule["record"] for rule in rules if "record" in rule}
    used = {name for expression in expressions for name in re.findall(r"focus_ray:\S+?(?=[\s)]|$)", expression)}
    assert used <= recorded
    for expression in expressions:
        assert expression.count("(") == expression.count(")")


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(panels) == len({p["id"] for p in panels})
