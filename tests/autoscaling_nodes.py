"""Runs a Ray cluster with Ray's fake autoscaler: a head with 0 CPUs, and groups of nodes that start at 0 nodes.

The nodes are processes of this machine. `ray.cluster_utils.AutoscalingCluster` is not used: Ray 2.60's wheel lacks a file that it
reads, and it ends all clusters of the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import REPOSITORY, free_port
from waiting import wait_for

_EMPTY_LISTS = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
HEAD_TYPE = "ray.head.default"  # the fake provider expects this name


@dataclass(frozen=True)
class AutoscaledCluster:
    """A running cluster. environment: variables with which a process joins it; folder: its files."""

    environment: Mapping[str, str]
    folder: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a focus-ray command that uses the cluster."""
        return subprocess.Popen(
            [sys.executable, "-m", "focus_ray.cli", *words],
            env=dict(self.environment), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str, timeout_s: float = 400) -> str:
        """Runs a focus-ray command that uses the cluster, checks that it succeeds, and returns its output."""
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{words} did not end; output: {process.communicate()[0][-3000:]}") from None
        assert process.returncode == 0, output[-3000:]
        return output

    def count_started_nodes(self) -> int:
        """Returns how many nodes the autoscaler has started so far."""
        logs = self.folder.glob("ray/session_2*/logs/monitor.log")
        return sum(log.read_text(errors="replace").count("new nodes for launch") for log in logs)


@contextmanager
def run_autoscaled_cluster(groups: Mapping[str, Any], idle_minutes: float = 0.2) -> Iterator[AutoscaledCluster]:
    """Runs a cluster whose head has no CPU. groups: name of a group -> its resources, labels and max_workers."""
    folder, port = Path(tempfile.mkdtemp(prefix="fra-", dir="/tmp")), free_port()
    config = {
        "cluster_name": "fake", "max_workers": 8, "upscaling_speed": 100.0, "idle_timeout_minutes": idle_minutes,
        "docker": {}, "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "disable_launch_config_check": True,
            "disable_node_updaters": True, "launch_multiple": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **group} for name, group in groups.items()},
        },
        **{name: [] for name in _EMPTY_LISTS},
    }  # fmt: skip
    (folder / "autoscaler.json").write_text(json.dumps(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_API"))}
    environment |= {
        "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-for-tests-0123456789abcdef",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (folder / "ray-start.log").open("w") as log:
        head = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0",
                "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}", f"--autoscaling-config={folder / 'autoscaler.json'}",
            ],
            env={**environment, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: "Ray runtime started" in (folder / "ray-start.log").read_text(), 120, "the head runs")
        yield AutoscaledCluster({**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, folder)
    finally:
        for process_id in _find_processes(folder):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        head.kill()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _find_processes(folder: Path) -> list[int]:
    """Returns the ids of the processes whose command line or environment names the cluster's folder."""
    processes = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (place / "cmdline").read_bytes() + (place / "environ").read_bytes():
                processes.append(int(place.name))
    return processes
