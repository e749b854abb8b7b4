"""Starts a Ray cluster that accepts jobs over HTTP with a token. Its nodes have the credentials of an S3 server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import REPOSITORY
from s3_server import S3Server

from focus_ray.ingestion.ingest import ingest

TOKEN = "a-token-for-tests-0123456789abcdef"


@dataclass(frozen=True)
class Nodes:
    """A running Ray cluster.

    Attributes:
        address: address of the Jobs API.
        environment: environment of the submitter, which has no S3 keys.
        access: environment variables with the S3 keys, for the test itself.
        root: S3 URI for data and results.
        process: process of `ray_nodes.py`.
        folder: folder of Ray, which all processes of the cluster and of its jobs have in the variable RAY_TMPDIR.
    """

    address: str
    environment: Mapping[str, str]
    access: Mapping[str, str]
    root: str
    process: subprocess.Popen[str]
    folder: str

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs a focus-ray command as the submitter, and waits for its end. changes: more environment variables."""
        process = self.start(*words, **changes)
        out, err = process.communicate(timeout=250)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        """Starts a focus-ray command as the submitter. changes: more environment variables."""
        return subprocess.Popen(
            [sys.executable, "-m", "focus_ray.cli", *words],
            env={**self.environment, "RAY_ADDRESS": self.address, **changes},
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ingest(self, images: str | Path, categories: Sequence[str]) -> None:
        """Ingests categories into the data set `root`/data."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.access.items():
                patch.setenv(name, value)
            ingest(images, f"{self.root}/data", categories=list(categories), progress=False)

    def kill_a_worker_node(self) -> None:
        """Kills the processes of the node that was added last with SIGKILL."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        assert json.loads(self.process.stdout.readline()) == {"killed": True}

    def kill_all_processes(self) -> None:
        """Kills all processes of the cluster and of its jobs with SIGKILL, as the loss of all machines does."""
        variable = f"RAY_TMPDIR={self.folder}\0".encode()
        for _ in range(3):  # a process may start another one while the processes are listed
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # the process has ended meanwhile, or belongs to another user
                    if variable in (process / "environ").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
        self.process.wait()


@contextmanager
def run_nodes(s3_server: S3Server, num_nodes: int = 2) -> Iterator[Nodes]:
    """Runs a head node and further nodes with two CPUs each in another process."""
    temporary = tempfile.mkdtemp(prefix="frn-", dir="/tmp")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_AUTH", "RAY_API"))}
    clean.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    access = s3_server.environment()
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/ray_nodes.py"), str(num_nodes)],
        env={**clean, **access, "RAY_TMPDIR": temporary},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        # the submitter knows the address of the S3 server, but has no keys
        submitter = {**clean, "AWS_ENDPOINT_URL": access["AWS_ENDPOINT_URL"], "AWS_REGION": access["AWS_REGION"]}
        yield Nodes(address, submitter, access, s3_server.new_uri(), process, temporary)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
