"""Trackers for real: what a training, an evaluation and a sweep say is read back by MLflow, TensorBoard and W&B's own formats.

Long, because its tests share fixtures that cost seconds.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from places import free_port
from small_set import CATEGORIES, ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_manifest
from focus_ray.cli.main import main
from focus_ray.cluster.evaluation import evaluate_bundles
from focus_ray.cluster.training import train
from focus_ray.config import Config, TrackerConfig, parse_config
from focus_ray.errors import ConfigError, MissingPackageError, TrainingError
from focus_ray.kinds import METRICS, TRACKERS
from focus_ray.storage import remove_file
from focus_ray.sweep.driver import resume, sweep
from focus_ray.sweep.settings import parse_sweep
from focus_ray.tracking.base import Picture, Subject, parameters_of
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.runs import TrainingRecord

PLAIN = {"image_alignment": {"group": "none"}}
EPOCHS = 2
HERE = {"local": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def config_of(
    uri: str,
    storage: Path | str,
    trackers: Mapping[str, Any],
    categories: Sequence[str] = CATEGORIES,
    **sections: Any,
) -> Config:
    """A training in this process, unless told."""
    given = {"data": {"categories": list(categories)}, "model": PLAIN, "cluster": HERE, **sections}
    tree = small_config(uri, storage, **given).model_dump(mode="json")
    return parse_config({**tree, "trackers": dict(trackers)})


class Run:
    """Two categories trained with all three trackers, of which one was lost and trained again, and then evaluated."""

    def __init__(self, data: str, storage: Path) -> None:
        self.storage, self.lines = storage, []
        self.config = config_of(
            data, storage, {"mlflow": {}, "tensorboard": {}, "wandb": {"num_images": 3}}, train={"epochs": EPOCHS}
        )
        self.bundles = train(self.config, log=self.lines.append)
        self.manifests = {category: read_manifest(place) for category, place in self.bundles.items()}
        remove_file(f"{self.bundles['gear']}/manifest.json")
        train(self.config, resume=True, log=self.lines.append)
        report = evaluate_bundles(
            self.bundles, str(storage / "report"), max_side_px=64, exact_pixels=10**9, log=self.lines.append
        )
        self.results = report.results


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    for package in ("mlflow", "tensorboardX", "wandb"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        return Run(data, tmp_path_factory.mktemp("runs"))


def losses(run: Run, category: str) -> dict[int, float]:
    """Epoch, from 1, -> loss, as the bundle has it."""
    return {int(one["epoch"]) + 1: one["loss"] for one in run.manifests[category]["metrics"]["history"]}


def test_a_run_tells_where_it_is_recorded_and_no_tracker_failed(run: Run) -> None:
    told = [line for line in run.lines if line.startswith("mlflow: recording to sqlite:///")]
    assert len(told) == 3  # training, resumed training, evaluation
    assert [line for line in run.lines if "WARNING" in line] == []


# MLflow


def mlflow_runs(storage: Path, project: str = "focus-ray") -> tuple[Any, dict[str, Any]]:
    """A client of the local store, and its runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/trackers/mlflow/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    names = [one.info.run_name for one in found]
    assert len(set(names)) == len(names), "a subject has one run"
    return client, dict(zip(names, found, strict=True))


def test_mlflow_has_a_run_a_category_below_one_of_the_training(run: Run) -> None:
    _, found = mlflow_runs(run.storage)
    assert set(found) == {"small", "small/board", "small/gear"}
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    for category in CATEGORIES:
        tags = found[f"small/{category}"].data.tags
        assert tags["mlflow.parentRunId"] == found["small"].info.run_id
        assert (tags["category"], tags["bundle"]) == (category, run.bundles[category])
        assert tags["data_fingerprint"] == run.manifests[category]["data"]["fingerprint"]
        assert tags["bundle_version"] == read_manifest(run.bundles[category])["sha256"]
        assert tags["focus_ray"]


def test_mlflow_has_settings_curves_and_figures_once_though_the_run_was_resumed(run: Run) -> None:
    client, found = mlflow_runs(run.storage)
    for category in CATEGORIES:
        mine = found[f"small/{category}"]
        assert mine.data.params["model.image_size_px"] == "64"
        assert mine.data.params["density.layers"] == '["layer1", "layer2", "layer3"]'
        curve = [(one.step, one.value) for one in client.get_metric_history(mine.info.run_id, "train/loss")]
        assert curve == list(losses(run, category).items())
        for key in METRICS:
            assert mine.data.metrics[f"test/{key}"] == run.results[category][key]
        assert mine.data.metrics["seconds/total"] > 0
    means = found["small"].data.metrics
    wanted = sum(run.results[category]["image_auroc"] for category in CATEGORIES) / len(CATEGORIES)
    assert means["test/image_auroc"] == pytest.approx(wanted)


def test_mlflow_has_heat_maps_with_their_captions(run: Run) -> None:
    client, found = mlflow_runs(run.storage)
    run_id = found["small/gear"].info.run_id
    files = [Path(one.path).name for one in client.list_artifacts(run_id, "heat_maps")]
    assert len([name for name in files if name.endswith(".jpg")]) == TrackerConfig().num_images
    captions = Path(client.download_artifacts(run_id, "heat_maps/captions.txt")).read_text()
    assert "times the threshold" in captions


# TensorBoard


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard_has_curves_figures_and_heat_maps(run: Run) -> None:
    pytest.importorskip("tensorboard")
    for category in CATEGORIES:
        events = events_of(run.storage / "trackers/tensorboard/small" / category)
        curve = {one.step: one.value for one in events.Scalars("train/loss")}
        assert curve == pytest.approx(losses(run, category), rel=1e-6)
        (last,) = events.Scalars("test/image_auroc")
        assert last.value == pytest.approx(run.results[category]["image_auroc"])
        images = [tag for tag in events.Tags()["images"] if tag.startswith("heat_maps/")]
        assert len(images) == TrackerConfig().num_images
        (image,) = events.Images(images[0])
        assert (image.width, image.height) == (128, 64)  # the image and its heat map
        assert "_hparams_/session_start_info" in events.summary_metadata


# Weights & Biases: its offline files are LevelDB's log of its own messages


def wandb_records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content, block, head = file.read_bytes(), 32768, 7
    assert content[:4] == b":W&B"
    at, whole = head, b""
    while at < len(content):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + head])
        whole += content[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_runs(storage: Path) -> dict[str, dict[str, Any]]:
    """Name -> what all offline files of a run hold together, as a sync joins them."""
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(storage.glob("trackers/wandb/wandb/offline-run-*/*.wandb")):
        mine: dict[str, Any] = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                mine = runs.setdefault(
                    record.run.display_name, {"history": [], "summary": {}, "config": {}, "ids": set()}
                )
                mine["ids"].add(record.run.run_id)
                mine["group"] = record.run.run_group
            if kind in ("run", "config"):
                update = record.run.config.update if kind == "run" else record.config.update
                mine["config"].update({one.key: json.loads(one.value_json) for one in update if one.key})
            if kind == "summary":
                mine["summary"].update(
                    {one.key: json.loads(one.value_json) for one in record.summary.update if one.key}
                )
            if kind == "history":
                items = record.history.item
                mine["history"].append({"/".join(one.nested_key): json.loads(one.value_json) for one in items})
    return runs


def test_wandb_has_a_run_a_category_in_one_group_in_offline_files(run: Run) -> None:
    found = wandb_runs(run.storage)
    assert set(found) == {"small", "small/board", "small/gear"}
    for category in CATEGORIES:
        mine = found[f"small/{category}"]
        assert mine["group"] == "small"
        assert len(mine["ids"]) == 1  # resumed and evaluated under its first id
        assert mine["config"]["model.image_size_px"] == 64
        assert mine["config"]["tags"]["bundle"] == run.bundles[category]
        curve = {one["step"]: one["train/loss"] for one in mine["history"] if "train/loss" in one}
        assert curve == losses(run, category)
        assert mine["summary"]["test/recall"] == run.results[category]["recall"]
        (images,) = [one for one in mine["history"] if "heat_maps/count" in one]
        assert images["heat_maps/count"] == 3


# Where a tracker fails


class Fragile:
    """A tracker of its own file: it keeps what it is told, and fails at a figure that it is told to fail at."""

    def __init__(self, breaks_at: str | None = None) -> None:
        self.told: list[tuple[str, str]] = []
        self.breaks_at = breaks_at

    def check(self, settings: TrackerConfig, storage: str) -> str:
        return "memory"

    def open(self, settings: TrackerConfig, storage: str) -> Fragile:
        return self

    def has(self, subject: Subject) -> bool:
        return False

    def begin(self, subject: Subject) -> FragileRun:
        return FragileRun(self, subject.name)


class FragileRun:
    def __init__(self, tracker: Fragile, name: str) -> None:
        self.tracker, self.name = tracker, name

    def _tell(self, what: str) -> None:
        if what == self.tracker.breaks_at:
            raise ConnectionError("the server is gone")
        self.tracker.told.append((self.name, what))

    def tag(self, tags: Mapping[str, str]) -> None:
        self._tell("tag")

    def curve(self, step: int, figures: Mapping[str, float]) -> None:
        self._tell(f"curve {step}")

    def figures(self, figures: Mapping[str, float]) -> None:
        self._tell("figures")

    def pictures(self, pictures: Sequence[Picture]) -> None:
        self._tell("pictures")

    def end(self, failed: bool) -> None:
        self._tell("failed" if failed else "end")


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Fragile:
    """A fourth tracker: a file, here this one, and a line in the table."""
    made = Fragile()
    monkeypatch.setattr(sys.modules[__name__], "FRAGILE", made, raising=False)
    monkeypatch.setitem(TRACKERS.places, "fragile", f"{__name__}:FRAGILE")
    return made


def test_a_fourth_tracker_is_a_file_and_a_line(fragile: Fragile, data: str, tmp_path: Path) -> None:
    config = config_of(data, tmp_path, {"fragile": {}}, ["gear"], train={"epochs": 1})
    train(config)
    assert fragile.told == [("small/gear", what) for what in ("curve 1", "figures", "tag", "end")]


def test_a_tracker_that_fails_is_told_of_once_and_the_training_goes_on(
    fragile: Fragile, data: str, tmp_path: Path
) -> None:
    fragile.breaks_at = "figures"
    lines: list[str] = []
    bundles = train(config_of(data, tmp_path, {"fragile": {}}), log=lines.append)
    assert set(bundles) == set(CATEGORIES)
    warnings = [line for line in lines if "WARNING" in line]
    assert warnings == [
        "WARNING: fragile has failed and records nothing more of this run, which goes on: ConnectionError: the server is gone"
    ]
    assert fragile.told == []


def test_a_category_that_fails_is_recorded_as_failed(fragile: Fragile, data: str, tmp_path: Path) -> None:
    config = config_of(data, tmp_path, {"fragile": {}}, ["gear"], train={"epochs": 1})
    broken = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate_head": 1e30})})
    with pytest.raises(TrainingError, match="1 of 1 categories failed"):
        train(broken)
    assert fragile.told[-2:] == [("small/gear", "tag"), ("small/gear", "failed")]


def test_a_bundle_that_cannot_be_read_costs_its_figures_and_no_training(fragile: Fragile, tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text("{}")
    lines: list[str] = []
    recorder = Recorder({"fragile": TrackerConfig()}, str(tmp_path), lines.append)
    told = TrainingRecord(recorder, config_of("parts", tmp_path, {"fragile": {}}), str(tmp_path), {}, several=False)
    told.epoch("gear", {"epoch": 0, "loss": 1.0})
    told.trained("gear", str(tmp_path / "gone"))
    told.close(failed=False)
    assert fragile.told == [("small/gear", what) for what in ("curve 1", "end")]
    assert [line for line in lines if line.startswith("WARNING: gear: not everything was recorded: FileNotFoundError")]


def test_a_store_that_is_gone_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines: list[str] = []
    recorder = Recorder({"mlflow": TrackerConfig()}, str(tmp_path), lines.append)
    (tmp_path / "trackers/mlflow/mlflow.db").write_bytes(b"not a database" * 1000)
    subject = Subject("0", "line/gear")
    for step in range(3):
        recorder.curve(subject, step, {"train/loss": 1.0})
    recorder.close()
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "mlflow has failed and records nothing more of this run, which goes on" in warning


# Before a training begins


@pytest.mark.parametrize(
    ("kind", "package"), [("mlflow", "mlflow"), ("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_is_told_before_anything_is_made(
    kind: str, package: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"trackers.{kind} needs {package}, .*: pip install 'focus-ray\[{kind}\]'"
    ):
        train(config_of(data, tmp_path / "runs", {kind: {}}))
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_made(data: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trackers.tensorboard: .*/file/board cannot be written"):
        train(config_of(data, tmp_path / "runs", {"tensorboard": {"uri": str(tmp_path / "file/board")}}))
    assert not (tmp_path / "runs").exists()


def test_a_server_that_does_not_answer_is_told_before_anything_is_made(data: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    port = free_port()
    with pytest.raises(ConfigError, match=rf"trackers.mlflow: the server at 127.0.0.1:{port} does not answer"):
        train(config_of(data, tmp_path / "runs", {"mlflow": {"uri": f"http://127.0.0.1:{port}"}}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_storage_on_s3_needs_a_place_for_files(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip({"tensorboard": "tensorboardX"}.get(kind, kind))
    with pytest.raises(
        ConfigError, match=rf"is no folder of this machine: set trackers.{kind}.uri to one, since storage"
    ):
        Recorder({kind: TrackerConfig()}, "s3://plant/runs", print)


def test_online_without_a_key_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(
        ConfigError, match=r"set the environment variable WANDB_API_KEY, or trackers\.wandb\.mode=offline"
    ):
        Recorder({"wandb": TrackerConfig(mode="online")}, str(tmp_path), print)


def test_doctor_checks_trackers(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from focus_ray.doctor.checks import read_context
    from focus_ray.doctor.diagnosis import run_checks
    from focus_ray.doctor.resources import check_trackers

    pytest.importorskip("tensorboardX")
    words = [f"data.uri={data}", f"storage={tmp_path}", "trackers.tensorboard={}"]
    (diagnosis,) = run_checks({"trackers": check_trackers}, read_context("default", words))
    assert (diagnosis.status, diagnosis.message) == ("ok", f"tensorboard: {tmp_path}/trackers/tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    (diagnosis,) = run_checks({"trackers": check_trackers}, read_context("default", words))
    assert diagnosis.status == "FAILED"
    assert "focus-ray[tensorboard]" in diagnosis.message


# What may be asked for


@pytest.mark.parametrize("uri", ["http://me:secret@host:5000", "https://secret@host", "postgresql://u:p@host/db"])
def test_a_uri_with_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="holds a user or password") as caught:
        parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": {"uri": uri}}})
    assert "secret" not in str(caught.value)


def test_a_tracker_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracker 'mlfow' is not known: did you mean 'mlflow'\?"):
        parse_config({"data": {"uri": "x"}, "trackers": {"mlfow": {}}})
    assert parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": None}}).trackers == {"mlflow": TrackerConfig()}


def test_parameters_show_no_password_of_a_uri() -> None:
    found = parameters_of({"model": {"weights": "https://me:secret@host/w.pth", "tiling": None}, "a": [1, 2]})
    assert found == {"model.weights": "https://host/w.pth", "a": "[1, 2]"}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:se@cret@host/w.pth", "https://host/w.pth"),
        ("https://host/w.pth?X-Amz-Credential=secret&X-Amz-Signature=secret", "https://host/w.pth"),
        ("s3://plant/w@2.pth", "s3://plant/w@2.pth"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("what?/w@2.pth", "what?/w@2.pth"),
    ],
)
def test_parameters_show_nothing_of_a_uri_that_opens_it(uri: str, shown: str) -> None:
    assert parameters_of({"weights": uri, "bundles": [uri]}) == {"weights": shown, "bundles": json.dumps([shown])}


def test_the_password_of_mlflows_own_variable_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/runs")
    assert TRACKERS["mlflow"].check(TrackerConfig(), "runs") == "postgresql://127.0.0.1:9/runs"


# An evaluation of what was trained without


def test_an_evaluation_records_where_it_is_told_to(fragile: Fragile, data: str, tmp_path: Path) -> None:
    place = make_bundle(small_config(data, tmp_path / "runs", model=PLAIN))
    assert main(["evaluate", place, "trackers.fragile={}", "--output", str(tmp_path / "report")]) == 0
    assert fragile.told == [("small/gear", what) for what in ("tag", "figures", "pictures", "end")]


def test_an_evaluation_takes_no_other_setting(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = make_bundle(small_config(data, tmp_path / "runs", model=PLAIN))
    assert main(["evaluate", place, "train.epochs=3", "--output", str(tmp_path / "report")]) == 1
    assert "an evaluation takes settings of trackers alone" in capsys.readouterr().err


def test_an_evaluation_goes_on_without_what_only_its_training_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    lines: list[str] = []
    one = {"gear": run.bundles["gear"]}
    report = evaluate_bundles(one, str(tmp_path), max_side_px=64, exact_pixels=10**9, log=lines.append)
    assert report.results["gear"]["image_auroc"] == run.results["gear"]["image_auroc"]
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "not recorded as the training was: trackers.mlflow needs mlflow" in warning


# On Ray


@pytest.mark.ray
@pytest.mark.slow
def test_epochs_of_ray_train_are_told_while_it_trains(
    ray_cluster: None, fragile: Fragile, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingRecord, "trained", lambda *given: None)  # which would make up for what was not told
    config = config_of(
        data,
        tmp_path,
        {"tensorboard": {}, "fragile": {}},
        ["gear"],
        train={"epochs": EPOCHS},
        cluster={"local": False, "num_workers": 2},
    )
    bundles = train(config)
    told = [what for name, what in fragile.told if what.startswith("curve")]
    assert told == ["curve 1", "curve 2"]
    history = read_manifest(bundles["gear"])["metrics"]["history"]
    curve = {
        one.step: one.value for one in events_of(tmp_path / "trackers/tensorboard/small/gear").Scalars("train/loss")
    }
    assert curve == pytest.approx({int(one["epoch"]) + 1: one["loss"] for one in history}, rel=1e-6)


@pytest.mark.ray
def test_a_pool_tells_what_one_process_tells(ray_cluster: None, fragile: Fragile, data: str, tmp_path: Path) -> None:
    told = {}
    for place in (True, False):
        fragile.told = []
        train(config_of(data, tmp_path / str(place), {"fragile": {}}, cluster={"local": place}))
        told[place] = sorted(fragile.told)
    assert told[True] == told[False]
    assert ("small/gear", "figures") in told[True]


@pytest.mark.ray
def test_a_sweep_has_a_run_a_trial_below_its_own(ray_cluster: None, data: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = config_of(data, tmp_path, {"mlflow": {"project": "sweeps"}}, ["gear"], density={"coreset": 0})
    tree = config.model_dump(mode="json")
    space = {"density.num_channels": [4, 8]}
    outcome = sweep(parse_sweep({"base": tree, "space": space, "searcher": "grid", "name": "found"}))
    _, found = mlflow_runs(tmp_path, "sweeps")
    assert set(found) == {"found", "found/00000", "found/00001"}
    for record in outcome.records:
        mine = found[f"found/{record.name}"].data
        assert mine.tags["mlflow.parentRunId"] == found["found"].info.run_id
        assert mine.params == {"density.num_channels": str(record.point["density.num_channels"])}
        assert mine.metrics["score"] == mine.metrics["score/gear"] == record.score
        assert mine.tags["status"] == "finished"
    best = outcome.best[None]
    assert found["found"].data.metrics["best/score"] == best.score
    assert found["found"].data.tags["best_trial"] == str(best.number)
    assert resume(outcome.root).records == outcome.records  # nothing is left to do, and nothing is told twice
    again = {name: (one.info.run_id, one.data.metrics) for name, one in mlflow_runs(tmp_path, "sweeps")[1].items()}
    assert again == {name: (one.info.run_id, one.data.metrics) for name, one in found.items()}
