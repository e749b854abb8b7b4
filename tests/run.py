"""Runs the quick tests for `make test`: two processes run the tests without Ray, and a third process the tests with Ray.

The three parts run at the same time, because tests with Ray mostly wait. The run fails if a part fails or runs no test. It
prints the ten slowest tests at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# folders of the first half; both halves take about the same time
FIRST = (
    "bundle", "cli", "cluster", "data", "density", "docs", "evaluation", "samples", "serving", "submission",
    "sweep", "tracking", "watching",
)  # fmt: skip
WITHOUT, WITH = "not slow and not cluster and not ray", "ray and not slow and not cluster"
SECOND = sorted(
    path
    for path in TESTS.iterdir()
    if path.name not in FIRST and (path.name.startswith("test_") or any(path.glob("test_*.py")))
)
# only these files are imported for the tests with Ray
ON_RAY = sorted(path for path in TESTS.rglob("test_*.py") if "mark.ray" in path.read_text(encoding="utf-8"))
# name -> marks, niceness, paths. Ray's workers have a niceness of 15, so the other parts get the same niceness
PARTS = {
    "without Ray, first half": (WITHOUT, 15, [TESTS / name for name in FIRST]),
    "without Ray, second half": (WITHOUT, 15, SECOND),
    "with Ray": (WITH, 0, ON_RAY),
}


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    status = 0
    # a single OpenMP thread: threads that wait for each other spin, and take CPU time from Ray's workers
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    slowest: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for name, (marks, niceness, paths) in PARTS.items():
            command = ["nice", "-n", str(niceness), sys.executable, "-m", "pytest", "-m", marks]
            command += [f"--junit-xml={folder}/{name}.xml", *map(str, paths), *arguments]
            with Path(folder, f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        for name, process in processes.items():
            code = process.wait()
            print(f"---- {name}\n{Path(folder, f'{name}.log').read_text(errors='replace')}", flush=True)
            report = Path(folder, f"{name}.xml")
            cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
            if not cases:
                print(f"no test {name} has run", file=sys.stderr)
            if code or not cases:  # the exit code is negative after a signal
                status = 1
            slowest += [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    print("---- the ten slowest")
    for seconds, name in sorted(slowest, reverse=True)[:10]:
        print(f"{seconds:6.1f} s  {name}")
    print(f"{len(slowest)} tests in {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
