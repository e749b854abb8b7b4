"""The setting cluster.labels keeps the work of every command on the nodes of one site; other sites may not read its bucket."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY
from s3_server import S3Server
from shared_bundles import PLAIN
from small_set import draw_parts, small_config


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_labels_keep_every_command_on_the_site_that_may_use_the_bucket(s3: S3Server, tmp_path: Path) -> None:
    root = s3.new_uri()
    config = small_config(f"{root}/data", f"{root}/runs", model=PLAIN, cluster={"labels": {"site": "a"}})
    script, images = REPOSITORY / "tests/site_nodes.py", draw_parts(tmp_path / "images")
    ended = subprocess.run(
        [sys.executable, script, images, root, json.dumps(config.model_dump(mode="json"))],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout.strip().splitlines()[-1])
    node_a, node_b, node_c = (report["nodes"][site] for site in "abc")
    checks, results = report["checks"], report["results"]
    assert checks["a"] == ["", []]
    assert checks["none"][0].startswith("node ")
    assert f"({node_b[:8]})" in checks["none"][0]
    assert "cannot write: the credentials are wrong or expired" in checks["none"][0]
    error, (warning,) = checks["a or c"]
    assert (error, f"({node_c[:8]})" in warning, f"({node_a[:8]})" in warning) == ("", True, False)
    assert f"({node_c[:8]})" in checks["c"][0]
    assert checks["d"][0] == ""
    assert "no node for workers with the labels {'site': 'd'}" in checks["d"][1][0]
    for command in ("ingest", "evaluate", "inspect-batch"):
        assert results[command][0] == 0, results[command]
    status, messages = results["evaluate without labels"]
    assert (status, f"({node_b[:8]})" in messages) == (1, True)
    places = {name: set(node_ids) for name, node_ids in report["places"].items()}
    assert [places[name] for name in ("_WorkerActor.call_function", "ingest_chunk")] == [{node_a}] * 2, places
    del places["_find_storage_problem"]  # it ran on all nodes
    assert not {node_b, node_c}.intersection(*places.values()), places
