"""A training continues in a new cluster after all processes of the first cluster, its driver included, were killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from job_nodes import run_nodes
from s3_server import S3Server
from small_set import CATEGORIES, draw_parts
from waiting import wait_for

from focus_ray.bundle.bundle import read_bundle
from focus_ray.data.read import decode_rows, read_index
from focus_ray.fitting.settings import load_config
from focus_ray.settings.standard import find_config_file
from focus_ray.storage.files import file_exists, list_folder_entries, read_bytes
from focus_ray.training.training import train

SETTINGS = (
    "name=parts", "model.weights=random", "model.image_size_px=64", "model.precision=fp32",
    "density.reduction=semi_orthogonal", "density.num_channels=32", "scoring.image_score=maximum",
    "calibration.method=split", "train.steps=100", "train.batch_size=4", "train.learning_rate=0.001",
    "cluster.use_gpu=false", "cluster.num_workers=1",
)  # fmt: skip


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_the_same_command_completes_a_run_after_the_loss_of_the_head_node(s3: S3Server, tmp_path: Path) -> None:
    images = draw_parts(tmp_path / "images")
    with run_nodes(s3, 1) as nodes:
        nodes.ingest(images, CATEGORIES)
        root, places = nodes.root, (f"data.uri={nodes.root}/data", f"storage={nodes.root}/runs")
        one_by_one = ("cluster.local=false", "cluster.max_concurrent_categories=1")
        command = ("submit", "train", "default", *SETTINGS, *places, *one_by_one, "--resume")
        submitter = nodes.start(*command)
        manifest = f"{root}/runs/parts/bundles/board/manifest.json"
        checkpoints = f"{root}/runs/parts/train/gear"
        wait_for(
            lambda: file_exists(manifest) and list_folder_entries(checkpoints),
            500.0,
            "the bundle of board and a checkpoint of gear",
        )
        nodes.kill_all_processes()
        submitter.kill()
        submitter.communicate()
    finished = read_bytes(manifest)
    assert not file_exists(f"{root}/runs/parts/bundles/gear/manifest.json")
    with run_nodes(s3, 1) as nodes:
        submitter = nodes.start(*command)
        output, errors = submitter.communicate(timeout=500)
    assert submitter.returncode == 0, output[-3000:] + errors[-2000:]
    assert "board: already trained" in output
    assert "gear: step 10/100" not in output
    assert read_bytes(manifest) == finished
    assert json.loads(read_bytes(f"{root}/runs/parts/state.json"))["state"] == "finished"
    storage = f"storage={tmp_path}"
    config = load_config(find_config_file("default", "run"), [*SETTINGS, places[0], storage, "cluster.local=true"])
    for category, bundle in train(config).items():
        rows = read_index(f"{root}/data", category, split="test")["row"].to_pylist()
        images = torch.cat([torch.from_numpy(batch) for batch in decode_rows(f"{root}/data", category, rows, 64)])
        undisturbed, resumed = (read_bundle(place) for place in (bundle, f"{root}/runs/parts/bundles/{category}"))
        assert torch.allclose(undisturbed.detector(images).score, resumed.detector(images).score, rtol=1e-4)
        assert [entry["step"] for entry in resumed.manifest["metrics"]["history"]] == list(range(10, 101, 10))
