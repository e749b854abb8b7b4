"""Runs the quick tests as `make test` does: those without Ray beside those with it, two processes on two cores.

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

PARTS = {
    "without Ray": "not slow and not cluster and not ray",
    "with Ray": "ray and not slow and not cluster",
}
# the part with Ray takes longest, and Ray's workers have a niceness of 15: the other part stands back behind them
NICE = {"without Ray": 19, "with Ray": 0}


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    status = 0
    # one thread each: two that wait for one another spin, and take from Ray's workers, which run at a lower priority
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    slowest: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for number, (name, marks) in enumerate(PARTS.items()):
            report, log = Path(folder, f"{number}.xml"), Path(folder, f"{number}.log")
            command = [
                "nice",
                "-n",
                str(NICE[name]),
                sys.executable,
                "-m",
                "pytest",
                "-m",
                marks,
                f"--junit-xml={report}",
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
