"""serve/ and the RayService manifest: Serve and the service accept them; alerts and dashboard use existing metrics."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import REPOSITORY

from focus_ray.errors import ConfigError
from focus_ray.serving.metrics import METRICS
from focus_ray.serving.settings import parse_service_settings

FOLDER = REPOSITORY / "serve"
MANIFESTS = yaml.safe_load_all((REPOSITORY / "configs" / "cluster" / "rayservice.yaml").read_text())
RAY_SERVICE = next(document["spec"] for document in MANIFESTS if document["kind"] == "RayService")
SERVE_CONFIGS = {
    "deploy.yaml": yaml.safe_load((FOLDER / "deploy.yaml").read_text()),
    "rayservice.yaml": yaml.safe_load(RAY_SERVICE["serveConfigV2"]),
}


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_and_the_service_accept_the_deploy_yaml(name: str) -> None:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    tree = SERVE_CONFIGS[name]
    ServeDeploySchema.model_validate(tree)
    assert set(tree) <= set(ServeDeploySchema.model_fields)  # Serve ignores unknown keys
    (application,) = tree["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    assert tree["http_options"]["request_timeout_s"] > parse_service_settings(application["args"]).limits.timeout_s
    module, _, builder = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), builder))


def test_build_refuses_an_unknown_key() -> None:
    from focus_ray.serving.app import build

    with pytest.raises(ConfigError, match=r"args of the application: pool\.num_gpu: .*'num_gpus'"):
        build({"registry": "x", "tokens": "y", "pool": {"num_gpu": 1}})


def test_build_refuses_a_label_that_ray_does_not_understand(tmp_path: Path) -> None:
    from focus_ray.serving.app import build

    with pytest.raises(ConfigError, match=r"labels=.*in\(a"):
        build({"registry": str(tmp_path), "tokens": "y", "labels": {"site": "in(a"}})


def test_the_manifest_gives_replicas_time_to_finish_and_enough_gpus() -> None:
    from focus_ray.serving.app import GRACEFUL_SHUTDOWN_S

    settings = parse_service_settings(SERVE_CONFIGS["rayservice.yaml"]["applications"][0]["args"])
    groups: list[Any] = RAY_SERVICE["rayClusterConfig"]["workerGroupSpecs"]
    (group,) = (group for group in groups if group["groupName"] == "gpu")
    pod = group["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > GRACEFUL_SHUTDOWN_S + settings.limits.timeout_s
    num_gpus = float(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) * group["maxReplicas"]
    assert settings.pool.scaling.max_replicas * settings.pool.num_gpus <= num_gpus


def test_alerts_and_dashboard_use_existing_metrics() -> None:
    suffixes = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
    exported = {f"ray_focus_ray_{name}{end}" for name, metric in METRICS.items() for end in suffixes[metric.kind]}
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    text = "\n".join(expressions)
    names = set(re.findall(r"ray_focus_ray_\w+", text))
    assert names
    assert names <= exported
    assert set(re.findall(r"focus_ray:\S+?(?=[\s)]|$)", text)) <= {rule.get("record") for rule in rules}
    assert all(expression.count("(") == expression.count(")") for expression in expressions)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})  # no panel covers another
