"""Every command and code block of the documents works: it runs in a small workspace, or is checked without running it.

NOT_RUN contains the commands that do not run here, with the reason. The real parser still parses their command lines, the real
models validate their settings, and the files of the repository that they name must exist.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import workspace
import yaml
from documents import KINDS, Block, find_code_blocks, read_shell_commands, split_command_words
from places import REPOSITORY
from ray.scripts.scripts import start as ray_start
from serving_set import create_service, run_server

from focus_ray.cli.main import build_parser, parse_command_line
from focus_ray.cli.main import main as focus_ray
from focus_ray.fitting.settings import load_config, parse_config
from focus_ray.serving.settings import parse_service_settings
from focus_ray.settings.sections import read_config_tree
from focus_ray.settings.standard import find_config_file, find_standard_config_folder
from focus_ray.submission.job_request import read_runtime_env
from focus_ray.sweep.settings import load_sweep_config

# start of a focus-ray command -> why this module does not run it, and which test does
NOT_RUN = {
    "samples": "draws for a quarter of a minute; tests/samples draws smaller ones",
    "serve": "serves until it is interrupted; tests/serving asks the service",
    "watch": "watches until it is interrupted; tests/watching",
    "submit": "needs a cluster; tests/submission sends jobs",
    "export": "compiles a network; tests/export",
    "jobs": "needs a cluster; tests/submission follows jobs",
    "sweep": "starts Ray; tests/sweep",
    "inspect-batch": "starts Ray; tests/evaluation/test_batch.py",
    "inspect quickstart/": "of a model of the quickstart, which `make quickstart` makes",
    "ingest quickstart/": "of images of the quickstart, which `make quickstart` draws",
    "train quickstart": "starts Ray with two workers; `make quickstart` runs it",
    "evaluate quickstart/": "of a model of the quickstart",
    "train s3://plant/sweeps/": "of a sweep that is not run",
    "train fyd": "trains by gradient for minutes; tests/test_config.py loads it, tests/fitting trains so",
    "fit photographs/ model-offline/": "a backbone that takes many times as long; `make quickstart` trains it",
}
NOT_RUN_WORDS = {  # a word of a focus-ray command -> why this module does not run it
    "cluster.num_workers=4": "starts Ray with four workers; tests/training/test_training.py",
    "trackers.tensorboard={}": "trains by gradient, and needs a tracker's package; tests/tracking",
    "trackers.mlflow.uri=http://tracking.plant:5000": "needs a server; tests/tracking",
    "--workers": "starts Ray; tests/cluster",
    "selection.fraction=0.1": "trains by gradient; tests/fitting/test_selection.py",
    "--engine": "compiles a network; tests/bundle/test_engine.py",
}
# why this module does not run the commands of some programs -> the programs
PROGRAMS_BY_REASON = {
    "takes minutes or a cluster; the target, module or script is there, and knows the options": ("make", "python"),
    "installs; pyproject.toml has the extra": ("pip", "uv"),
    "needs Docker, a GPU or a scanner; tests/container checks the files": (
        "docker",
        "VARIANT=cuda",
        "TOKEN=$(docker",
        "trivy",
    ),
    "writes files; tests/container": ("container/certificate.sh", "container/env.sh"),
    "the front proxy; tests/serving/test_front_proxy.py runs it": ("nginx", "mkdir", "cp", "echo"),
    "needs Kubernetes; tests/cluster/test_manifests.py checks the files": ("kubectl", "POD=$(kubectl", "sed"),
    "needs a cluster; what it runs is checked": ("serve", "ray"),
    "needs Node.js; tests/export": ("node",),
    "serves until it is interrupted; tests/tracking reads what it shows": ("tensorboard",),
    "sets variables for the commands after it": ("export",),
}
PROGRAMS = {program: reason for reason, programs in PROGRAMS_BY_REASON.items() for program in programs}
CODES_RUN_ELSEWHERE = {
    "CONTRIBUTING.md": "tests/test_kinds.py runs them",
    "docs/use/export.md": "of an export; tests/export loads one so",
}
STATUSES = {"doctor": (0, 1)}  # 1: the doctor reports a problem of this machine
SHELL = find_code_blocks("bash")
COMMANDS = [(block.page, command) for block in SHELL for command in read_shell_commands(block)]
IDS = [f"{page}: {command[:60]}" for page, command in COMMANDS]


def reason_not_to_run(command: str) -> str | None:
    words = split_command_words(command)
    if words[0] != "focus-ray":
        return PROGRAMS.get(words[0])
    arguments = " ".join(words[1:]) + " "
    for start, reason in NOT_RUN.items():
        if arguments.startswith(start if start.endswith("/") else f"{start} "):
            return reason
    return next((reason for word, reason in NOT_RUN_WORDS.items() if word in words), None)


def test_every_block_has_a_known_kind() -> None:
    assert [(block.page, block.kind, block.text[:40]) for block in find_code_blocks() if block.kind not in KINDS] == []


def test_every_program_has_a_check() -> None:
    programs = {split_command_words(command)[0] for _, command in COMMANDS}
    assert programs <= {"focus-ray", "curl", *PROGRAMS}


def test_every_exception_applies_to_a_command() -> None:
    lines = [split_command_words(command) for _, command in COMMANDS]
    focus_ray_lines = [f"{' '.join(words[1:])} " for words in lines if words[0] == "focus-ray"]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in focus_ray_lines)] == []
    assert [word for word in NOT_RUN_WORDS if not any(word in line.split() for line in focus_ray_lines)] == []
    assert set(PROGRAMS) <= {words[0] for words in lines}


# Checks without running


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=IDS)
def test_a_command_is_valid_for_its_program(page: str, command: str) -> None:
    check_command(split_command_words(command))


def check_command(words: list[str]) -> None:
    """Checks the words of a command. Raises: AssertionError or the error of the program: a word is not valid."""
    program, arguments = words[0], words[1:]
    if program == "focus-ray":
        check_focus_ray_command(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in arguments if "=" not in word and word not in targets] == []
    elif program == "python":
        check_python_command(arguments)
    elif program == "pip":
        extras = re.findall(r"^([a-z]+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
        named = [extra for word in arguments for extra in "".join(re.findall(r"\[(.*)\]", word)).split(",") if extra]
        assert [extra for extra in named if extra not in extras] == []
    elif program == "ray":
        if arguments[0] == "start":
            names = {option for parameter in ray_start.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")} <= names
        else:
            check_command(arguments[arguments.index("--") + 1 :])
    else:
        files = [word for word in arguments if re.fullmatch(r"[\w/.-]+/[\w.-]+\.ya?ml", word)]
        assert [name for name in files if not (REPOSITORY / name).is_file()] == []


def check_python_command(words: list[str]) -> None:
    """Checks that the module or script of a Python command exists and has its options."""
    if words[0] == "-m":
        module = REPOSITORY / (words[1].replace(".", "/"))
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        texts = [path.read_text() for path in (REPOSITORY / words[1].partition(".")[0]).rglob("*.py")]
    else:
        source = REPOSITORY / words[0]
        texts = [source.read_text()]
    assert source.is_file(), source
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    shared = (REPOSITORY / "focus_ray/cli/main.py").read_text()
    assert [option for option in options if not any(f'"{option}"' in text for text in [*texts, shared])] == []


def check_focus_ray_command(words: list[str]) -> None:
    """Parses a command line and validates its settings, as the command does at its start."""
    parser = build_parser()
    parser.exit = lambda status=0, message=None: None  # type: ignore[method-assign, assignment]
    parser.error = _refuse  # type: ignore[method-assign]
    if words == ["--version"]:
        return
    arguments = parse_command_line(parser, words)
    if arguments.command == "submit":
        inner = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
        check_focus_ray_command(inner)
    elif arguments.command in ("train", "doctor") and not (arguments.config or "").startswith("s3://"):
        config = (
            find_config_file(arguments.config) if arguments.config else find_standard_config_folder() / "default.yaml"
        )
        load_config(config, arguments.override)
    elif arguments.command == "fit":
        load_config(find_config_file("default"), [*arguments.override, "data.uri=data"])
    elif arguments.command == "sweep" and arguments.what not in ("status", "resume", "report"):
        load_sweep_config(find_config_file(arguments.what), arguments.override)
    elif arguments.command == "serve":
        tree = read_config_tree(find_standard_config_folder() / "default.yaml", arguments.override)
        settings = {key: value for key, value in tree.items() if key not in ("name", "data", "model")}
        parse_service_settings({"registry": "registry", "open_to_all": "tokens" not in settings, **settings})
    elif arguments.command == "config" and arguments.action == "explain":
        assert focus_ray(words) == 0


def _refuse(message: str) -> None:
    raise AssertionError(message)


def test_a_wrong_command_is_refused() -> None:
    for wrong in ("focus-ray trian default", "focus-ray train default data.uri=x model.wights=y", "make quickstrat"):
        with pytest.raises((AssertionError, ValueError, SystemExit)):
            check_command(split_command_words(wrong))
    with pytest.raises(AssertionError):
        check_command(split_command_words("kubectl apply -f configs/cluster/nothing.yaml"))


# Commands that run


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.make_workspace(tmp_path_factory.mktemp("plant"))


@pytest.fixture
def copied(plant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the plant for a single test, which is the working folder."""
    folder = tmp_path / "plant"
    shutil.copytree(plant, folder)
    monkeypatch.chdir(folder)
    return folder


def adapt_words_to_plant(command: str) -> list[str]:
    """Returns the words of a focus-ray command for the plant: with its paths, existing files, and settings for a tiny model."""
    words = [workspace.replace_place(word) for word in split_command_words(command)[1:]]
    words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    if words[0] == "sweep":
        return [*words, *(f"base.{setting}" for setting in (*workspace.TINY, "model.weights=resnet18.pth"))]
    if words[0] in ("train", "fit"):
        words += workspace.TINY
        keys = {word.partition("=")[0] for word in words}
        words += [] if "model.weights" in keys else ["model.weights=resnet18.pth"]
    return words


RUN = [(page, line) for page, line in COMMANDS if line.startswith("focus-ray") and not reason_not_to_run(line)]
RUN_ON = sorted({page for page, _ in RUN})


@pytest.mark.parametrize("page", RUN_ON)
def test_the_commands_of_a_page_run_in_its_order(page: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command_page, command in RUN:
        if command_page != page:
            continue
        words = adapt_words_to_plant(command)
        if words == ["--version"]:
            with pytest.raises(SystemExit, match="0"):
                focus_ray(words)
            continue
        status = focus_ray(words)
        captured = capsys.readouterr()
        assert status in STATUSES.get(words[0], (0,)), f"{command}\nran as {words}\n{captured.err[-2000:]}"


ON_RAY = sorted({command for _, command in COMMANDS if (reason_not_to_run(command) or "").startswith("starts Ray")})
# these commands need the folder of a run, which no test makes
NEEDS_A_SWEEP = ("sweep status", "sweep resume", "sweep report", "train quickstart")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "command", [command for command in ON_RAY if not any(words in command for words in NEEDS_A_SWEEP)]
)
def test_a_command_runs_on_ray(command: str, copied: Path) -> None:
    words = [word.replace("name=line3", "name=line4") for word in adapt_words_to_plant(command)]  # line3 exists already
    finished = subprocess.run(  # a separate process, which starts its own local cluster
        [sys.executable, "-m", "focus_ray.cli", *words],
        cwd=copied,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert finished.returncode == 0, f"{command}\nran as {words}\n{finished.stderr[-3000:]}"


@pytest.fixture(scope="module")
def service(plant: Path) -> Iterator[str]:
    """The address of a running service with the registry of the plant."""
    settings = parse_service_settings({"registry": str(plant / "plant/registry"), "tokens": str(plant / "tokens.yaml")})
    with run_server(create_service(settings)) as url:
        yield url


CURL = sorted({command for _, command in COMMANDS if command.startswith("curl")})


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
@pytest.mark.parametrize("command", CURL)
def test_a_request_is_answered(command: str, service: str, plant: Path) -> None:
    direct = command.replace("--cacert proxy.crt ", "").replace("https://127.0.0.1:8443", service)  # without the proxy
    line = direct.replace("http://127.0.0.1:8000", service).replace("/press/gear/", "/press/bolt/")
    finished = subprocess.run(
        ["bash", "-c", f"{line} --silent --show-error --fail-with-body"],
        cwd=plant,
        env={"TOKEN": (plant / "token.txt").read_text(), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, (finished.stderr, finished.stdout)
    if "--output" in command:
        assert (plant / command.partition("--output ")[2].split()[0]).read_bytes().startswith(b"\x89PNG")
    else:
        assert json.loads(finished.stdout)["results"]


# Code

CODE = [block for block in find_code_blocks("python") if block.page not in CODES_RUN_ELSEWHERE]


def shrink_code(text: str, service: str) -> str:
    """Returns a block with the address of the running service, and with images of 64 px instead of 256 px."""
    text = text.replace("http://127.0.0.1:8000", service).replace("image_size_px=256", "image_size_px=64")
    return text.replace('weights="resnet18.pth")', 'weights="resnet18.pth", image_size_px=64, coreset=32)')


@pytest.mark.parametrize("page", sorted({block.page for block in CODE}))
def test_the_code_of_a_page_runs(page: str, copied: Path, service: str) -> None:
    namespace: dict[str, Any] = {
        "token": (copied / "token.txt").read_text(),
        "image_bytes": (copied / "part.png").read_bytes(),
        "images": sorted((copied / "photographs/good").iterdir()),
    }
    for block in CODE:
        if block.page == page:
            exec(compile(shrink_code(block.text, service), page, "exec"), namespace)


@pytest.mark.parametrize("block", find_code_blocks("yaml"), ids=lambda block: f"{block.page}: {block.text[:30]!r}")
def test_a_yaml_block_is_a_configuration(block: Block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    if "space" in tree:
        for path in find_standard_config_folder().glob("*.yaml"):
            shutil.copy(path, tmp_path)
        (tmp_path / "sweep.yaml").write_text(block.text)
        load_sweep_config(tmp_path / "sweep.yaml")
    elif {"registry", "bundles"} & set(tree):
        parse_service_settings(tree, block.page)
    elif "env_vars" in tree:
        (tmp_path / "env.yaml").write_text(block.text)
        assert read_runtime_env(tmp_path / "env.yaml")
    else:  # a block may show a part of a configuration, without the address of the images
        parse_config({"data": {"uri": "data"}, **tree}, block.page)


@pytest.mark.parametrize("block", find_code_blocks("json"), ids=lambda block: block.page)
def test_a_json_block_is_json(block: Block) -> None:
    assert json.loads(block.text)
