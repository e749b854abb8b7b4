"""`focus-ray doctor`: each check on a sound and on a broken machine, exit statuses, JSON, and no Ray."""

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
from small_set import ingest_parts, small_config, spoil_an_image

from focus_ray.cli.main import main
from focus_ray.config import Config, parse_config
from focus_ray.doctor import checks, cluster, machine, places, software
from focus_ray.doctor.finding import Asked, Check, Finding, examine, ok
from focus_ray.errors import DataError

GIB = 2**30


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def config(uri: str, tmp_path: Path) -> Config:
    return small_config(uri, tmp_path / "runs")


def find(check: Check, config: Config | None = None, given: bool = True) -> Finding:
    """What one check finds, as `doctor` would tell it."""
    asked = Asked(config or parse_config({"data": {"uri": "data"}}), given, has_data=config is not None)
    (finding,) = examine({"it": check}, asked)
    return finding


def with_sections(config: Config, **sections: dict[str, object]) -> Config:
    tree = config.model_dump()
    return parse_config({**tree, **{name: {**tree[name], **section} for name, section in sections.items()}})


def with_storage(config: Config, storage: str) -> Config:
    return parse_config({**config.model_dump(), "storage": storage})


# Findings and how they are told


def test_a_check_that_crashes_is_a_failed_finding_with_its_reason() -> None:
    def broken(asked: Asked) -> None:
        raise ZeroDivisionError("of\nlines")

    def refused(asked: Asked) -> None:
        raise DataError("mend it")

    found = list(
        examine({"a": broken, "b": refused, "c": lambda asked: ok("fine")}, Asked(parse_config({"data": {"uri": "x"}})))
    )
    assert [str(finding) for finding in found] == [
        "FAILED   a: the check itself failed: ZeroDivisionError: of lines",
        "FAILED   b: mend it",
        "ok       c: fine",
    ]


@pytest.mark.parametrize(("status", "exit_status"), [("ok", 0), ("warning", 0), ("FAILED", 1)])
def test_the_exit_status_is_1_only_where_something_failed(
    status: str, exit_status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("it", status, "found", "mend it")  # type: ignore[arg-type]
    monkeypatch.setattr(checks, "diagnose", lambda config, overrides: iter([finding]))
    assert main(["doctor"]) == exit_status
    assert capsys.readouterr().out == f"{status:8} it: found: mend it\n"
    assert main(["doctor", "--json"]) == exit_status
    content = json.loads(capsys.readouterr().out)
    expected = {"check": "it", "status": status, "message": "found", "advice": "mend it"}
    assert content == {"healthy": exit_status == 0, "findings": [expected]}


def test_a_configuration_that_is_not_valid_is_the_first_finding_and_the_machine_is_checked_all_the_same() -> None:
    found = list(checks.diagnose("default", ["train.epoch=3"], {"it": lambda asked: ok("fine")}))
    assert [(finding.check, finding.status) for finding in found] == [("configuration", "FAILED"), ("it", "ok")]
    assert "train.epoch: unknown key; did you mean 'epochs'?" in found[0].message


def test_overrides_alone_and_sweeps_are_taken_as_configurations() -> None:
    alone = checks.read_asked(None, ["storage=elsewhere"])
    assert (alone.config.storage, alone.given, alone.has_data) == ("elsewhere", True, False)
    assert checks.read_asked(None, ["data.uri=parts"]).has_data
    assert checks.read_asked("sweep-training", ["base.storage=there"]).config.storage == "there"
    assert not checks.read_asked(None, []).given


def test_a_sound_machine_is_healthy_and_told_as_json(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "focus_ray.cli", "doctor", str(tmp_path / "run.yaml"), "--json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    content = json.loads(ended.stdout)
    wrong = [finding for finding in content["findings"] if finding["status"] == "FAILED"]
    assert (ended.returncode, content["healthy"], wrong) == (0, True, [])
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


def test_a_machine_without_ray_is_examined_and_warned(tmp_path: Path) -> None:
    words = ["doctor", "model.weights=random", f"storage={tmp_path}"]
    ended = subprocess.run([sys.executable, "-c", WITHOUT_RAY, *words], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (line,) = (line for line in ended.stdout.splitlines() if " Ray: " in line)
    assert line.startswith("warning  Ray: not installed; training in one process does without it")
    assert "pip install 'focus-ray[ray]'" in line


# Software


def test_a_package_that_is_missing_or_too_old_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [Requirement("numpy>=9999"), Requirement("no-such-package>=1"), Requirement("pydantic>=2")]
    monkeypatch.setattr(software, "required", lambda name="", extra="": [] if extra else needs)
    found = find(software.packages)
    assert found.status == "FAILED"
    assert f"numpy is {metadata.version('numpy')}, not >=9999, no-such-package is missing" in found.message
    assert found.advice == "pip install 'numpy>=9999' 'no-such-package>=1'"


def test_an_extra_that_is_not_installed_is_told_and_fails_where_it_is_needed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"": [Requirement("numpy>=1")], "train": [Requirement("no-such-package>=1")]}
    monkeypatch.setattr(software, "required", lambda name="", extra="": needs.get(extra, []))
    found = find(software.packages, given=False)
    assert found.status == "ok"
    assert "the extra train is not installed (no-such-package is missing)" in found.message
    assert find(software.packages, config).advice == "pip install 'no-such-package>=1'"


def test_what_an_extra_requires_is_what_it_adds() -> None:
    names = {extra: {need.name for need in software.required(extra=extra)} for extra in ("", "s3", "train", "ray")}
    assert {"torch", "numpy"} <= names[""]
    assert names["s3"] == {"boto3"}
    assert names["s3"] < names["train"] < names["ray"]
    assert names[""].isdisjoint(names["ray"])
    assert "ray" in names["ray"]


def test_a_focus_ray_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "DISTRIBUTION", "no-such-package")
    assert software.required("no-such-package") == []
    monkeypatch.setattr(software, "required", lambda name="", extra="": [])
    assert find(software.packages).status == "warning"


def test_a_torch_that_torchvision_was_not_built_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(software.torch_pair).status == "ok"
    monkeypatch.setattr(software, "required", lambda name: [Requirement("torch==1.0")])
    found = find(software.torch_pair)
    assert found.status == "FAILED"
    assert "which was built for torch==1.0" in found.message
    assert "pip install --force-reinstall torch torchvision" in found.advice


def test_a_ray_that_is_too_old_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "required", lambda name="", extra="": [Requirement("ray[data]>=9999")])
    found = find(software.ray)
    assert (found.status, found.advice) == ("FAILED", "pip install 'ray[data]>=9999'")


# The machine


def test_more_workers_than_cpus_fail_unless_another_cluster_runs_them(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_count", lambda: 2.0)
    many = with_sections(config, cluster={"num_workers": 3})
    assert find(machine.cpus, config).status == "ok"
    found = find(machine.cpus, many)
    assert found.status == "FAILED"
    assert "cluster.num_workers=3 with cluster.cpus_per_worker=1 need 3" in found.message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    assert find(machine.cpus, many).status == "ok"


def test_cpus_and_memory_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 7340032 kB\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (machine.cpu_count(), machine.memory_bytes()) == (1.0, (4 * GIB, 3 * GIB))
    files["/sys/fs/cgroup/cpu.max"], files["/sys/fs/cgroup/memory.max"] = "max 100000\n", "max\n"
    assert (machine.cpu_count(), machine.memory_bytes()) == (8.0, (8 * GIB, 7 * GIB))


def test_little_memory_and_a_budget_beyond_it_are_warnings(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (8 * GIB, 3 * GIB))
    assert "lower data.memory_budget_mb" in find(machine.memory, config).advice
    assert find(machine.memory, with_sections(config, data={"memory_budget_mb": 100.0})).status == "ok"
    monkeypatch.setattr(machine, "memory_bytes", lambda: (8 * GIB, GIB))
    assert find(machine.memory, config).status == "warning"


@pytest.mark.parametrize(("free_gib", "status"), [(100, "ok"), (1, "warning"), (0.01, "FAILED")])
def test_a_disk_that_is_nearly_full_is_told(
    free_gib: float, status: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=int(free_gib * GIB), total=200 * GIB)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage)
    assert find(machine.disk, config).status == status
    assert find(machine.ray_disk).status == ("ok" if free_gib == 100 else "warning")


def test_shared_memory_too_small_for_rays_store_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (20 * GIB, 10 * GIB))
    monkeypatch.setattr(machine.Path, "is_dir", lambda self: True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: SimpleNamespace(free=GIB // 16, total=GIB // 16))
    found = find(machine.shared_memory)
    assert found.status == "warning"
    assert "docker run --shm-size=3.3g" in found.advice


def test_a_gpu_that_is_asked_for_and_missing_fails_and_a_driver_without_torchs_help_is_a_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "_text", lambda path: "")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert find(machine.gpu, config).status == "ok"
    found = find(machine.gpu, with_sections(config, cluster={"use_gpu": True}))
    assert (found.status, "cluster.use_gpu=auto" in found.advice) == ("FAILED", True)
    monkeypatch.setattr(machine, "_text", lambda path: "NVRM version: 580.1\nGCC\n")
    found = find(machine.gpu, config)
    assert found.status == "warning"
    assert "there is an NVIDIA driver (NVRM version: 580.1)" in found.message


def test_a_port_that_is_taken_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", {busy: "take another", free_port(): "unused"})
        found = find(machine.ports)
        assert (found.status, found.advice) == ("warning", "take another")
        assert found.message.startswith(f"{busy} of 127.0.0.1")
    assert find(machine.ports).status == "ok"


# Ray clusters


@pytest.fixture
def listener() -> Iterator[str]:
    """HOST:PORT of what takes connections."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """Starts an HTTP server with one answer to all; returns its address."""
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


def test_an_address_that_is_not_set_is_fine_and_one_that_answers_too(
    listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find(cluster.address).status == "ok"
    for address in (listener, f"ray://{listener}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert find(cluster.address).message == f"RAY_ADDRESS={address} takes connections"


def test_an_address_that_does_not_answer_or_is_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = f"127.0.0.1:{free_port()}"
    for address in (gone, f"http://{gone}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        found = find(cluster.address)
        assert found.status == "FAILED"
        assert f"RAY_ADDRESS={address} does not answer (" in found.message
        assert "or unset RAY_ADDRESS" in found.advice
    monkeypatch.setenv("RAY_ADDRESS", "head")
    assert "RAY_ADDRESS=head: not an address" in find(cluster.address).message


@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (200, json.dumps({"ray_version": metadata.version("ray")}), "ok", "runs Ray"),
        (200, '{"ray_version": "2.1.0"}', "warning", "runs Ray 2.1.0, this machine"),
        (200, "<html>", "FAILED", "is not Ray's"),
        (200, "[]", "FAILED", "is not Ray's"),
        (200, "{}", "FAILED", "is not Ray's"),
        (401, "", "warning", "asks for a token"),
        (404, "", "FAILED", "answers with 404"),
    ],
)
def test_a_jobs_server_is_asked_for_its_version(
    status: int,
    body: str,
    expected: str,
    message: str,
    answering: Callable[[int, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", answering(status, body))
    found = find(cluster.address)
    assert found.status == expected
    assert message in found.message


def test_the_note_of_a_cluster_that_was_killed_is_told(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert find(cluster.left_behind).message == "no other Ray cluster of this machine is noted"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "RAY_ADDRESS=auto, and no cluster runs" in find(cluster.address).message
    (tmp_path / "ray").mkdir()
    note = tmp_path / "ray/ray_current_cluster"
    note.write_text(f"127.0.0.1:{free_port()}\n")
    assert find(cluster.address).status == "FAILED"
    found = find(cluster.left_behind)
    assert (found.status, "ray stop, or delete the file" in found.advice) == ("warning", True)
    assert str(note) in found.message
    note.write_text(listener)
    assert find(cluster.left_behind).status == find(cluster.address).status == "ok"


# Storage, data, weights


def test_storage_is_tried_and_nothing_is_left_there(config: Config, tmp_path: Path) -> None:
    assert find(places.storage, config).message == f"{tmp_path}/runs can be made in {tmp_path}"
    (tmp_path / "runs").mkdir()
    assert find(places.storage, config).message == f"{tmp_path}/runs can be written, read, listed and deleted in"
    assert list((tmp_path / "runs").iterdir()) == []


def test_storage_that_cannot_be_written_fails_with_the_reason(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = find(places.storage, with_storage(config, f"{tmp_path}/file/runs"))
    assert (found.status, found.message) == ("FAILED", f"{tmp_path}/file/runs: {tmp_path}/file is a file")
    assert find(places.storage, with_storage(config, "gs://bucket")).message.startswith(
        "'gs://bucket': expected a local"
    )


def test_s3_that_does_not_answer_fails_with_what_to_set(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    found = find(places.storage, with_storage(config, "s3://bucket/runs"))
    assert found.status == "FAILED"
    assert "cannot write" in found.message
    assert "set AWS_ENDPOINT_URL to the server's address" in found.message


@pytest.mark.s3
def test_storage_on_s3_is_tried(config: Config, s3: S3Server) -> None:
    storage = s3.new_uri()
    assert find(places.storage, with_storage(config, storage)).message.startswith(f"{storage} can be written")


def test_a_data_set_is_told_with_its_counts_and_a_missing_one_with_what_to_do(config: Config, tmp_path: Path) -> None:
    found = find(places.data, config)
    assert found.status == "ok"
    assert "1 categories: gear 24 train, 4 normal and 4 anomalous test images" in found.message
    every = find(places.data, with_sections(config, data={"categories": None}))
    assert "2 categories: board 24" in every.message
    missing = find(places.data, with_sections(config, data={"uri": str(tmp_path / "none"), "categories": None}))
    assert (missing.status, "ingest one first" in missing.message) == ("FAILED", True)
    other = find(places.data, with_sections(config, data={"categories": ["nut"]}))
    assert "no category 'nut'; there are: board, gear" in other.message
    assert list(examine({"it": places.data}, Asked(config))) == []  # nobody named it


def test_a_damaged_data_set_fails(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.data.uri, tmp_path / "data")
    damaged = with_sections(config, data={"uri": str(tmp_path / "data")})
    spoil_an_image(str(tmp_path / "data"), "gear", 0)
    assert find(places.data, damaged).status == "FAILED"
    for part in (tmp_path / "data/category=gear").glob("part-*"):
        part.unlink()
    found = find(places.data, damaged)
    assert (found.status, found.advice) == ("FAILED", "ingest these categories again")
    assert "gear: files of its data are missing or damaged" in found.message


def test_weights_of_a_file_are_loaded(config: Config, tmp_path: Path) -> None:
    assert find(places.weights, config).message.endswith("model.weights=random: nothing to load")
    packaged = with_sections(config, model={"backbone": "efficientnet_lite0", "weights": "default"})
    assert find(places.weights, packaged).message.endswith("they load and fit")
    missing = find(places.weights, with_sections(config, model={"weights": f"{tmp_path}/none.pth"}))
    assert (missing.status, "existing file" in missing.message) == ("FAILED", True)
    (tmp_path / "text.pth").write_text("no weights")
    broken = find(places.weights, with_sections(config, model={"weights": f"{tmp_path}/text.pth"}))
    assert (broken.status, "cannot read a state dict" in broken.message) == ("FAILED", True)


def test_weights_that_are_not_at_hand_need_a_hub_that_answers(
    config: Config, tmp_path: Path, answering: Callable[[int, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    there = with_sections(config, model={"weights": f"{answering(200, '')}/net.pth"})
    assert "can be reached: the first run downloads them" in find(places.weights, there).message
    refused = with_sections(config, model={"weights": f"{answering(403, '')}/net.pth"})
    assert "cannot be reached (HTTP 403)" in find(places.weights, refused).message
    gone = with_sections(config, model={"weights": f"http://127.0.0.1:{free_port()}/net.pth"})
    found = find(places.weights, gone)
    assert found.status == "FAILED"
    assert "set model.weights to a file" in found.advice
    assert find(places.weights, gone, given=False).status == "warning"


def test_default_weights_are_looked_for_in_torchs_cache(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(places, "_unreachable", lambda url: "no network")
    found = find(places.weights, with_sections(config, model={"weights": "default"}))
    assert found.status == "FAILED"
    assert f"not on this machine ({tmp_path}/checkpoints/resnet18-" in found.message
