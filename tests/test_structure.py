"""The imports between the rooms (top-level packages and modules) of focus_ray.

Imports point in one direction, the method does not import Ray, and the command line starts quickly.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from places import PACKAGE

# a room (top-level package or module) imports only rooms of lower levels
LEVELS = (
    {"errors", "names", "progress", "seeds", "csv_tables", "device", "distributed", "precision", "retries", "version"},
    {"settings", "storage", "client", "samples", "drawing"},
    {"data", "features", "density", "metrics", "cluster", "defects"},
    {"detect", "fyd", "ingestion", "tracking"},
    {"fitting", "reporting"},
    {"bundle"},
    {"training", "evaluation", "export", "watching"},
    {"api", "sweep", "serving", "submission", "doctor"},
    {"cli", "estimator"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# library -> rooms and modules that may import it
MAY_IMPORT = {
    "ray": {"cluster", "submission", "sweep.driver", "sweep.shared_work", "sweep.tune", "sweep.worker"}
    | {"serving.app", "serving.launch", "serving.metrics", "serving.serve_private"}
    | {"training.trainer", "training.streams", "evaluation", "ingestion.cluster"},
    "torch": {
        "device",
        "distributed",
        "precision",
        "features",
        "density",
        "detect",
        "fyd",
        "fitting",
        "bundle",
        "export",
        "training",
    }
    | {"sweep.trial_inputs", "sweep.trial", "sweep.worker", "serving.models", "serving.scorer", "doctor.machine"},
    "boto3": {"storage"},
    "mlflow": {"tracking.mlflow"},
    "tensorboardX": {"tracking.tensorboard"},
    "wandb": {"tracking.wandb"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def get_module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def get_room(name: str) -> str:
    return name.partition(".")[0]


def is_import_allowed(name: str, library: str) -> bool:
    """Whether MAY_IMPORT lists the module or its room for the library."""
    return not {name, get_room(name)}.isdisjoint(MAY_IMPORT[library])


WITHOUT_RAY = [
    get_module_name(path)
    for path in MODULES
    if not is_import_allowed(get_module_name(path), "ray") and not path.stem.startswith("__")
]


@cache  # seven tests read the same files
def list_imports(path: Path) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of every import in a file, also inside functions, but not for type checkers only."""
    imports = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import; write focus_ray.{node.module}"
            imports.append((node.lineno, str(node.module)))
            if node.module == "focus_ray":  # the imported names are modules or the version
                names = {alias.name for alias in node.names}
                imports += [(node.lineno, f"focus_ray.{name}") for name in sorted(names)]
    return imports


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_a_module_imports_only_lower_levels(path: Path) -> None:
    room = get_room(get_module_name(path))
    assert room in LEVEL_OF, "give the new room a level in LEVELS"
    imported = {target.split(".")[1] for _, target in list_imports(path) if target.startswith("focus_ray.")}
    upward = {other for other in imported - {room} if LEVEL_OF[other] >= LEVEL_OF[room]}
    assert upward == set()


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_allowed_modules_import_a_library(library: str) -> None:
    imports = {
        get_module_name(path) for path in MODULES for _, name in list_imports(path) if name.partition(".")[0] == library
    }
    assert [name for name in sorted(imports) if not is_import_allowed(name, library)] == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    names = {name for _, name in list_imports(PACKAGE / "__init__.py")}
    assert names == {"os", "typing", "importlib", "focus_ray.errors", "focus_ray.version"}


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


def test_the_method_can_be_imported_without_ray() -> None:
    finished = subprocess.run([sys.executable, "-c", BLOCK, *WITHOUT_RAY], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


def test_the_package_and_the_help_of_its_command_import_no_slow_package() -> None:
    code = """if True:
        import contextlib, sys
        from focus_ray.cli.main import main
        with contextlib.suppress(SystemExit):
            main(["--help"])
        print("slow:", *{"torch", "torchvision", "ray", "pyarrow", "scipy"} & set(sys.modules))
    """
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert finished.stdout.splitlines()[-1] == "slow:"
