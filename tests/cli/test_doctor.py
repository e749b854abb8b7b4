"""`focus-ray doctor`: each check on a healthy and on a broken machine, exit statuses, JSON, and a machine without Ray."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from places import free_port
from s3_server import S3Server
from small_set import corrupt_image, ingest_parts, small_config

from focus_ray.cli.main import main
from focus_ray.doctor import checks, cluster, machine, resources, software
from focus_ray.doctor.diagnosis import Check, CheckContext, Diagnosis, ok, run_checks
from focus_ray.errors import DataError
from focus_ray.fitting.settings import Config, parse_config

GIB = 2**30


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def config(uri: str, tmp_path: Path) -> Config:
    return small_config(uri, tmp_path / "runs")


def run_check(check: Check, config: Config | None = None, has_config: bool = True) -> Diagnosis:
    """Runs one check and returns its diagnosis. Without `config`, no data set is named."""
    context = CheckContext(config or parse_config({"data": {"uri": "data"}}), has_config, has_data=config is not None)
    (diagnosis,) = run_checks({"it": check}, context)
    return diagnosis


def with_sections(config: Config, **sections: dict[str, object]) -> Config:
    """Returns a copy of the configuration with other values in some sections."""
    tree = config.model_dump()
    return parse_config({**tree, **{name: {**tree[name], **section} for name, section in sections.items()}})


def with_storage(config: Config, storage: str) -> Config:
    return parse_config({**config.model_dump(), "storage": storage})


# Diagnoses and how they are printed


def test_a_check_that_crashes_gives_a_failed_diagnosis_with_its_reason() -> None:
    def broken(context: CheckContext) -> None:
        raise ZeroDivisionError("of\nlines")

    def refused(context: CheckContext) -> None:
        raise DataError("mend it")

    diagnoses = list(
        run_checks(
            {"a": broken, "b": refused, "c": lambda context: ok("fine")},
            CheckContext(parse_config({"data": {"uri": "x"}})),
        )
    )
    assert [str(diagnosis) for diagnosis in diagnoses] == [
        "FAILED   a: the check itself failed: ZeroDivisionError: of lines",
        "FAILED   b: mend it",
        "ok       c: fine",
    ]


@pytest.mark.parametrize(("status", "exit_status"), [("ok", 0), ("warning", 0), ("FAILED", 1)])
def test_the_exit_status_is_1_only_if_a_check_failed(
    status: str, exit_status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosis = Diagnosis("it", status, "found", "mend it")  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "diagnose", lambda config, overrides: iter([diagnosis]))
    assert main(["doctor"]) == exit_status
    assert capsys.readouterr().out == f"{status:8} it: found: mend it\n"
    assert main(["doctor", "--json"]) == exit_status
    content = json.loads(capsys.readouterr().out)
    expected = {"check": "it", "status": status, "message": "found", "advice": "mend it"}
    assert content == {"healthy": exit_status == 0, "findings": [expected]}


def test_an_invalid_configuration_is_the_first_diagnosis_and_the_machine_is_still_checked() -> None:
    diagnoses = list(checks.diagnose("default", ["train.epoch=3"], {"it": lambda context: ok("fine")}))
    assert [(diagnosis.check, diagnosis.status) for diagnosis in diagnoses] == [
        ("configuration", "FAILED"),
        ("it", "ok"),
    ]
    assert "train.epoch: unknown key; did you mean 'epochs'?" in diagnoses[0].message


def test_overrides_alone_and_sweeps_count_as_configurations() -> None:
    overrides_only = checks.read_context(None, ["storage=elsewhere"])
    assert (overrides_only.config.storage, overrides_only.has_config, overrides_only.has_data) == (
        "elsewhere",
        True,
        False,
    )
    assert checks.read_context(None, ["data.uri=parts"]).has_data
    assert checks.read_context("sweep-training", ["base.storage=there"]).config.storage == "there"
    assert not checks.read_context(None, []).has_config


def test_a_healthy_machine_is_reported_as_json(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "focus_ray.cli", "doctor", str(tmp_path / "run.yaml"), "--json"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    content = json.loads(process.stdout)
    failures = [finding for finding in content["findings"] if finding["status"] == "FAILED"]
    assert (process.returncode, content["healthy"], failures) == (0, True, [])
    assert {finding["check"] for finding in content["findings"]} == {"configuration", *checks.CHECKS}
    assert not (tmp_path / "runs").exists()


WITHOUT_RAY = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "ray" else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
from focus_ray.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_machine_without_ray_is_checked_with_a_warning(tmp_path: Path) -> None:
    words = ["doctor", "model.weights=random", f"storage={tmp_path}"]
    process = subprocess.run([sys.executable, "-c", WITHOUT_RAY, *words], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    (line,) = (line for line in process.stdout.splitlines() if " Ray: " in line)
    assert line.startswith("warning  Ray: not installed; ")
    assert "pip install 'focus-ray[ray]'" in line


# Software


def test_a_missing_or_old_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [Requirement("numpy>=9999"), Requirement("no-such-package>=1"), Requirement("pydantic>=2")]
    monkeypatch.setattr(software, "requirements_of", lambda name="", extra="": [] if extra else needs)
    diagnosis = run_check(software.check_packages)
    assert diagnosis.status == "FAILED"
    assert f"numpy is {metadata.version('numpy')}, not >=9999, no-such-package is missing" in diagnosis.message
    assert diagnosis.advice == "pip install 'numpy>=9999' 'no-such-package>=1'"


def test_a_missing_extra_is_named_and_fails_only_if_a_configuration_needs_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"": [Requirement("numpy>=1")], "train": [Requirement("no-such-package>=1")]}
    monkeypatch.setattr(software, "requirements_of", lambda name="", extra="": needs.get(extra, []))
    diagnosis = run_check(software.check_packages, has_config=False)
    assert diagnosis.status == "ok"
    assert "the extra train is not installed (no-such-package is missing)" in diagnosis.message
    assert run_check(software.check_packages, config).advice == "pip install 'no-such-package>=1'"


def test_requirements_of_an_extra_are_those_that_it_adds() -> None:
    names = {
        extra: {need.name for need in software.requirements_of(extra=extra)} for extra in ("", "s3", "train", "ray")
    }
    assert {"torch", "numpy"} <= names[""]
    assert names["s3"] == {"boto3"}
    assert names["s3"] < names["train"] < names["ray"]
    assert names[""].isdisjoint(names["ray"])
    assert "ray" in names["ray"]


def test_a_focus_ray_that_is_not_installed_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "DISTRIBUTION", "no-such-package")
    assert software.requirements_of("no-such-package") == []
    monkeypatch.setattr(software, "requirements_of", lambda name="", extra="": [])
    assert run_check(software.check_packages).status == "warning"


def test_a_torchvision_that_was_built_for_another_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_check(software.check_torch_pair).status == "ok"
    monkeypatch.setattr(software, "requirements_of", lambda name: [Requirement("torch==1.0")])
    diagnosis = run_check(software.check_torch_pair)
    assert diagnosis.status == "FAILED"
    assert "which was built for torch==1.0" in diagnosis.message
    assert "pip install --force-reinstall torch torchvision" in diagnosis.advice


def test_an_old_ray_fails_with_the_command_that_installs_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "requirements_of", lambda name="", extra="": [Requirement("ray[data]>=9999")])
    diagnosis = run_check(software.check_ray)
    assert (diagnosis.status, diagnosis.advice) == ("FAILED", "pip install 'ray[data]>=9999'")


# The machine


def test_more_workers_than_cpus_fail_unless_another_cluster_runs_them(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_count", lambda: 2.0)
    three_workers = with_sections(config, cluster={"num_workers": 3})
    assert run_check(machine.check_cpus, config).status == "ok"
    diagnosis = run_check(machine.check_cpus, three_workers)
    assert diagnosis.status == "FAILED"
    assert "cluster.num_workers=3 with cluster.cpus_per_worker=1 need 3" in diagnosis.message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert run_check(machine.check_cpus, three_workers).status == "ok"


def test_cpus_and_memory_are_read_from_the_container_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 7340032 kB\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    monkeypatch.setattr(machine, "_read_system_file", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (machine.cpu_count(), machine.memory_bytes()) == (1.0, (4 * GIB, 3 * GIB))
    files["/sys/fs/cgroup/cpu.max"], files["/sys/fs/cgroup/memory.max"] = "max 100000\n", "max\n"
    assert (machine.cpu_count(), machine.memory_bytes()) == (8.0, (8 * GIB, 7 * GIB))


def test_low_memory_and_a_budget_above_the_free_memory_give_warnings(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (8 * GIB, 3 * GIB))
    assert "lower data.memory_budget_mb" in run_check(machine.check_memory, config).advice
    assert run_check(machine.check_memory, with_sections(config, data={"memory_budget_mb": 100.0})).status == "ok"
    monkeypatch.setattr(machine, "memory_bytes", lambda: (8 * GIB, GIB))
    assert run_check(machine.check_memory, config).status == "warning"


@pytest.mark.parametrize(("free_gib", "status"), [(100, "ok"), (1, "warning"), (0.01, "FAILED")])
def test_a_nearly_full_disk_is_reported(
    free_gib: float, status: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=int(free_gib * GIB), total=200 * GIB)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert run_check(machine.check_disk, config).status == status
    assert run_check(machine.check_ray_disk).status == ("ok" if free_gib == 100 else "warning")


def test_shared_memory_that_is_too_small_for_rays_store_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (20 * GIB, 10 * GIB))
    monkeypatch.setattr(machine.Path, "is_dir", lambda self: True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB // 16, total=GIB // 16))
    diagnosis = run_check(machine.check_shared_memory)
    assert diagnosis.status == "warning"
    assert "docker run --shm-size=3.3g" in diagnosis.advice


def test_a_missing_gpu_fails_if_required_and_a_driver_that_torch_cannot_use_gives_a_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "_read_system_file", lambda path: "")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert run_check(machine.check_gpu, config).status == "ok"
    diagnosis = run_check(machine.check_gpu, with_sections(config, cluster={"use_gpu": True}))
    assert (diagnosis.status, "cluster.use_gpu=auto" in diagnosis.advice) == ("FAILED", True)
    monkeypatch.setattr(machine, "_read_system_file", lambda path: "NVRM version: 580.1\nGCC\n")
    diagnosis = run_check(machine.check_gpu, config)
    assert diagnosis.status == "warning"
    assert "NVIDIA driver (NVRM version: 580.1)" in diagnosis.message


def test_a_busy_port_is_named_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        busy = listening.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", {busy: "take another", free_port(): "unused"})
        diagnosis = run_check(machine.check_ports)
        assert (diagnosis.status, diagnosis.advice) == ("warning", "take another")
        assert f"{busy} of 127.0.0.1" in diagnosis.message
    assert run_check(machine.check_ports).status == "ok"


# Ray clusters


@pytest.fixture
def listener() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start_http_server() -> Iterator[Callable[[int, str], str]]:
    """Returns a function that starts an HTTP server with one answer to every request, and returns its address."""
    servers: list[HTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_HEAD = do_GET

            def log_message(self, *words: object) -> None:
                return

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_no_address_and_an_address_that_answers_are_ok(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_check(cluster.check_address).status == "ok"
    for address in (listener, f"ray://{listener}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert run_check(cluster.check_address).message == f"RAY_ADDRESS={address} accepts connections"


def test_an_address_that_does_not_answer_or_is_malformed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed_address = f"127.0.0.1:{free_port()}"
    for address in (closed_address, f"http://{closed_address}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        diagnosis = run_check(cluster.check_address)
        assert diagnosis.status == "FAILED"
        assert f"RAY_ADDRESS={address} does not answer (" in diagnosis.message
        assert "or unset RAY_ADDRESS" in diagnosis.advice
    monkeypatch.setenv("RAY_ADDRESS", "head")
    assert "RAY_ADDRESS=head is not an address" in run_check(cluster.check_address).message


@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (200, json.dumps({"ray_version": metadata.version("ray")}), "ok", "runs Ray"),
        (200, '{"ray_version": "2.1.0"}', "warning", "runs Ray 2.1.0, this machine"),
        (200, "<html>", "FAILED", "is not a Ray server"),
        (200, "[]", "FAILED", "is not a Ray server"),
        (200, "{}", "FAILED", "is not a Ray server"),
        (401, "", "warning", "requires a token"),
        (404, "", "FAILED", "answers with status 404"),
    ],
)
def test_the_version_of_a_jobs_server_is_compared(
    status: int,
    body: str,
    expected: str,
    message: str,
    start_http_server: Callable[[int, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", start_http_server(status, body))
    diagnosis = run_check(cluster.check_address)
    assert diagnosis.status == expected
    assert message in diagnosis.message


def test_the_stale_address_file_of_a_killed_cluster_gives_a_warning(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert run_check(cluster.check_stale_cluster_file).message == "no other Ray cluster is recorded on this machine"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "RAY_ADDRESS=auto, but no cluster runs" in run_check(cluster.check_address).message
    (tmp_path / "ray").mkdir()
    address_file = tmp_path / "ray/ray_current_cluster"
    address_file.write_text(f"127.0.0.1:{free_port()}\n")
    assert run_check(cluster.check_address).status == "FAILED"
    diagnosis = run_check(cluster.check_stale_cluster_file)
    assert (diagnosis.status, "delete the file" in diagnosis.advice) == ("warning", True)
    assert str(address_file) in diagnosis.message
    address_file.write_text(listener)
    assert run_check(cluster.check_stale_cluster_file).status == run_check(cluster.check_address).status == "ok"


# Storage, data, weights


def test_storage_is_tried_and_no_file_remains(config: Config, tmp_path: Path) -> None:
    assert run_check(resources.check_storage, config).message == f"{tmp_path}/runs can be created in {tmp_path}"
    (tmp_path / "runs").mkdir()
    assert (
        run_check(resources.check_storage, config).message
        == f"{tmp_path}/runs: files can be written, read, listed and deleted"
    )
    assert list((tmp_path / "runs").iterdir()) == []


def test_storage_that_cannot_be_written_fails_with_the_reason(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    diagnosis = run_check(resources.check_storage, with_storage(config, f"{tmp_path}/file/runs"))
    assert (diagnosis.status, diagnosis.message) == ("FAILED", f"{tmp_path}/file/runs: {tmp_path}/file is a file")
    assert run_check(resources.check_storage, with_storage(config, "gs://bucket")).message.startswith(
        "'gs://bucket': expected a local"
    )


def test_s3_that_does_not_answer_fails_with_the_variable_to_set(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    diagnosis = run_check(resources.check_storage, with_storage(config, "s3://bucket/runs"))
    assert diagnosis.status == "FAILED"
    assert "cannot write" in diagnosis.message
    assert "set AWS_ENDPOINT_URL" in diagnosis.message


@pytest.mark.s3
def test_storage_on_s3_is_tried(config: Config, s3: S3Server) -> None:
    storage = s3.new_uri()
    assert run_check(resources.check_storage, with_storage(config, storage)).message.startswith(
        f"{storage}: files can be written"
    )


def test_a_data_set_is_reported_with_its_counts_and_a_missing_one_with_advice(config: Config, tmp_path: Path) -> None:
    diagnosis = run_check(resources.check_data, config)
    assert diagnosis.status == "ok"
    assert "1 categories: gear 24 train, 4 normal and 4 anomalous test images" in diagnosis.message
    all_categories = run_check(resources.check_data, with_sections(config, data={"categories": None}))
    assert "2 categories: board 24" in all_categories.message
    missing = run_check(
        resources.check_data, with_sections(config, data={"uri": str(tmp_path / "none"), "categories": None})
    )
    assert (missing.status, "ingest one first" in missing.message) == ("FAILED", True)
    unknown_category = run_check(resources.check_data, with_sections(config, data={"categories": ["nut"]}))
    assert "no category 'nut'; available categories: board, gear" in unknown_category.message
    assert list(run_checks({"it": resources.check_data}, CheckContext(config))) == []  # the user named no data set


def test_a_damaged_data_set_fails(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.data.uri, tmp_path / "data")
    damaged = with_sections(config, data={"uri": str(tmp_path / "data")})
    corrupt_image(str(tmp_path / "data"), "gear", 0)
    assert run_check(resources.check_data, damaged).status == "FAILED"
    for part in (tmp_path / "data/category=gear").glob("part-*"):
        part.unlink()
    diagnosis = run_check(resources.check_data, damaged)
    assert (diagnosis.status, diagnosis.advice) == ("FAILED", "ingest these categories again")
    assert "gear: data files are missing or damaged" in diagnosis.message


def test_weights_in_a_file_are_loaded(config: Config, tmp_path: Path) -> None:
    assert run_check(resources.check_weights, config).message.endswith("model.weights=random: nothing to load")
    packaged = with_sections(config, model={"backbone": "efficientnet_lite0", "weights": "default"})
    assert run_check(resources.check_weights, packaged).message.endswith("they load and fit")
    missing = run_check(resources.check_weights, with_sections(config, model={"weights": f"{tmp_path}/none.pth"}))
    assert (missing.status, "existing file" in missing.message) == ("FAILED", True)
    (tmp_path / "text.pth").write_text("no weights")
    broken = run_check(resources.check_weights, with_sections(config, model={"weights": f"{tmp_path}/text.pth"}))
    assert (broken.status, "cannot read a state dict" in broken.message) == ("FAILED", True)


def test_weights_that_are_not_downloaded_yet_need_a_url_that_answers(
    config: Config, tmp_path: Path, start_http_server: Callable[[int, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    reachable = with_sections(config, model={"weights": f"{start_http_server(200, '')}/net.pth"})
    assert "the first run downloads them" in run_check(resources.check_weights, reachable).message
    refused = with_sections(config, model={"weights": f"{start_http_server(403, '')}/net.pth"})
    assert "cannot be reached (HTTP 403)" in run_check(resources.check_weights, refused).message
    unreachable = with_sections(config, model={"weights": f"http://127.0.0.1:{free_port()}/net.pth"})
    diagnosis = run_check(resources.check_weights, unreachable)
    assert diagnosis.status == "FAILED"
    assert "set model.weights to a file" in diagnosis.advice
    assert run_check(resources.check_weights, unreachable, has_config=False).status == "warning"


def test_default_weights_are_read_from_torchs_cache(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(resources, "_url_problem", lambda url: "no network")
    diagnosis = run_check(resources.check_weights, with_sections(config, model={"weights": "default"}))
    assert diagnosis.status == "FAILED"
    assert f"not on this machine ({tmp_path}/checkpoints/resnet18-" in diagnosis.message
