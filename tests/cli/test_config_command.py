"""`focus-ray config`, and standard configurations by name: in a checkout, in a wheel, in a job."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from locked import copy_build_files
from places import CONFIGS, REPOSITORY

from focus_ray.cli.main import build_parser, main
from focus_ray.cli.reference import list_subcommands
from focus_ray.errors import ConfigError, SubmissionError
from focus_ray.fitting.settings import Config, load_config
from focus_ray.settings import standard
from focus_ray.settings.standard import find_config_file, list_standard_configs
from focus_ray.submission.job_request import build_job_request
from focus_ray.submission.package import build_job_package
from focus_ray.sweep.settings import SweepConfig, load_sweep_config

COMMANDS = list_subcommands(build_parser())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces `train`, and returns the list of the configurations that it receives."""
    received_configs: list[Config] = []

    def train(config: Config, **options: object) -> dict[str, str]:
        received_configs.append(config)
        return {}

    monkeypatch.setattr("focus_ray.training.training.train", train)
    return received_configs


# config


def test_show_prints_every_default_and_applies_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "default", "train.steps=7"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert set(tree) == set(Config.model_fields)
    assert (tree["train"]["steps"], tree["train"]["lambda_fine"]) == (7, 1.0)


def test_show_of_a_sweep_resolves_its_base_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "sweep-training", "num_trials=3"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert set(tree) == set(SweepConfig.model_fields)
    assert (tree["num_trials"], tree["base"]["density"]["kind"], tree["base_file"]) == (3, "gaussian", None)


def test_show_reads_its_own_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "padim"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "shown.yaml") == load_config(CONFIGS / "padim.yaml")


def test_list_names_the_standard_configurations_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    commands = dict.fromkeys(
        ["default", "foundation", "fyd", "fyd-single", "padim", "quickstart"], "train"
    ) | dict.fromkeys(["sweep", "sweep-training"], "sweep")
    assert {row[0]: row[1] for row in rows} == commands
    assert all(row[2].endswith(".") for row in rows)


# Names and paths


def test_train_takes_a_name_first_or_as_an_option(trained: list[Config]) -> None:
    for words in (["padim", "name=a"], ["--config", "padim", "name=a"], ["name=a", "--config", "padim"]):
        assert main(["train", *words]) == 0
    assert trained == [load_config(CONFIGS / "padim.yaml", ["name=a"])] * 3


def test_a_file_wins_over_a_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Config]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    Path("default").write_text("name: mine\ndata: {uri: data}\n")
    assert main(["train", "default"]) == main(["train", "quickstart"]) == 0
    assert [config.name for config in trained] == ["mine", "quickstart"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("defalt", "run", r"^defalt: .*\(did you mean 'default'\?\)"),
        ("nowhere/x.yaml", "run", "one of default, foundation, fyd, fyd-single, padim, quickstart$"),
        ("nowhere", "sweep", "one of sweep, sweep-training$"),
        (".", None, r"^\.: .*a folder"),
        ("sweep", "run", "^sweep .*`focus-ray sweep sweep`"),
        ("default", "sweep", "^default .*`focus-ray train default`"),
    ],
)
def test_an_unknown_configuration_gets_an_error_about_files_and_names(
    text: str, kind: standard.ConfigKind | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_config_file(text, kind)


@pytest.mark.parametrize("words", [[], ["name=a"]])
def test_train_without_a_configuration_says_what_to_give(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 1
    assert "the path of a YAML file, or one of default" in capsys.readouterr().err


def test_a_package_without_the_standard_configurations_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "_PACKAGE", tmp_path / "focus_ray")
    with pytest.raises(ConfigError, match="standard configurations"):
        list_standard_configs()


# A wheel


def test_a_wheel_contains_the_standard_configurations_and_no_tools(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "installed")
        assert not [name for name in archive.namelist() if name.startswith(("release", "container"))]
    folder = tmp_path / "installed/focus_ray/configs"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == list_standard_configs()
    code = "from focus_ray.cli.main import main; raise SystemExit(main(['config', 'show', 'sweep-training']))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout) == load_sweep_config(CONFIGS / "sweep-training.yaml").model_dump(mode="json")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from the files that the container image gets. Skips the test if hatchling is not installed."""
    pytest.importorskip("hatchling")
    source = copy_build_files(folder / "source")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


# A job


@pytest.mark.parametrize("words", [["train", "padim"], ["train", "--config", "padim"], ["train", "--config=padim"]])
def test_a_job_with_a_named_configuration_contains_its_file(words: list[str], tmp_path: Path) -> None:
    places = ["data.uri=s3://plant/parts", "storage=s3://plant/runs"]
    job = build_job_request([*words, *places], load_sweep_config, commands=COMMANDS, team="press", working_dir=tmp_path)
    assert job.entrypoint.endswith("storage=s3://plant/runs cluster.team=press")
    assert {"team", "config_sha256"} <= set(job.metadata)
    assert "focus_ray/configs/padim.yaml" in job.package.names


def test_a_job_of_a_named_sweep_is_checked_before_it_is_sent(tmp_path: Path) -> None:
    words = ["sweep", "sweep-training", "base.data.uri=s3://plant/parts"]
    with pytest.raises(SubmissionError, match=r"base\.storage=runs: a relative path"):
        build_job_request(words, load_sweep_config, commands=COMMANDS, working_dir=tmp_path)


def test_a_checkout_sends_its_configurations_unchanged() -> None:
    names = build_job_package(REPOSITORY).names
    assert "configs/default.yaml" in names
    assert "focus_ray/configs/default.yaml" not in names
