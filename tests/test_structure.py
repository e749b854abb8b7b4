"""The rooms of the package: imports point one way, the method knows nothing of Ray, the command line starts at once."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "focus_ray"

# a module may import only those above it
ORDER = (
    "errors",
    "config",
    "search",
    "race",
    "storage",
    "records",
    "images",
    "backbone",
    "alignment",
    "congealing",
    "losses",
    "model",
    "gaussian",
    "nearest",
    "density",
    "metrics",
    "calibration",
    "samples",
    "defects",
    "selection",
    "scoring",
    "loop",
    "fit",
    "bundle",
    "inspector",
    "registry",
    "dataset",
    "cluster",
    "submission",
    "training",
    "trial",
    "sweep_report",
    "tuning",
    "update",
    "batch",
    "report",
    "client",
    "serving.settings",
    "serving.problems",
    "serving.tokens",
    "serving.source",
    "serving.measures",
    "serving.logs",
    "serving.batching",
    "serving.models",
    "serving.rendering",
    "serving.scorer",
    "serving.limits",
    "serving.sink",
    "serving.service",
    "serving.envelope",
    "serving.api",
    "serving.metrics",
    "serving.app",
    "serving.launch",
    "cli",
)
WITH_SERVE = {"serving.metrics", "serving.app", "serving.launch"}  # the rest of the service is tested without Ray
WITHOUT_TORCH = {"client", *(name for name in ORDER if name.startswith("serving."))} - {
    "serving.models",
    "serving.scorer",
}
MAY_IMPORT = {
    "ray": {"dataset", "cluster", "training", "tuning", "batch", "submission", *WITH_SERVE},
    "torch": {*ORDER}
    - WITHOUT_TORCH
    - {
        "errors",
        "config",
        "search",
        "race",
        "storage",
        "records",
        "metrics",
        "calibration",
        "samples",
        "cluster",
        "submission",
        "sweep_report",
        "cli",
    },
    "boto3": {"storage"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


WITHOUT_RAY = [name_of(path) for path in MODULES if name_of(path) not in MAY_IMPORT["ray"]]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import; write focus_ray.{node.module}"
            found.append((node.lineno, str(node.module)))
            if node.module == "focus_ray":  # of the package itself: the names are modules, or its version
                names = {alias.name for alias in node.names} - {"__version__"}
                found += [(node.lineno, f"focus_ray.{name}") for name in sorted(names)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way_only(path: Path) -> None:
    name = name_of(path)
    assert name in ORDER, "give the new module its place in ORDER"
    above = ORDER[: ORDER.index(name)]
    wrong = [
        f"{name}:{line} -> {target}"
        for line, target in imports_of(path)
        if target.startswith("focus_ray.") and target.removeprefix("focus_ray.") not in above
    ]
    assert wrong == []


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_the_rooms_that_may_import_a_library_do(library: str) -> None:
    found = {name_of(path) for path in MODULES for _, name in imports_of(path) if name.partition(".")[0] == library}
    assert found - MAY_IMPORT[library] == set()


def test_the_package_itself_imports_nothing() -> None:
    assert [name for _, name in imports_of(PACKAGE / "__init__.py")] == []


BLOCK = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(f"focus_ray.{name}")
"""


def test_the_method_is_imported_where_there_is_no_ray() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK, *WITHOUT_RAY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["-c", "import focus_ray"], [str(Path(sys.executable).parent / "focus-ray"), "--help"]]
)
def test_the_package_and_its_command_start_within_a_second(arguments: list[str]) -> None:
    if not arguments[0].startswith("-") and not Path(arguments[0]).is_file():
        pytest.skip(f"the package is not installed: there is no {arguments[0]}")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    print(f"{min(seconds):.2f} s")
    assert min(seconds) < 1
