"""If an S3 server throttles and dies, training and batch inspection lose no row and count no row twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3_faults import faulty
from s3_server import S3Server, find_program, free_ports, start, wait_until_ready
from small_set import NUM_TEST, NUM_TRAIN, draw_parts, small_config
from waiting import wait_for

from focus_ray.bundle.bundle import read_bundle
from focus_ray.data.read import read_index
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import list_folder_entries, open_filesystem

STEPS = 5
RUN = """
import json, sys
import ray
from focus_ray.evaluation.batch_inspection import inspect_dataset
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train
if __name__ == "__main__":
    config, output = parse_config(json.loads(sys.argv[1]), is_fitted=True), sys.argv[2]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    bundles = train(config, log=lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(inspect_dataset(bundles, config.data.uri, output)))
"""


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_server_that_is_killed_and_throttles_loses_and_repeats_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, folder, ports = find_program(), tmp_path / "s3", free_ports(5)
    folder.mkdir()
    process, server = start(program, folder, ports)
    try:
        assert wait_until_ready(process, server)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        root = server.new_uri()
        ingest(draw_parts(tmp_path / "images"), f"{root}/data", categories=["gear"], progress=False)
        config = small_config(
            f"{root}/data",
            f"{root}/runs",
            data={"uri": f"{root}/data", "categories": ["gear"], "memory_budget_mb": 0},  # streamed, every pass anew
            train={"steps": STEPS},
            cluster={"num_workers": 2, "use_gpu": False},
        )
        with faulty(server.endpoint, share=0.05) as proxy, (tmp_path / "log").open("w") as log:
            arguments = [sys.executable, "-c", RUN, json.dumps(config.model_dump(mode="json")), f"{root}/results"]
            environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
            run = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            checkpoints = f"{root}/runs/small/train/gear"

            def has_checkpoint() -> bool:
                return run.poll() is not None or any(
                    n.startswith("checkpoint_") for n in list_folder_entries(checkpoints)
                )

            wait_for(has_checkpoint, 200, "a checkpoint")
            assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
            process.kill()
            process.wait()
            killed_at = proxy.passed
            time.sleep(3)
            process, _ = start(program, folder, ports)
            assert wait_until_ready(process, S3Server(server.endpoint))
            out, _ = run.communicate(timeout=400)
            assert run.returncode == 0, (tmp_path / "log").read_text()[-3000:]
            print(
                f"{proxy.refused} of {proxy.refused + proxy.passed} requests refused, {proxy.passed - killed_at} after"
            )
            assert proxy.refused > 5
        assert json.loads(out.strip().splitlines()[-1])["gear"]["num_images"] == NUM_TRAIN + NUM_TEST
        bundle = read_bundle(f"{root}/runs/small/bundles/gear")
        assert [figures["step"] for figures in bundle.manifest["metrics"]["history"]] == list(range(1, STEPS + 1))
        held_out = bundle.manifest["data"]["num_holdout"]
        assert bundle.manifest["moments"]["count"] + held_out == NUM_TRAIN
        filesystem, path = open_filesystem(f"{root}/results/category=gear")
        ids = pq.read_table(path, filesystem=filesystem, partitioning=None)["id"].to_pylist()
        assert sorted(ids) == sorted(read_index(f"{root}/data", "gear")["id"].to_pylist())
    finally:
        process.kill()
        process.wait()
