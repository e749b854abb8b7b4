"""`focus-ray doctor`: each check on a healthy and on a broken machine, exit statuses, JSON, and a machine without Ray."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from places import free_port
from s3_server import S3Server
from small_set import corrupt_image, small_config

from focus_ray.cli import doctor
from focus_ray.cli.main import main
from focus_ray.doctor import checks, cluster, machine, resources, software
from focus_ray.doctor.diagnosis import Check, CheckContext, Diagnosis, report_ok, run_checks
from focus_ray.errors import DataError
from focus_ray.fitting.settings import Config, parse_config

GIB = 2**30
ConfigMaker = Callable[..., Config]


@pytest.fixture
def make_config(parts: str, tmp_path: Path) -> ConfigMaker:
    """Returns a function that makes a configuration for the category `gear` from a storage and sections."""
    return partial(small_config, parts, storage=f"{tmp_path}/runs")


def run_check(check: Check, config: Config | None = None, has_config: bool = True) -> Diagnosis:
    """Runs one check and returns its diagnosis. Without `config`, no data set is named."""
    context = CheckContext(config or parse_config({"data": {"uri": "data"}}), has_config, has_data=config is not None)
    (diagnosis,) = run_checks({"it": check}, context)
    return diagnosis


# Diagnoses and how they are printed


def test_a_check_that_crashes_gives_a_failed_diagnosis_with_its_reason() -> None:
    def broken(context: CheckContext) -> None:
        raise ZeroDivisionError("of\nlines")

    def refused(context: CheckContext) -> None:
        raise DataError("mend it")

    diagnoses = run_checks(
        {"a": broken, "b": refused, "c": lambda context: report_ok("fine")},
        CheckContext(parse_config({"data": {"uri": "x"}})),
    )
    assert [(each.check, each.status, each.message.rpartition(": ")[2]) for each in diagnoses] == [
        ("a", "FAILED", "of lines"),
        ("b", "FAILED", "mend it"),
        ("c", "ok", "fine"),
    ]


@pytest.mark.parametrize(("status", "exit_status"), [("ok", 0), ("warning", 0), ("FAILED", 1)])
def test_the_exit_status_is_1_only_if_a_check_failed(
    status: str, exit_status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"it": lambda context: (status, "x", "y")})
    assert main(["doctor"]) == exit_status
    assert capsys.readouterr().out.split()[0] == status
    assert main(["doctor", "--json"]) == exit_status
    finding = {"check": "it", "status": status, "message": "x", "advice": "y"}
    assert json.loads(capsys.readouterr().out) == {"healthy": exit_status == 0, "findings": [finding]}


def test_an_invalid_configuration_is_the_first_diagnosis_and_the_machine_is_still_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"it": lambda context: report_ok("fine")})
    invalid, other = doctor.diagnose_machine("default", ["train.step=3"])
    assert (invalid.check, invalid.status, other.check) == ("configuration", "FAILED", "it")
    assert "'steps'" in invalid.message


@pytest.mark.parametrize(
    ("config", "overrides", "storage", "has_config", "has_data"),
    [
        (None, [], "runs", False, False),
        (None, ["storage=there"], "there", True, False),
        (None, ["data.uri=parts"], "runs", True, True),
        ("sweep-training", ["base.storage=there"], "there", True, True),
    ],
)
def test_overrides_alone_and_sweeps_count_as_configurations(
    config: str | None, overrides: list[str], storage: str, has_config: bool, has_data: bool
) -> None:
    context = doctor.read_check_context(config, overrides)
    assert (context.config.storage, context.has_config, context.has_data) == (storage, has_config, has_data)


def test_a_healthy_machine_without_ray_is_reported_as_json_with_one_warning(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(make_config().model_dump(mode="json")))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it was not installed
    assert main(["doctor", str(tmp_path / "run.yaml"), "--json"]) == 0
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings.keys() == {"configuration", *checks.CHECKS}
    assert findings["Ray"]["status"] == "warning"
    assert "pip install 'focus-ray[ray]'" in findings["Ray"]["advice"]
    assert not (tmp_path / "runs").exists()


# Software and machine

FULL = SimpleNamespace(free=GIB // 100, total=200 * GIB)
LOW = SimpleNamespace(free=GIB, total=200 * GIB)
EMPTY = SimpleNamespace(free=100 * GIB, total=200 * GIB)
SMALL = SimpleNamespace(free=GIB // 16, total=GIB // 16)
NO_GPU = {"torch.cuda.is_available": False, "shutil.which": None, "machine._read_system_file": ""}
DRIVER = {**NO_GPU, "machine._read_system_file": "NVRM version: 580.1\nGCC\n"}
CPUS, BUDGET = {"machine.count_cpus": 2.0}, {"memory_budget_mb": 100}
MEMORY, LITTLE_MEMORY = ({"machine.read_memory_bytes": (8 * GIB, free * GIB)} for free in (3, 1))
OTHER_CLUSTER = {**CPUS, "RAY_ADDRESS": "10.0.0.9:6379"}


def needs(*lines: str) -> dict[str, Any]:
    """Returns the patch that makes focus_ray and every other package require these packages."""
    return {"software.read_requirements": [Requirement(line) for line in lines]}


@pytest.mark.parametrize(
    ("check", "sections", "machine_state", "status", "text"),
    [
        (software.check_package_versions, {}, needs(), "warning", "pip install -e ."),
        (software.check_package_versions, {}, needs("pydantic>=2"), "ok", "pydantic"),
        (software.check_package_versions, {}, needs("numpy>=9999"), "FAILED", "not >=9999: pip install 'numpy>=9999'"),
        (software.check_package_versions, {}, needs("no-package>=1"), "FAILED", "missing: pip install 'no-package>=1'"),
        (software.check_torch_and_torchvision, {}, needs("torch>=1.0"), "ok", "torchvision"),
        (software.check_torch_and_torchvision, {}, needs("torch==1.0"), "FAILED", "--force-reinstall"),
        (software.check_ray_package, {}, {}, "ok", "internal parts"),
        (software.check_ray_package, {}, needs("ray[data]>=9999"), "FAILED", "pip install 'ray[data]>=9999'"),
        (machine.check_cpus, {"num_workers": 2}, CPUS, "ok", "2"),
        (machine.check_cpus, {"num_workers": 3}, CPUS, "FAILED", "cluster.num_workers=3"),
        (machine.check_cpus, {"num_workers": 3}, OTHER_CLUSTER, "ok", "2"),
        (machine.check_free_memory, BUDGET, MEMORY, "ok", "3.0 of 8.0 GiB"),
        (machine.check_free_memory, {}, MEMORY, "warning", "data.memory_budget_mb"),
        (machine.check_free_memory, BUDGET, LITTLE_MEMORY, "warning", "stop other programs"),
        (machine.check_storage_disk_space, {}, {"shutil.disk_usage": EMPTY}, "ok", "100.0 GiB"),
        (machine.check_storage_disk_space, {}, {"shutil.disk_usage": LOW}, "warning", "storage"),
        (machine.check_storage_disk_space, {}, {"shutil.disk_usage": FULL}, "FAILED", "storage"),
        (machine.check_ray_disk_space, {}, {"shutil.disk_usage": EMPTY}, "ok", "50% full"),
        (machine.check_ray_disk_space, {}, {"shutil.disk_usage": LOW}, "warning", "RAY_TMPDIR"),
        (machine.check_shared_memory, {}, {**MEMORY, "shutil.disk_usage": SMALL}, "warning", "--shm-size=1.0g"),
        (machine.check_gpu, {}, NO_GPU, "ok", "CPUs"),
        (machine.check_gpu, {"use_gpu": True}, NO_GPU, "FAILED", "cluster.use_gpu=auto"),
        (machine.check_gpu, {}, DRIVER, "warning", "(NVRM version: 580.1)"),
    ],
)
def test_the_state_of_the_machine_is_reported_with_advice(
    check: Check,
    sections: dict[str, Any],
    machine_state: dict[str, Any],
    status: str,
    text: str,
    make_config: ConfigMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`machine_state`: values of environment variables, and results of functions."""
    monkeypatch.setattr(machine.Path, "is_dir", lambda self: True)
    for name, value in machine_state.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
        else:
            target = name if name.startswith(("torch", "shutil")) else f"focus_ray.doctor.{name}"
            monkeypatch.setattr(target, lambda *arguments, value=value, **options: value)
    config = make_config(**{"data" if "memory_budget_mb" in sections else "cluster": sections})
    diagnosis = run_check(check, config)
    assert diagnosis.status == status
    assert text in str(diagnosis)


def test_a_missing_extra_is_named_and_fails_only_if_a_configuration_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_of = {"": [Requirement("numpy>=1")], "train": [Requirement("no-such-package>=1")]}
    monkeypatch.setattr(software, "read_requirements", lambda extra="": needs_of.get(extra, []))
    diagnosis = run_check(software.check_package_versions, has_config=False)
    assert (diagnosis.status, "the extra train is not installed" in diagnosis.message) == ("ok", True)
    assert run_check(software.check_package_versions).status == "FAILED"


def test_requirements_of_an_extra_are_those_that_it_adds() -> None:
    base, s3, train, ray = (
        {need.name for need in software.read_requirements(extra=extra)} for extra in ("", "s3", "train", "ray")
    )
    assert {"torch", "numpy"} <= base
    assert {"boto3"} == s3 < train < ray
    assert base.isdisjoint(ray)
    assert software.read_requirements("no-such-package") == []


def test_cpus_and_memory_are_read_from_the_container_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 7340032 kB\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    monkeypatch.setattr(machine, "_read_system_file", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (machine.count_cpus(), machine.read_memory_bytes()) == (1.0, (4 * GIB, 3 * GIB))
    files["/sys/fs/cgroup/cpu.max"], files["/sys/fs/cgroup/memory.max"] = "max 100000\n", "max\n"
    assert (machine.count_cpus(), machine.read_memory_bytes()) == (8.0, (8 * GIB, 7 * GIB))


@pytest.fixture
def listener() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_busy_port_is_named_with_advice(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = int(listener.rpartition(":")[2])
    monkeypatch.setattr(machine, "PORTS", {busy: "take another", free_port(): "unused"})
    diagnosis = run_check(machine.check_ports)
    assert (diagnosis.status, diagnosis.advice, str(busy) in diagnosis.message) == ("warning", "take another", True)
    monkeypatch.setattr(machine, "PORTS", {free_port(): "unused"})
    assert run_check(machine.check_ports).status == "ok"


# Ray clusters

VERSIONS = {"same": metadata.version("ray"), "other": "2.1.0"}


class Handler(BaseHTTPRequestHandler):
    """Answers the path /STATUS/NAME/... with a status and a Ray version of VERSIONS, or with text that is no version."""

    def do_GET(self) -> None:
        _, status, name, *_ = self.path.split("/")
        self.send_response(int(status))
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": VERSIONS[name]} if name in VERSIONS else [name]).encode())

    do_HEAD = do_GET

    def log_message(self, *words: object) -> None:
        return


@pytest.fixture
def http_server() -> Iterator[str]:
    """Returns the address of an HTTP server."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        ("", "ok", "RAY_ADDRESS is not set"),
        ("{listener}", "ok", "accepts connections"),
        ("ray://{listener}", "ok", "accepts connections"),
        ("{closed}", "FAILED", "or unset RAY_ADDRESS"),
        ("ray://{closed}", "FAILED", "or unset RAY_ADDRESS"),
        ("http://{closed}", "FAILED", "or unset RAY_ADDRESS"),
        ("head", "FAILED", "RAY_ADDRESS=head does not answer"),
        ("{http}/200/same", "ok", VERSIONS["same"]),
        ("{http}/200/other", "warning", "Ray 2.1.0, this machine"),
        ("{http}/200/page", "FAILED", "http://HOST:8265"),
        ("{http}/401/same", "warning", "RAY_AUTH_TOKEN"),
        ("{http}/404/same", "FAILED", "404"),
    ],
)
def test_the_address_of_a_cluster_must_answer_with_the_same_version(
    address: str, status: str, text: str, listener: str, http_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address.format(listener=listener, closed=closed, http=http_server))
    diagnosis = run_check(cluster.check_ray_address)
    assert diagnosis.status == status
    assert text in str(diagnosis)


def test_the_stale_address_file_of_a_killed_cluster_gives_a_warning(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert run_check(cluster.check_stale_cluster_file).status == "ok"
    assert run_check(cluster.check_ray_address).status == "FAILED"
    (tmp_path / "ray").mkdir()
    address_file = tmp_path / "ray/ray_current_cluster"
    address_file.write_text(f"127.0.0.1:{free_port()}\n")
    assert run_check(cluster.check_ray_address).status == "FAILED"
    diagnosis = run_check(cluster.check_stale_cluster_file)
    assert (diagnosis.status, str(address_file) in diagnosis.message) == ("warning", True)
    address_file.write_text(listener)
    assert run_check(cluster.check_stale_cluster_file).status == run_check(cluster.check_ray_address).status == "ok"


# Storage, data, weights


def test_storage_is_tried_and_no_file_remains(make_config: ConfigMaker, tmp_path: Path) -> None:
    assert f"can be created in {tmp_path}" in run_check(resources.check_storage_access, make_config()).message
    (tmp_path / "runs").mkdir()
    assert "written, read, listed and deleted" in run_check(resources.check_storage_access, make_config()).message
    assert list((tmp_path / "runs").iterdir()) == []


def test_storage_that_cannot_be_used_fails_with_the_reason(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    (tmp_path / "file").write_text("")
    reasons = {
        f"{tmp_path}/file/runs": "file is a file",
        "gs://bucket": "gs://",
        "s3://bucket/runs": "AWS_ENDPOINT_URL",
    }
    for storage, reason in reasons.items():
        diagnosis = run_check(resources.check_storage_access, make_config(storage=storage))
        assert (diagnosis.status, reason in diagnosis.message) == ("FAILED", True)


@pytest.mark.s3
def test_storage_on_s3_is_tried(make_config: ConfigMaker, s3: S3Server) -> None:
    assert run_check(resources.check_storage_access, make_config(storage=s3.new_uri())).status == "ok"


def test_a_data_set_is_reported_with_its_counts_and_a_missing_one_with_advice(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    diagnosis = run_check(resources.check_data_set, make_config())
    assert diagnosis.status == "ok"
    assert "1 categories: gear 24 train, 4 normal and 4 anomalous test images" in diagnosis.message
    all_categories = run_check(resources.check_data_set, make_config(data={"categories": None}))
    assert "2 categories: board 24" in all_categories.message
    problems = {"ingest one first": {"uri": f"{tmp_path}/none", "categories": None}, "'nut'": {"categories": ["nut"]}}
    for problem, section in problems.items():
        diagnosis = run_check(resources.check_data_set, make_config(data=section))
        assert (diagnosis.status, problem in diagnosis.message) == ("FAILED", True)
    assert list(run_checks({"it": resources.check_data_set}, CheckContext(make_config()))) == []  # no data set is named


def test_a_damaged_data_set_fails(make_config: ConfigMaker, tmp_path: Path) -> None:
    shutil.copytree(make_config().data.uri, tmp_path / "data")
    damaged = make_config(data={"uri": str(tmp_path / "data")})
    corrupt_image(str(tmp_path / "data"), "gear", 0)
    assert run_check(resources.check_data_set, damaged).status == "FAILED"
    for part in (tmp_path / "data/category=gear").glob("part-*"):
        part.unlink()
    diagnosis = run_check(resources.check_data_set, damaged)
    assert (diagnosis.status, "gear: data files are missing" in diagnosis.message) == ("FAILED", True)


def test_weights_are_loaded_or_the_problem_is_named(
    make_config: ConfigMaker, tmp_path: Path, http_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = make_config(model={"backbone": "efficientnet_lite0", "weights": "default"})
    assert run_check(resources.check_backbone_weights, packaged).status == "ok"
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))  # nothing is downloaded yet
    (tmp_path / "text.pth").write_text("no weights")
    closed = f"http://127.0.0.1:{free_port()}/net.pth"
    cases = {
        "random": ("ok", "nothing to load"),
        f"{tmp_path}/none.pth": ("FAILED", "none.pth"),
        f"{tmp_path}/text.pth": ("FAILED", "text.pth"),
        f"{http_server}/200/net.pth": ("ok", "the first run downloads them"),
        f"{http_server}/403/net.pth": ("FAILED", "HTTP 403"),
        closed: ("FAILED", "set model.weights to a file"),
    }
    for weights, (status, text) in cases.items():
        diagnosis = run_check(resources.check_backbone_weights, make_config(model={"weights": weights}))
        assert (diagnosis.status, text in str(diagnosis)) == (status, True), weights
    unnamed = run_check(resources.check_backbone_weights, make_config(model={"weights": closed}), has_config=False)
    assert unnamed.status == "warning"
    monkeypatch.setattr(resources, "_find_url_problem", lambda url: "no network")
    default = run_check(resources.check_backbone_weights, make_config(model={"weights": "default"}))
    assert (default.status, f"{tmp_path}/checkpoints/resnet18-" in default.message) == ("FAILED", True)
