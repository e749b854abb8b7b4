"""What an installation of focus_ray costs, bare and with each extra: packages, megabytes, seconds until it inspects.

    python -m benchmarks.installs

Builds the wheel, installs it into new environments with uv, and starts each several times. Packages of torch and of its CUDA
libraries are told apart: they are the same for all, and far smaller from PyTorch's index of CPU builds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.harness import print_table, save_json

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("", "train", "ray")
TORCH = ("torch", "torchvision", "triton", "nvidia-", "cuda-")
START = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
STARTS = {"inspector": "import focus_ray.bundle.inspector", "command": "import focus_ray.cli.main"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="of the environments")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}") or "uv"
    samples = {}
    with tempfile.TemporaryDirectory() as scratch:
        run_command(uv, "build", "--wheel", "--out-dir", scratch, str(REPOSITORY))
        (wheel,) = Path(scratch).glob("*.whl")
        for kind in KINDS:
            place = Path(scratch, kind or "bare")
            run_command(uv, "venv", "--python", arguments.python, str(place))
            asked = f"{wheel}[{kind}]" if kind else str(wheel)
            run_command(uv, "pip", "install", "--compile-bytecode", "--python", str(place / "bin/python"), asked)
            samples[kind or "bare"] = measure_install(place, arguments.repeats)
    rows = [
        [
            kind,
            len(found["packages"]),
            sum(found["packages"].values()),
            sum(size for name, size in found["packages"].items() if not name.startswith(TORCH)),
            *(statistics.median(found[start]) for start in STARTS),
        ]
        for kind, found in samples.items()
    ]
    print_table(
        ("extra", "packages", "MB", "MB without torch's", "s to import the inspector", "s to the command"), rows
    )
    save_json("installs", arguments, samples)


def measure_install(place: Path, repeats: int) -> dict[str, dict[str, int] | list[float]]:
    """Megabytes a package, and seconds of each start, the first of each left out."""
    (packages,) = place.glob("lib/python*/site-packages")
    sizes = {
        one.metadata["Name"]: round(compute_package_bytes(one) / 1e6) for one in distributions(path=[str(packages)])
    }
    found: dict[str, dict[str, int] | list[float]] = {"packages": sizes}
    for name, code in STARTS.items():
        found[name] = [
            float(run_command(str(place / "bin/python"), "-c", START.format(code))) for _ in range(repeats + 1)
        ][1:]
    return found


def compute_package_bytes(distribution: Distribution) -> int:
    """Bytes of its files."""
    places = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    return sum(place.stat().st_size for place in places if place.is_file())


def run_command(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()).stdout


if __name__ == "__main__":
    main()
