"""Runs the quick tests as `make test` does: those without Ray, in two halves, beside those with it, which mostly wait.

A part that fails, or of which no test ran, fails the whole. The ten slowest tests are told at the end.
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
FIRST = (
    "cli",
    "cluster",
    "data",
    "density",
    "docs",
    "evaluation",
    "samples",
    "serving",
    "submission",
    "sweep",
    "tracking",
    "watching",
)  # folders of the first half, alike in length
WITHOUT, WITH = "not slow and not cluster and not ray", "ray and not slow and not cluster"
# name -> marks, niceness, places. Ray's workers have a niceness of 15: the other parts stand no further back
PARTS = {
    "without Ray, first half": (WITHOUT, 15, [TESTS / name for name in FIRST]),
    "without Ray, second half": (
        WITHOUT,
        15,
        sorted(
            path
            for path in TESTS.iterdir()
            if path.name not in FIRST and (path.name.startswith("test_") or any(path.glob("test_*.py")))
        ),
    ),
    "with Ray": (WITH, 0, [TESTS]),
}


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    status = 0
    # one thread each: two that wait for one another spin, and take from Ray's workers, which run at a lower priority
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    slowest: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for number, (name, (marks, nice, places)) in enumerate(PARTS.items()):
            report, log = Path(folder, f"{number}.xml"), Path(folder, f"{number}.log")
            command = [
                "nice",
                "-n",
                str(nice),
                sys.executable,
                "-m",
                "pytest",
                "-m",
                marks,
                f"--junit-xml={report}",
                *map(str, places),
                *arguments,
            ]
            with log.open("wb") as sink:
                running[name] = (
                    subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment),
                    report,
                    log,
                )
        for name, (process, report, log) in running.items():
            code = process.wait()
            print(f"---- {name}\n{log.read_text(errors='replace')}", flush=True)
            cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
            if not cases:
                print(f"no test {name} has run", file=sys.stderr)
            if code or not cases:  # a signal's code is negative
                status = 1
            slowest += [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    print("---- the ten slowest")
    for seconds, name in sorted(slowest, reverse=True)[:10]:
        print(f"{seconds:6.1f} s  {name}")
    print(f"{len(slowest)} tests in {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
