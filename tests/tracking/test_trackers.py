"""Trackers with real stores: MLflow, TensorBoard and W&B's own formats are read back after a training, an evaluation and a sweep.

The file is long because its tests share fixtures that take seconds.
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
from focus_ray.errors import ConfigError, MissingPackageError, TrainingError
from focus_ray.evaluation.run import evaluate_bundles
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.settings.kinds import METRICS, TRACKERS
from focus_ray.storage.files import remove_file
from focus_ray.sweep.driver import resume_sweep, run_sweep
from focus_ray.sweep.settings import parse_sweep
from focus_ray.tracking.base import Picture, RunDescription, flatten_parameters
from focus_ray.tracking.recorder import MAX_PICTURES, Recorder
from focus_ray.tracking.runs import TrainingRecorder
from focus_ray.tracking.settings import TrackerConfig
from focus_ray.training.training import train

UNALIGNED_MODEL = {"image_alignment": {"group": "none"}}
EPOCHS = 2
LOCAL = {"local": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the URI of a small data set."""
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def make_config(
    uri: str,
    storage: Path | str,
    trackers: Mapping[str, Any],
    categories: Sequence[str] = CATEGORIES,
    **sections: Any,
) -> Config:
    """Returns the configuration of a short training in this process, unless `sections` says otherwise."""
    settings = {"data": {"categories": list(categories)}, "model": UNALIGNED_MODEL, "cluster": LOCAL, **sections}
    tree = small_config(uri, storage, **settings).model_dump(mode="json")
    return parse_config({**tree, "trackers": dict(trackers)})


class RecordedRun:
    """A training of two categories with all three trackers, resumed after one bundle was lost, and then evaluated."""

    def __init__(self, data: str, storage: Path) -> None:
        self.storage, self.lines = storage, []
        self.config = make_config(
            data, storage, {"mlflow": {}, "tensorboard": {}, "wandb": {}}, train={"epochs": EPOCHS}
        )
        self.bundles = train(self.config, log=self.lines.append)
        self.manifests = {category: read_manifest(bundle) for category, bundle in self.bundles.items()}
        remove_file(f"{self.bundles['gear']}/manifest.json")
        train(self.config, resume=True, log=self.lines.append)
        report = evaluate_bundles(
            self.bundles, str(storage / "report"), max_side_px=64, exact_pixels=10**9, log=self.lines.append
        )
        self.results = report.results


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Trains, resumes and evaluates once for all tests of this file."""
    for package in ("mlflow", "tensorboardX", "wandb"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        return RecordedRun(data, tmp_path_factory.mktemp("runs"))


def losses(run: RecordedRun, category: str) -> dict[int, float]:
    """Returns the losses in the bundle's manifest: epoch from 1 -> loss."""
    return {int(entry["epoch"]) + 1: entry["loss"] for entry in run.manifests[category]["metrics"]["history"]}


def test_a_run_logs_where_it_is_recorded_and_no_tracker_fails(run: RecordedRun) -> None:
    locations = [line for line in run.lines if line.startswith("mlflow: recording to sqlite:///")]
    assert len(locations) == 3  # training, resumed training, evaluation
    assert [line for line in run.lines if "WARNING" in line] == []


# MLflow


def mlflow_runs(storage: Path, project: str = "focus-ray") -> tuple[Any, dict[str, Any]]:
    """Returns a client of the local store, and its runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/trackers/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(set(names)) == len(names), "every name has one run"
    return client, dict(zip(names, runs, strict=True))


def test_mlflow_has_one_run_per_category_below_the_run_of_the_training(run: RecordedRun) -> None:
    _, runs = mlflow_runs(run.storage)
    assert set(runs) == {"small", "small/board", "small/gear"}
    assert {mlflow_run.info.status for mlflow_run in runs.values()} == {"FINISHED"}
    for category in CATEGORIES:
        tags = runs[f"small/{category}"].data.tags
        assert tags["mlflow.parentRunId"] == runs["small"].info.run_id
        assert (tags["category"], tags["bundle"]) == (category, run.bundles[category])
        assert tags["data_fingerprint"] == run.manifests[category]["data"]["fingerprint"]
        assert tags["bundle_version"] == read_manifest(run.bundles[category])["sha256"]
        assert tags["focus_ray"]


def test_mlflow_has_settings_curves_and_metrics_once_although_the_run_was_resumed(run: RecordedRun) -> None:
    client, runs = mlflow_runs(run.storage)
    for category in CATEGORIES:
        category_run = runs[f"small/{category}"]
        assert category_run.data.params["model.image_size_px"] == "64"
        assert category_run.data.params["density.layers"] == '["layer1", "layer2", "layer3"]'
        curve = [
            (point.step, point.value) for point in client.get_metric_history(category_run.info.run_id, "train/loss")
        ]
        assert curve == list(losses(run, category).items())
        for key in METRICS:
            assert category_run.data.metrics[f"test/{key}"] == run.results[category][key]
        assert category_run.data.metrics["seconds/total"] > 0
    means = runs["small"].data.metrics
    expected_mean = sum(run.results[category]["image_auroc"] for category in CATEGORIES) / len(CATEGORIES)
    assert means["test/image_auroc"] == pytest.approx(expected_mean)


def test_mlflow_has_heat_maps_with_their_captions(run: RecordedRun) -> None:
    client, runs = mlflow_runs(run.storage)
    run_id = runs["small/gear"].info.run_id
    files = [Path(artifact.path).name for artifact in client.list_artifacts(run_id, "heat_maps")]
    assert len([name for name in files if name.endswith(".jpg")]) == MAX_PICTURES
    captions = Path(client.download_artifacts(run_id, "heat_maps/captions.txt")).read_text()
    assert "times the threshold" in captions


# TensorBoard


def read_events(folder: Path) -> Any:
    """Returns the loaded TensorBoard events of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard_has_curves_metrics_and_heat_maps(run: RecordedRun) -> None:
    pytest.importorskip("tensorboard")
    for category in CATEGORIES:
        events = read_events(run.storage / "trackers/tensorboard/small" / category)
        curve = {event.step: event.value for event in events.Scalars("train/loss")}
        assert curve == pytest.approx(losses(run, category), rel=1e-6)
        (last,) = events.Scalars("test/image_auroc")
        assert last.value == pytest.approx(run.results[category]["image_auroc"])
        images = [tag for tag in events.Tags()["images"] if tag.startswith("heat_maps/")]
        assert len(images) == MAX_PICTURES
        (image,) = events.Images(images[0])
        assert (image.width, image.height) == (128, 64)  # the image and its heat map
        assert "_hparams_/session_start_info" in events.summary_metadata


# Weights & Biases: its offline files are logs in the format of LevelDB with protobuf messages


def wandb_records(file: Path) -> Iterator[Any]:
    """Yields the messages in an offline file: LevelDB splits long messages into parts within blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, block_bytes, header_bytes = file.read_bytes(), 32768, 7
    assert content[:4] == b":W&B"
    position, message = header_bytes, b""
    while position < len(content):
        if block_bytes - position % block_bytes < header_bytes:
            position += block_bytes - position % block_bytes
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + header_bytes])
        message += content[position + header_bytes : position + header_bytes + length]
        position += header_bytes + length
        if kind in (1, 4):  # a complete message, or the last part
            record = Record()
            record.ParseFromString(message)
            message = b""
            yield record


def wandb_runs(storage: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> content of all offline files of a run, joined as `wandb sync` joins them."""
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(storage.glob("trackers/wandb/wandb/offline-run-*/*.wandb")):
        run: dict[str, Any] = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = runs.setdefault(
                    record.run.display_name, {"history": [], "summary": {}, "config": {}, "ids": set()}
                )
                run["ids"].add(record.run.run_id)
                run["group"] = record.run.run_group
            if kind in ("run", "config"):
                update = record.run.config.update if kind == "run" else record.config.update
                run["config"].update({item.key: json.loads(item.value_json) for item in update if item.key})
            if kind == "summary":
                run["summary"].update(
                    {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
                )
            if kind == "history":
                items = record.history.item
                run["history"].append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return runs


def test_wandb_has_one_run_per_category_in_one_group_in_offline_files(run: RecordedRun) -> None:
    runs = wandb_runs(run.storage)
    assert set(runs) == {"small", "small/board", "small/gear"}
    for category in CATEGORIES:
        wandb_run = runs[f"small/{category}"]
        assert wandb_run["group"] == "small"
        assert len(wandb_run["ids"]) == 1  # the resumed training and the evaluation use the first id
        assert wandb_run["config"]["model.image_size_px"] == 64
        assert wandb_run["config"]["tags"]["bundle"] == run.bundles[category]
        curve = {entry["step"]: entry["train/loss"] for entry in wandb_run["history"] if "train/loss" in entry}
        assert curve == losses(run, category)
        assert wandb_run["summary"]["test/recall"] == run.results[category]["recall"]
        (images,) = [entry for entry in wandb_run["history"] if "heat_maps/count" in entry]
        assert images["heat_maps/count"] == MAX_PICTURES


# A tracker that fails


class FakeTracker:
    """A tracker that keeps its calls in memory. It fails at the call `fails_at`."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails_at = fails_at

    def check(self, settings: TrackerConfig, storage: str) -> str:
        return "memory"

    def open(self, settings: TrackerConfig, storage: str) -> FakeTracker:
        return self

    def has_run(self, run: RunDescription) -> bool:
        return False

    def begin_run(self, run: RunDescription) -> FakeRun:
        return FakeRun(self, run.name)


class FakeRun:
    """A run that appends (its name, name of the call) to the calls of its tracker."""

    def __init__(self, tracker: FakeTracker, name: str) -> None:
        self.tracker, self.name = tracker, name

    def _add_call(self, call: str) -> None:
        if call == self.tracker.fails_at:
            raise ConnectionError("the server is gone")
        self.tracker.calls.append((self.name, call))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._add_call("tags")

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add_call(f"step {step}")

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._add_call("metrics")

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        self._add_call("pictures")

    def end(self, failed: bool) -> None:
        self._add_call("failed" if failed else "end")


@pytest.fixture
def fake_tracker(monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    """Registers a fourth tracker, as its own file and its line in the table would do."""
    tracker = FakeTracker()
    monkeypatch.setattr(sys.modules[__name__], "FAKE_TRACKER", tracker, raising=False)
    monkeypatch.setitem(TRACKERS.import_paths, "fake", f"{__name__}:FAKE_TRACKER")
    return tracker


def test_a_fourth_tracker_needs_only_a_file_and_a_line(fake_tracker: FakeTracker, data: str, tmp_path: Path) -> None:
    config = make_config(data, tmp_path, {"fake": {}}, ["gear"], train={"epochs": 1})
    train(config)
    assert fake_tracker.calls == [("small/gear", call) for call in ("step 1", "metrics", "tags", "end")]


def test_a_tracker_that_fails_is_reported_once_and_the_training_goes_on(
    fake_tracker: FakeTracker, data: str, tmp_path: Path
) -> None:
    fake_tracker.fails_at = "metrics"
    lines: list[str] = []
    bundles = train(make_config(data, tmp_path, {"fake": {}}), log=lines.append)
    assert set(bundles) == set(CATEGORIES)
    (warning,) = [line for line in lines if "WARNING" in line]
    assert warning.startswith("WARNING: fake failed")
    assert warning.endswith("ConnectionError: the server is gone")
    assert fake_tracker.calls == []


def test_a_category_that_fails_is_recorded_as_failed(fake_tracker: FakeTracker, data: str, tmp_path: Path) -> None:
    config = make_config(data, tmp_path, {"fake": {}}, ["gear"], train={"epochs": 1})
    diverging = config.model_copy(
        update={"train": config.train.model_copy(update={"learning_rate": 10.0, "lambda_fine": 1e38})}
    )
    with pytest.raises(TrainingError, match="1 of 1 categories failed"):
        train(diverging)
    assert fake_tracker.calls[-2:] == [("small/gear", "tags"), ("small/gear", "failed")]


def test_an_unreadable_bundle_loses_only_its_metrics(fake_tracker: FakeTracker, tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text("{}")
    lines: list[str] = []
    recorder = Recorder({"fake": TrackerConfig()}, str(tmp_path), lines.append)
    training_recorder = TrainingRecorder(
        recorder, make_config("parts", tmp_path, {"fake": {}}), str(tmp_path), {}, has_group=False
    )
    training_recorder.log_epoch("gear", {"epoch": 0, "loss": 1.0})
    training_recorder.finish_category("gear", str(tmp_path / "missing"))
    training_recorder.close(failed=False)
    assert fake_tracker.calls == [("small/gear", call) for call in ("step 1", "end")]
    assert [line for line in lines if line.startswith("WARNING: gear: ")]


def test_a_broken_store_gives_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines: list[str] = []
    recorder = Recorder({"mlflow": TrackerConfig()}, str(tmp_path), lines.append)
    (tmp_path / "trackers/mlflow/mlflow.db").write_bytes(b"not a database" * 1000)
    run = RunDescription("0", "line/gear")
    for step in range(3):
        recorder.log_step(run, step, {"train/loss": 1.0})
    recorder.close()
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "mlflow failed" in warning


# Checks before a training begins


@pytest.mark.parametrize(
    ("kind", "package"), [("mlflow", "mlflow"), ("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_is_reported_before_anything_is_written(
    kind: str, package: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"trackers.{kind} needs {package}.*focus-ray\[{kind}\]"):
        train(make_config(data, tmp_path / "runs", {kind: {}}))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_written(data: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trackers\.tensorboard: .*/file/board"):
        train(make_config(data, tmp_path / "runs", {"tensorboard": {"uri": str(tmp_path / "file/board")}}))
    assert not (tmp_path / "runs").exists()


def test_a_server_that_does_not_answer_is_reported_before_anything_is_written(data: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    port = free_port()
    with pytest.raises(ConfigError, match=rf"trackers\.mlflow: .* 127\.0\.0\.1:{port}"):
        train(make_config(data, tmp_path / "runs", {"mlflow": {"uri": f"http://127.0.0.1:{port}"}}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_storage_on_s3_needs_a_folder_for_trackers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip({"tensorboard": "tensorboardX"}.get(kind, kind))
    with pytest.raises(ConfigError, match=rf"set trackers\.{kind}\.uri"):
        Recorder({kind: TrackerConfig()}, "s3://plant/runs", print)


def test_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
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


# Settings


@pytest.mark.parametrize("uri", ["http://me:secret@host:5000", "https://secret@host", "postgresql://u:p@host/db"])
def test_a_uri_with_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="user or password") as caught:
        parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": {"uri": uri}}})
    assert "secret" not in str(caught.value)


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mlfow' .*'mlflow'"):
        parse_config({"data": {"uri": "x"}, "trackers": {"mlfow": {}}})
    assert parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": None}}).trackers == {"mlflow": TrackerConfig()}


def test_parameters_contain_no_password_of_a_uri() -> None:
    parameters = flatten_parameters({"model": {"weights": "https://me:secret@host/w.pth", "tiling": None}, "a": [1, 2]})
    assert parameters == {"model.weights": "https://host/w.pth", "a": "[1, 2]"}


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
def test_parameters_contain_no_secret_of_a_uri(uri: str, shown: str) -> None:
    assert flatten_parameters({"weights": uri, "bundles": [uri]}) == {"weights": shown, "bundles": json.dumps([shown])}


def test_the_password_in_mlflows_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/runs")
    assert TRACKERS["mlflow"].check(TrackerConfig(), "runs") == "postgresql://127.0.0.1:9/runs"


# Evaluations


def test_an_evaluation_records_to_the_tracker_on_its_command_line(
    fake_tracker: FakeTracker, data: str, tmp_path: Path
) -> None:
    bundle = make_bundle(small_config(data, tmp_path / "runs", model=UNALIGNED_MODEL))
    assert main(["evaluate", bundle, "trackers.fake={}", "--output", str(tmp_path / "report")]) == 0
    assert fake_tracker.calls == [("small/gear", call) for call in ("tags", "metrics", "pictures", "end")]


def test_an_evaluation_takes_only_settings_of_trackers(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(small_config(data, tmp_path / "runs", model=UNALIGNED_MODEL))
    assert main(["evaluate", bundle, "train.epochs=3", "--output", str(tmp_path / "report")]) == 1
    assert "an evaluation accepts only settings of trackers" in capsys.readouterr().err


def test_an_evaluation_goes_on_without_a_tracker_of_its_training(
    run: RecordedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    lines: list[str] = []
    bundles = {"gear": run.bundles["gear"]}
    report = evaluate_bundles(bundles, str(tmp_path), max_side_px=64, exact_pixels=10**9, log=lines.append)
    assert report.results["gear"]["image_auroc"] == run.results["gear"]["image_auroc"]
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "trackers of the training: trackers.mlflow needs mlflow" in warning


# On Ray


@pytest.mark.ray
@pytest.mark.slow
def test_epochs_of_ray_train_are_recorded_during_the_training(
    ray_cluster: None, fake_tracker: FakeTracker, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # finish_category would add epochs that were not recorded before.
    monkeypatch.setattr(TrainingRecorder, "finish_category", lambda *arguments: None)
    config = make_config(
        data,
        tmp_path,
        {"tensorboard": {}, "fake": {}},
        ["gear"],
        train={"epochs": EPOCHS},
        cluster={"local": False, "num_workers": 2},
    )
    bundles = train(config)
    steps = [call for name, call in fake_tracker.calls if call.startswith("step")]
    assert steps == ["step 1", "step 2"]
    history = read_manifest(bundles["gear"])["metrics"]["history"]
    curve = {
        event.step: event.value
        for event in read_events(tmp_path / "trackers/tensorboard/small/gear").Scalars("train/loss")
    }
    assert curve == pytest.approx({int(entry["epoch"]) + 1: entry["loss"] for entry in history}, rel=1e-6)


@pytest.mark.ray
def test_a_pool_records_the_same_as_one_process(
    ray_cluster: None, fake_tracker: FakeTracker, data: str, tmp_path: Path
) -> None:
    calls = {}
    for is_local in (True, False):
        fake_tracker.calls = []
        train(make_config(data, tmp_path / str(is_local), {"fake": {}}, cluster={"local": is_local}))
        calls[is_local] = sorted(fake_tracker.calls)
    assert calls[True] == calls[False]
    assert ("small/gear", "metrics") in calls[True]


@pytest.mark.ray
def test_a_sweep_has_one_run_per_trial_below_its_run(ray_cluster: None, data: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = make_config(data, tmp_path, {"mlflow": {"project": "sweeps"}}, ["gear"], density={"coreset": 0})
    tree = config.model_dump(mode="json")
    space = {"density.num_channels": [4, 8]}
    outcome = run_sweep(parse_sweep({"base": tree, "space": space, "searcher": "grid", "name": "search"}))
    _, runs = mlflow_runs(tmp_path, "sweeps")
    assert set(runs) == {"search", "search/00000", "search/00001"}
    for record in outcome.records:
        trial = runs[f"search/{record.name}"].data
        assert trial.tags["mlflow.parentRunId"] == runs["search"].info.run_id
        assert trial.params == {"density.num_channels": str(record.point["density.num_channels"])}
        assert trial.metrics["score"] == trial.metrics["score/gear"] == record.score
        assert trial.tags["status"] == "finished"
    best = outcome.best[None]
    assert runs["search"].data.metrics["best/score"] == best.score
    assert runs["search"].data.tags["best_trial"] == str(best.number)
    assert resume_sweep(outcome.root).records == outcome.records  # no trial is left, and nothing is recorded twice
    resumed_runs = mlflow_runs(tmp_path, "sweeps")[1]
    resumed = {name: (run.info.run_id, run.data.metrics) for name, run in resumed_runs.items()}
    assert resumed == {name: (run.info.run_id, run.data.metrics) for name, run in runs.items()}
