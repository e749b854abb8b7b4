"""Jobs: packed files and refused jobs; real jobs on a cluster of two nodes that require tokens, with data and results on S3."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dashboard_proxy import COOKIE, HEADER, run_dashboard_proxy
from job_nodes import REPOSITORY, TOKEN, Nodes, run_nodes
from nginx_proxy import write_certificate
from s3_server import IDENTITIES, S3Server
from small_set import draw_parts

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import build_parser, main, parse_command_line
from focus_ray.cli.reference import list_subcommands
from focus_ray.cluster.capacity import RESERVED_RESOURCES_VARIABLE
from focus_ray.errors import ConfigError, SubmissionError
from focus_ray.names import make_unique_name
from focus_ray.submission import client
from focus_ray.submission.job_request import JobRequest, build_job_request
from focus_ray.submission.package import build_job_package
from focus_ray.sweep.settings import load_sweep_config

CONFIG = """
data: {uri: s3://bucket/data, categories: [gear]}
storage: s3://bucket/runs
model: {weights: random, image_size_px: 64, predictor_width: 8, image_alignment: {group: none}}
train: {steps: 1, batch_size: 4}
density: {num_channels: 32}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_AUTH"))]:
        monkeypatch.delenv(name)
    root = tmp_path / "work"
    (root / "configs").mkdir(parents=True)
    (root / "configs/run.yaml").write_text(CONFIG)
    return root


def make_job_request(folder: Path, *words: str, **options: object) -> JobRequest:
    """Builds the request of a command whose working directory is `folder`."""
    return build_job_request(
        words, load_sweep_config, commands=list_subcommands(build_parser()), working_dir=folder, **options
    )  # type: ignore[arg-type]


# Packed files


def test_data_environments_hidden_files_and_weights_are_not_sent(folder: Path) -> None:
    for name in (
        "data/category=gear/part.txt", "runs/a.txt", ".git/config", ".env", "venv/pyvenv.cfg", "venv/lib/a.py",
        "lib/__pycache__/a.pyc", "lib/x.egg-info/PKG-INFO", "lib/net.safetensors", "notes/big.csv", "lib/skip/a.py",
        "lib/data/kept.py", "lib/kept.py",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    package = build_job_package(folder, excludes=["*.csv", "lib/skip/"])
    folder_files = [name for name in package.names if not name.startswith("focus_ray/")]
    assert folder_files == ["configs/run.yaml", "lib/data/kept.py", "lib/kept.py"]
    assert {"focus_ray/submission/job_request.py", "focus_ray/data/read.py"} <= set(package.names)
    archive = zipfile.ZipFile(io.BytesIO(package.content))
    assert archive.read("lib/kept.py") == b"x"
    assert build_job_package(folder, excludes=["*.csv", "lib/skip/"]) == package


def test_a_folder_that_contains_focus_ray_is_sent_unchanged() -> None:
    package = build_job_package(REPOSITORY)
    assert {"focus_ray/cli/main.py", "configs/default.yaml", "jobs/train.py"} <= set(package.names)
    assert len(package.content) < 5 * 2**20


def test_a_package_that_is_too_large_is_refused_and_its_largest_files_are_named(folder: Path) -> None:
    (folder / "noise.bin").write_bytes(os.urandom(65 * 2**20))
    with pytest.raises(SubmissionError, match=r"64 MiB.*noise\.bin \(65\.0 MiB\)"):
        build_job_package(folder)
    with pytest.raises(SubmissionError, match="nowhere"):
        build_job_package(folder / "nowhere")


def test_a_request_holds_team_category_command_and_environment_but_no_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3:8333")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("SITE", "b")
    options = {"team": "press", "env": ["SITE", "LINE=3"], "num_cpus": 1.0}
    request = make_job_request(folder, "train", "configs/run.yaml", "train.steps=2", **options)
    assert request.entrypoint == "python -m focus_ray.cli train configs/run.yaml train.steps=2 cluster.team=press"
    assert request.submission_id.startswith("press-train-")
    assert (request.metadata["team"], request.metadata["category"]) == ("press", "gear")
    environment = {
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "SITE": "b",
        "LINE": "3",
        RESERVED_RESOURCES_VARIABLE: '{"CPU": 1.0}',
    }
    assert request.environment == environment
    assert "the-secret" not in repr((request.environment, request.metadata, request.entrypoint))
    other = make_job_request(folder, "train", "configs/run.yaml", "train.steps=3", team="press")
    assert other.metadata["config_sha256"] != request.metadata["config_sha256"]
    assert make_job_request(folder, "python", "x.py", "a b").entrypoint == "python x.py 'a b'"


SWEEP = """
base: {data: {uri: s3://bucket/data}, storage: s3://bucket/sweeps, density: {reduction: semi_orthogonal}}
space: {density.shrinkage: [1.0, 2.0]}
searcher: grid
"""


@pytest.mark.parametrize(
    ("command", "env", "message"),
    [
        ("", "", "nothing to submit"),
        ("train configs/none.yaml", "", r"configs/none\.yaml"),
        ("train ../run.yaml", "", r"\.\./run\.yaml"),
        ("train configs/run.yaml storage=runs", "", "storage=runs"),
        ("train configs/run.yaml model.weights=w.pth", "", r"model\.weights=w\.pth"),
        ("train configs/run.yaml train.step=2", "", r"train\.step: .*'steps'"),
        ("train configs/run.yaml", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY: a secret"),
        ("train configs/run.yaml", "GIT_TOKEN=x", "GIT_TOKEN: a secret"),
        ("train configs/run.yaml", "NOT_SET_HERE", "NOT_SET_HERE"),
        ("train configs/run.yaml", "P=http://me:pw@h", "P: .* password"),
        ('sweep configs/sweep.yaml space={"density.shrinkag":[1.0]}', "", r"density\.shrinkag: .*'density\.shrinkage'"),
        ("sweep configs/sweep.yaml base.storage=sweeps", "", r"base\.storage=sweeps"),
        ('sweep configs/sweep.yaml space={"model.weights":["w/a.pth"]}', "", r"base\.model\.weights=w/a\.pth"),
        ("sweep configs/far.yaml", "", r"\.\./base\.yaml"),
    ],
)
def test_a_job_that_cannot_work_on_another_machine_is_refused_before_it_is_sent(
    folder: Path, command: str, env: str, message: str
) -> None:
    (folder / "configs/sweep.yaml").write_text(SWEEP)
    (folder.parent / "base.yaml").write_text("storage: s3://bucket/sweeps")
    (folder / "configs/far.yaml").write_text(f"base_file: ../../base.yaml{SWEEP}")
    with pytest.raises((SubmissionError, ConfigError), match=message) as caught:
        make_job_request(folder, *command.split(), env=env.split())
    assert "me:pw" not in str(caught.value)


def test_a_sweep_belongs_to_the_team(folder: Path) -> None:
    (folder / "configs/sweep.yaml").write_text(SWEEP)
    request = make_job_request(folder, "sweep", "configs/sweep.yaml", team="press")
    assert request.entrypoint == (
        f"python -m focus_ray.cli sweep configs/sweep.yaml base.cluster.team=press name={request.submission_id} --resume"
    )
    assert (request.metadata["team"], request.metadata["category"]) == ("press", "all")
    changed = make_job_request(
        folder, "sweep", "configs/sweep.yaml", "space={density.shrinkage: [1.0, 3.0]}", team="press"
    )
    assert changed.metadata["config_sha256"] != request.metadata["config_sha256"]
    resumed = make_job_request(folder, "sweep", "resume", "s3://bucket/sweeps/found", team="press")
    assert resumed.entrypoint == "python -m focus_ray.cli sweep resume s3://bucket/sweeps/found"
    assert resumed.metadata["team"] == "press"


@pytest.mark.parametrize("command", ["train configs/run.yaml name=auto", "sweep configs/sweep.yaml"])
def test_a_job_that_starts_again_continues_the_run_of_its_first_start(folder: Path, command: str) -> None:
    (folder / "configs/sweep.yaml").write_text(SWEEP)
    request = make_job_request(folder, *command.split())
    words = request.entrypoint.split()[3:]
    arguments = parse_command_line(build_parser(), words)
    assert arguments.resume
    assert [word for word in arguments.override if word.startswith("name=")] == [f"name={request.submission_id}"]


def test_a_run_with_a_name_of_the_user_is_sent_unchanged(folder: Path) -> None:
    request = make_job_request(folder, "train", "configs/run.yaml", "name=line3")
    assert request.entrypoint == "python -m focus_ray.cli train configs/run.yaml name=line3"


# Runtime environments


def test_a_runtime_environment_is_checked_and_merged_with_the_jobs_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "requirements.txt").write_text("tifffile==2025.1\n")
    file = folder / "env.yaml"
    file.write_text("{pip: requirements.txt, py_executable: nice python, env_vars: {SITE: a, LINE: '3'}}")
    request = make_job_request(folder, "train", "configs/run.yaml", env=["SITE=b"], runtime_env=file)
    assert request.environment == {"SITE": "b", "LINE": "3"}
    assert set(request.runtime_env) == {"pip", "py_executable"}
    assert request.runtime_env["pip"]["packages"] == ["tifffile==2025.1"]
    assert "configs/run.yaml" in request.package.names


def test_a_job_in_a_container_image_sends_no_files(folder: Path) -> None:
    (folder / "env.json").write_text('{"image_uri": "registry.example/focus-ray:1"}')
    words = ("train", "default", "data.uri=s3://b/data", "storage=s3://b/runs")
    request = make_job_request(folder, *words, runtime_env=folder / "env.json")
    assert (dict(request.runtime_env), request.package.names) == ({"image_uri": "registry.example/focus-ray:1"}, ())
    with pytest.raises(SubmissionError, match=r"configs/run\.yaml: with image_uri no files are sent"):
        make_job_request(folder, "train", "configs/run.yaml", runtime_env=folder / "env.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{working_dir: .}", "working_dir: .*--working-dir"),
        ("{excludes: [a]}", "excludes: .*--exclude"),
        ("{pips: [a]}", "pips: unknown key; did you mean 'pip'"),
        ("{xyz: [a]}", "xyz: unknown key; expected pip, uv, "),
        ("{pip: [a], uv: [b]}", "'pip' field, 'uv' field"),
        ("{pip: none.txt}", r"none\.txt"),
        ("{uv: 5}", "uv"),
        ("{image_uri: x, pip: [a]}", "image_uri"),
        ("{py_executable: [python]}", r"py_executable: expected a text, got \['python'\]"),
        ("{env_vars: {A_TOKEN: x}}", "A_TOKEN: a secret"),
        ("{env_vars: {A: 5}}", "env_vars"),
        ("{pip: ['--index-url https://me:pw1@host/simple']}", "pip: .*password"),
        ("{uv: ['x @ git+https://pw1@host/x']}", "uv: .*password"),
        ("[a]", "mapping"),
    ],
)
def test_a_runtime_environment_that_submit_cannot_send_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "env.yaml").write_text(text)
    with pytest.raises((SubmissionError, ConfigError), match=message) as caught:
        make_job_request(folder, "train", "configs/run.yaml", runtime_env=folder / "env.yaml")
    assert "pw1" not in str(caught.value)


def test_two_names_that_are_made_at_the_same_moment_differ() -> None:
    names = {make_unique_name("press", "a b/c") for _ in range(200)}
    assert len(names) == 200
    assert all(re.fullmatch(r"press-a-b-c-[0-9-]{15}-[0-9a-f]{6}", name) for name in names)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", None, 130)],
)
def test_the_end_of_a_job_becomes_an_exit_status(status: str, code: int | None, expected: int) -> None:
    assert client.get_exit_status(SimpleNamespace(status=status, driver_exit_code=code)) == expected


def test_a_missing_address_and_a_missing_cluster_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(SubmissionError, match="--address"):
        client.connect_to_cluster()
    with pytest.raises(SubmissionError, match=r"http://127\.0\.0\.1:1"):
        client.connect_to_cluster("http://127.0.0.1:1")


def test_an_old_cluster_is_refused_and_a_newer_version_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    head, versions = SimpleNamespace(get_address=lambda: "http://head:8265"), {}
    monkeypatch.setattr(client, "fetch_cluster_metadata", lambda _: versions)
    warnings: list[str] = []
    versions.update(rayVersion="2.9.3", pythonVersion="3.11.7")
    with pytest.raises(SubmissionError, match=r"http://head:8265: .* Ray 2\.9\.3"):
        client.check_cluster_versions(head, warnings.append)
    versions.update(rayVersion="9.0", pythonVersion="3.9.1")
    with pytest.raises(SubmissionError, match=r"Python 3\.9\.1"):
        client.check_cluster_versions(head, warnings.append)
    (warning,) = warnings
    assert "the cluster runs Ray 9.0" in warning


@pytest.mark.parametrize("key", ["image_uri", "py_executable", "conda"])
def test_a_replaced_interpreter_is_reported_with_the_versions_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    head = SimpleNamespace(get_address=lambda: "http://head:8265")
    monkeypatch.setattr(client, "fetch_cluster_metadata", lambda _: {"rayVersion": "2.60.0", "pythonVersion": "3.12.1"})
    lines: list[str] = []
    client.check_cluster_versions(head, lines.append, {key: "x", "pip": ["y"]})
    assert lines[-1].startswith(f"note: {key} ")
    assert "Ray 2.60.0 and Python 3.12.1" in lines[-1]
    assert [line for line in lines if "pip" in line] == []


# A proxy in front of the cluster


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        ({"headers": ["X-Key"]}, "", "--header: expected NAME=VALUE"),
        ({"cookies": ["a=@/nowhere/file"]}, "", "--cookie a: cannot read /nowhere/file"),
        ({}, "[secret1]", "RAY_JOB_HEADERS: expected a JSON object"),
        ({}, '{"X-Key": 5}', "RAY_JOB_HEADERS"),
        ({"verify": "/nowhere/ca.pem"}, "", "/nowhere/ca.pem"),
    ],
)
def test_headers_cookies_and_certificates_that_cannot_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], variable: str, message: str
) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", variable)
    with pytest.raises(SubmissionError, match=message) as caught:
        client.connect_to_cluster("http://127.0.0.1:1", **options)
    assert "secret1" not in str(caught.value)


def test_a_login_page_of_a_proxy_is_reported() -> None:
    with run_dashboard_proxy() as address, pytest.raises(SubmissionError, match="--header or --cookie"):
        client.connect_to_cluster(address)


def test_a_certificate_that_is_not_trusted_is_reported_and_verify_trusts_it(tmp_path: Path) -> None:
    write_certificate(tmp_path / "tls")
    with run_dashboard_proxy(certificate=tmp_path / "tls") as address:
        with pytest.raises(SubmissionError, match=f"{address}: the certificate .*--verify"):
            client.connect_to_cluster(address)
        for verify in (str(tmp_path / "tls/tls.crt"), "false"):
            with pytest.raises(SubmissionError, match="login"):
                client.connect_to_cluster(address, verify=verify)


def test_a_dry_run_names_the_files_and_sends_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--working-dir", str(folder), "--dry-run", "train", "configs/run.yaml"]) == 0
    printed = capsys.readouterr()
    assert "configs/run.yaml" in printed.out.splitlines()
    assert "files, " in printed.err


# On a cluster


def mark_as_cluster_test(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs the nodes and the S3 server."""
    return pytest.mark.cluster(pytest.mark.ray(pytest.mark.s3(test)))


@pytest.fixture(scope="module")
def nodes(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes with two CPUs each that require tokens and have the credentials of the S3 server; a small data set."""
    images = draw_parts(tmp_path_factory.mktemp("parts") / "images")
    with run_nodes(s3_server) as nodes:
        nodes.ingest(images, ["gear"])
        yield nodes


def make_train_command(nodes: Nodes, *overrides: str) -> list[str]:
    """Returns the words of a short training command."""
    return [
        "train", "configs/quickstart.yaml", f"data.uri={nodes.root}/data", f"storage={nodes.root}/runs", "model.weights=random",
        "data.categories=[gear]", "model.backbone=resnet18", "model.image_size_px=64", "train.steps=1",
        "cluster.use_gpu=false", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(nodes: Nodes) -> subprocess.CompletedProcess[str]:
    """Submits a training that needs both nodes."""
    words = make_train_command(nodes, "name=wide", "cluster.num_workers=2", "cluster.cpus_per_worker=2")
    return nodes.run("submit", "--team", "press", "--env", "SITE=b", *words)


@mark_as_cluster_test
def test_a_submitted_run_trains_over_two_nodes_from_s3_to_s3(
    nodes: Nodes, trained: subprocess.CompletedProcess[str], s3: S3Server
) -> None:
    assert trained.returncode == 0, trained.stdout[-2000:] + trained.stderr[-2000:]
    assert "2 worker(s) each" in trained.stdout
    bundle = read_bundle(f"{nodes.root}/runs/wide/bundles/gear")
    assert bundle.manifest["metrics"]["num_workers"] == 2
    assert bundle.config.cluster.team == "press"


@mark_as_cluster_test
def test_the_state_of_a_job_names_its_team_and_no_secret(
    nodes: Nodes, trained: subprocess.CompletedProcess[str]
) -> None:
    job_list = nodes.run("jobs", "list", "--team", "press")
    name = next(line.split("\t")[0] for line in job_list.stdout.splitlines() if "-train-" in line)
    status = nodes.run("jobs", "status", name)
    state = json.loads(status.stdout)
    assert (state["status"], state["team"], state["category"], state["exit_code"]) == ("SUCCEEDED", "press", "gear", 0)
    output = status.stdout + job_list.stdout + trained.stdout + trained.stderr
    assert IDENTITIES["admin"][1] not in output
    assert TOKEN not in output
    assert nodes.run("jobs", "list", "--team", "weld").stdout == ""


@mark_as_cluster_test
def test_an_entry_script_runs_under_ray_job_submit(
    nodes: Nodes, trained: subprocess.CompletedProcess[str], s3: S3Server
) -> None:
    words = f"job submit --address {nodes.address} --working-dir {REPOSITORY} -- python jobs/publish.py "
    words += f"{nodes.root}/registry {nodes.root}/runs/wide --team press"
    command = [str(Path(sys.executable).parent / "ray"), *words.split()]
    process = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert Registry(f"{nodes.root}/registry").resolve("press", "gear").name == "v0001"


@mark_as_cluster_test
def test_a_job_that_the_cluster_can_never_hold_is_refused(nodes: Nodes) -> None:
    process = nodes.run("submit", *make_train_command(nodes, "name=huge", "cluster.num_workers=9"))
    assert process.returncode == 1
    assert "9 worker(s) of 1 CPU need 9 CPU; the cluster has 4 CPU, and room for 4 such worker(s)" in process.stdout
    process = nodes.run(
        "submit", *make_train_command(nodes, "name=big", "cluster.num_workers=1", "cluster.cpus_per_worker=3")
    )
    assert "1 worker(s) of 3 CPU need 3 CPU; the cluster has 4 CPU, and room for 0 such" in process.stdout


@mark_as_cluster_test
@pytest.mark.slow
def test_a_job_survives_an_interrupted_follower_and_stop_ends_it(nodes: Nodes) -> None:
    program = "print('up', flush=True); import time; time.sleep(600)"
    follower = nodes.start("submit", "python", "-c", program, PYTHONUNBUFFERED="1")
    assert follower.stdout is not None
    while follower.stdout.readline().strip() != "up":
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    _, messages = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert "no longer following; the job goes on" in messages
    name = messages.split(":")[0]
    assert json.loads(nodes.run("jobs", "status", name).stdout)["status"] == "RUNNING"
    assert nodes.run("jobs", "stop", name).stdout == f"{name}\tSTOPPED\n"
    assert nodes.run("jobs", "follow", name).returncode == 130
    assert "no job 'nobody'" in nodes.run("jobs", "status", "nobody").stderr


@mark_as_cluster_test
def test_submit_returns_the_exit_status_of_the_job(nodes: Nodes) -> None:
    process = nodes.run("submit", "python", "-c", "print('x' * 9); raise SystemExit(7)")
    assert process.returncode == 7
    assert process.stdout.count("x" * 9) >= 1


@mark_as_cluster_test
def test_jobs_are_submitted_listed_and_stopped_through_a_proxy(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "session").write_text(f"{COOKIE[1]}\n")
    options = ["--cookie", f"{COOKIE[0]}=@{tmp_path / 'session'}"]
    headers = {"RAY_JOB_HEADERS": json.dumps(dict([HEADER]))}
    with run_dashboard_proxy(nodes.address.removeprefix("http://")) as address:
        place = {"RAY_ADDRESS": address, **headers}
        submitted = nodes.run(
            "submit", "--no-follow", *options, "python", "-c", "import time; time.sleep(600)", **place
        )
        name = submitted.stdout.strip()
        assert name, submitted.stderr
        named = [*options, "--header", "=".join(HEADER)]  # instead of the variable
        assert name in nodes.run("jobs", "list", *named, RAY_ADDRESS=address).stdout
        assert nodes.run("jobs", "stop", *options, name, **place).stdout == f"{name}\tSTOPPED\n"
        assert nodes.run("jobs", "follow", *options, name, **place).returncode == 130
        refused = nodes.run("jobs", "list", **place)
        assert (refused.returncode, "--header or --cookie" in refused.stderr) == (1, True), refused.stderr
    assert HEADER[1] not in submitted.stdout + submitted.stderr


@mark_as_cluster_test
def test_a_job_runs_in_its_runtime_environment(nodes: Nodes, tmp_path: Path) -> None:
    script = tmp_path / "interpreter.sh"
    script.write_text(f'#!/bin/sh\nINTERPRETER=own exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    (tmp_path / "env.yaml").write_text(f"{{py_executable: {script}, env_vars: {{LINE: '3'}}}}")
    program = (
        "import os, ray; ray.init(); read = lambda: os.environ.get('INTERPRETER', '-') + os.environ['LINE']; "
        "print('worker:', ray.get(ray.remote(read).remote()))"
    )
    words = [
        "submit",
        "--runtime-env",
        str(tmp_path / "env.yaml"),
        "--working-dir",
        str(tmp_path),
        "python",
        "-c",
        program,
    ]
    ended = nodes.run(*words)
    assert "worker: own3" in ended.stdout, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "note: py_executable replaces the interpreter" in ended.stderr


@mark_as_cluster_test
@pytest.mark.parametrize("changes", [{"RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_MODE": "disabled"}])
def test_a_wrong_token_is_refused(nodes: Nodes, changes: dict[str, str]) -> None:
    process = nodes.run("jobs", "list", **changes)
    assert process.returncode == 1
    assert "RAY_AUTH_TOKEN" in process.stderr
