"""A user's mistake gives a single line immediately, which names the mistake and its correction."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import free_port

from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.cli.main import main
from focus_ray.cluster import address
from focus_ray.data.images import encode_png
from focus_ray.data.settings import DataConfig
from focus_ray.errors import DataError, SubmissionError, TrainingError
from focus_ray.fitting.settings import parse_config
from focus_ray.ingestion.ingest import ingest
from focus_ray.submission.package import build_job_package


@pytest.fixture
def bundle(part_bundles: dict[str, str]) -> str:
    return part_bundles["gear"]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def test_a_folder_with_an_unknown_layout_names_the_folder_to_make(tmp_path: Path, picture: np.ndarray) -> None:
    for place in (tmp_path / "nut", tmp_path / "set" / "nut"):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(encode_png(picture))
    with pytest.raises(DataError, match=r"1 images .*nut/good/"):
        ingest(tmp_path / "nut", tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=r"1 images .*set/nut/good/"):
        ingest(tmp_path / "set", tmp_path / "out", progress=False)


def test_a_single_category_needs_no_brackets() -> None:
    assert DataConfig(uri="data", categories="nut").categories == ("nut",)
    assert parse_config({"data": {"uri": "data", "categories": "nut"}}).data.categories == ("nut",)


def test_an_inspector_accepts_paths_and_refuses_other_types(bundle: str, picture: np.ndarray, tmp_path: Path) -> None:
    inspector = Inspector.load(bundle, "cpu")
    (tmp_path / "a.png").write_bytes(encode_png(picture))
    path = tmp_path / "a.png"
    scores = [inspection.score for inspection in inspector.inspect([path.read_bytes(), str(path), path])]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6) == pytest.approx(scores[2], rel=1e-6)
    with pytest.raises(DataError, match=r"image 0 is numpy\.ndarray: expected the bytes of an image file, or its path"):
        inspector.inspect([picture])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a list of images, got a single str"):
        inspector.inspect(str(path))
    with pytest.raises(DataError, match=r"nowhere\.png: .*No such file"):
        inspector.inspect([tmp_path / "nowhere.png"])


def test_json_contains_umlauts_and_escapes_invalid_bytes(
    bundle: str, picture: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Schlüssel.png").write_bytes(encode_png(picture))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/Br\xfccke.png")).write_bytes(encode_png(picture))
    assert main(["inspect", bundle, str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "Schlüssel.png" in output
    assert {Path(json.loads(line)["image"]).name for line in output.splitlines()} == {"Schlüssel.png", "Br\\xfccke.png"}


def test_a_list_of_versions_has_titles(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Registry(tmp_path).publish(bundle, "press")
    assert main(["registry", "list", str(tmp_path)]) == 0
    titles, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert titles[:3] == ["team", "category", "version"]
    assert [len(row) for row in rows] == [len(titles)]


def test_a_misspelt_path_is_reported_before_heavy_imports(tmp_path: Path) -> None:
    lines = (
        "inspect nowhere a.png",
        "evaluate nowhere",
        "serve nowhere",
        "update nowhere out --add nowhere",
        "inspect-batch nowhere data out",
    )
    code = """
import sys
from focus_ray.cli.main import main
for line in sys.argv[1:]:
    assert main(line.split()) == 1
    assert not {"torch", "ray"} & set(sys.modules)
"""
    finished = subprocess.run([sys.executable, "-c", code, *lines], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines() == ["focus-ray: nowhere: no such file or folder"] * len(lines)


def test_a_busy_port_is_reported_in_a_single_line(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["serve", bundle, "--port", str(port)]) == 1
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 2
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in output[1]


def test_a_failed_start_of_ray_is_reported_in_a_single_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from focus_ray.cluster.connect import connect_to_ray

    def init(**settings: object) -> None:
        raise RuntimeError("The current node timed out during startup.\nThis could happen because\n\nmany lines")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TrainingError) as caught:
        connect_to_ray()
    assert "\n" not in str(caught.value)
    assert "Ray does not start on this machine: RuntimeError: The current node timed out" in str(caught.value)


@pytest.mark.parametrize("command", ["train", "inspect-batch", "evaluate", "ingest", "sweep"])
def test_a_stopped_ray_cluster_is_reported_immediately(
    bundle: str,
    parts: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = {"data": {"uri": parts}, "storage": str(tmp_path), "model": {"weights": "random"}}
    sweep = {"base": base, "space": {"density.window": [1, 3]}, "searcher": "grid", "name": "gone"}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    words = {
        "train": ["default", f"data.uri={parts}", f"storage={tmp_path}", "name=gone", "model.weights=random"],
        "inspect-batch": [bundle, parts, f"{tmp_path}/scores"],
        "evaluate": [bundle, "--output", f"{tmp_path}/report"],
        "ingest": [f"{Path(parts).parent}/images", f"{tmp_path}/data", "--workers", "2"],
        "sweep": [f"{tmp_path}/sweep.yaml"],
    }[command]
    for prefix in ("", "ray://"):
        place = f"{prefix}127.0.0.1:{free_port()}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        assert main([command, *words]) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"cannot join the Ray cluster at RAY_ADDRESS={place}: Connection refused" in message


def test_a_server_that_never_answers_is_no_ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "ANSWER_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        assert "does not answer as Ray does" in address.find_cluster_problem(place)


@pytest.mark.parametrize("text", ["junk", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:port"])
def test_an_invalid_ray_address_is_refused_with_the_valid_forms(text: str) -> None:
    assert "give HOST:6379" in address.find_cluster_problem(text)


def test_missing_weights_are_reported_before_ray_starts(
    parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("focus_ray.training.training.connect_to_ray", None)  # must not be reached
    words = [f"data.uri={parts}", f"storage={tmp_path}", "name=lost", f"model.weights={tmp_path}/nowhere.pth"]
    assert main(["train", "default", *words]) == 1
    _, error = capsys.readouterr().err.strip().splitlines()  # the action, and the reason of its failure
    assert "nowhere.pth" in error
    assert "model.weights" in error
    assert not (tmp_path / "lost").exists()  # so that the corrected configuration needs no --resume


def test_ctrl_c_in_a_training_explains_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: object, resume: bool, log: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("focus_ray.training.training.train", interrupted)
    assert main(["train", "default", "train.steps=3", "data.uri=data", "name=parts"]) == 130
    resumed = "`focus-ray train default train.steps=3 data.uri=data name=parts --resume` goes on"
    assert resumed in capsys.readouterr().err


def test_packing_a_job_refuses_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/Br\xfccke.yaml")).write_text("")
    with pytest.raises(SubmissionError, match=r"cke\.yaml.*.*not valid UTF-8"):
        build_job_package(tmp_path)
    assert build_job_package(tmp_path, ["Br*"]).names
