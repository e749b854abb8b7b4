"""Trackers with real stores: MLflow, TensorBoard and W&B are read back after a training, an evaluation and a sweep."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from small_set import CATEGORIES, make_bundle, small_config

from focus_ray.bundle.bundle import read_manifest
from focus_ray.cli.main import main
from focus_ray.doctor.diagnosis import CheckContext, run_checks
from focus_ray.doctor.resources import check_trackers
from focus_ray.errors import ConfigError, MissingPackageError, TrainingError
from focus_ray.evaluation.run import evaluate_bundles
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.metrics.registry import METRICS
from focus_ray.storage.files import remove_file
from focus_ray.sweep.driver import resume_sweep, run_sweep
from focus_ray.sweep.settings import parse_sweep_config
from focus_ray.tracking.base import RunDescription, Tracker, flatten_parameters
from focus_ray.tracking.recorder import BackgroundRecorder
from focus_ray.tracking.registry import TRACKERS
from focus_ray.tracking.runs import MAX_PICTURES, TrainingRecorder
from focus_ray.tracking.settings import TrackerConfig
from focus_ray.training.training import train

STEPS = 2
LOCAL = {"local": True}


def make_config(
    uri: str,
    storage: Path | str,
    trackers: Mapping[str, Any],
    categories: Sequence[str] = CATEGORIES,
    **sections: Any,
) -> Config:
    """Returns the configuration of a short training in this process, unless `sections` says otherwise."""
    settings = {"data": {"categories": list(categories)}, "cluster": LOCAL, **sections}
    tree = small_config(uri, storage, **settings).model_dump(mode="json")
    return parse_config({**tree, "trackers": dict(trackers)})


class RecordedRun:
    """A training of two categories with all three trackers, resumed after one bundle was lost, and then evaluated."""

    def __init__(self, parts: str, storage: Path) -> None:
        self.storage, self.lines = storage, []
        trackers = {"mlflow": {}, "tensorboard": {}, "wandb": {}}
        self.config = make_config(parts, storage, trackers, train={"steps": STEPS})
        self.bundles = train(self.config, log=self.lines.append)
        self.manifests = {category: read_manifest(bundle) for category, bundle in self.bundles.items()}
        remove_file(f"{self.bundles['gear']}/manifest.json")
        train(self.config, resume=True, log=self.lines.append)
        self.results = self.evaluate(self.bundles, storage / "report", self.lines)

    def evaluate(self, bundles: Mapping[str, str], output: Path, lines: list[str]) -> dict[str, dict[str, Any]]:
        """Returns the results of an evaluation, which records in the trackers of the training."""
        return evaluate_bundles(bundles, str(output), max_side_px=64, exact_pixels=10**9, log=lines.append).results


@pytest.fixture(scope="module", autouse=True)
def _no_settings_of_the_user() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def run(parts: str, tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Trains, resumes and evaluates once for all tests of this file."""
    return RecordedRun(parts, tmp_path_factory.mktemp("runs"))


def read_manifest_losses(run: RecordedRun, category: str) -> dict[int, float]:
    """Returns the losses in the bundle's manifest: step from 1 -> loss."""
    return {int(entry["step"]): entry["loss"] for entry in run.manifests[category]["metrics"]["history"]}


def test_a_run_logs_where_it_is_recorded_and_no_tracker_fails(run: RecordedRun) -> None:
    num_recordings = sum(line.startswith("mlflow: recording to sqlite:///") for line in run.lines)
    assert num_recordings == 3  # training, resumed training, evaluation
    assert [line for line in run.lines if "WARNING" in line] == []


# MLflow


def read_mlflow_runs(storage: Path, project: str = "focus-ray") -> tuple[Any, dict[str, Any]]:
    """Returns a client of the local store, and its runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/trackers/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(set(names)) == len(names), "every name has one run"
    return client, dict(zip(names, runs, strict=True))


def test_mlflow_has_one_run_per_category_below_the_run_of_the_training(run: RecordedRun) -> None:
    _, runs = read_mlflow_runs(run.storage)
    assert set(runs) == {"small", "small/board", "small/gear"}
    assert {mlflow_run.info.status for mlflow_run in runs.values()} == {"FINISHED"}
    for category in CATEGORIES:
        tags = runs[f"small/{category}"].data.tags
        assert tags["mlflow.parentRunId"] == runs["small"].info.run_id
        assert (tags["category"], tags["bundle"]) == (category, run.bundles[category])
        assert tags["data_fingerprint"] == run.manifests[category]["data"]["fingerprint"]
        assert tags["bundle_version"] == read_manifest(run.bundles[category])["sha256"]


def test_mlflow_has_settings_curves_metrics_and_heat_maps_once_although_the_run_was_resumed(run: RecordedRun) -> None:
    client, runs = read_mlflow_runs(run.storage)
    for category in CATEGORIES:
        category_run = runs[f"small/{category}"]
        run_id, record = category_run.info.run_id, category_run.data
        assert record.params["model.image_size_px"] == "64"
        assert record.params["density.layers"] == '["layer1", "layer2", "layer3"]'
        curve = [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")]
        assert curve == list(read_manifest_losses(run, category).items())
        assert {key: record.metrics[f"test/{key}"] for key in METRICS} == {
            key: run.results[category][key] for key in METRICS
        }
        assert record.metrics["seconds/total"] > 0
        files = [Path(artifact.path).name for artifact in client.list_artifacts(run_id, "heat_maps")]
        assert len([name for name in files if name.endswith(".jpg")]) == MAX_PICTURES
    mean = sum(run.results[category]["image_auroc"] for category in CATEGORIES) / len(CATEGORIES)
    assert runs["small"].data.metrics["test/image_auroc"] == pytest.approx(mean)


# TensorBoard


def read_events(folder: Path) -> Any:
    """Returns the loaded TensorBoard events of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard_has_curves_metrics_and_heat_maps(run: RecordedRun) -> None:
    for category in CATEGORIES:
        events = read_events(run.storage / "trackers/tensorboard/small" / category)
        curve = {event.step: event.value for event in events.Scalars("train/loss")}
        assert curve == pytest.approx(read_manifest_losses(run, category), rel=1e-6)
        (last,) = events.Scalars("test/image_auroc")
        assert last.value == pytest.approx(run.results[category]["image_auroc"])
        images = [tag for tag in events.Tags()["images"] if tag.startswith("heat_maps/")]
        assert len(images) == MAX_PICTURES
        (image,) = events.Images(images[0])
        assert (image.width, image.height) == (128, 64)  # the image and its heat map
        assert "_hparams_/session_start_info" in events.summary_metadata


# Weights & Biases: its offline files are logs in the format of LevelDB with protobuf messages


def read_wandb_messages(file: Path) -> Iterator[Any]:
    """Yields the messages in an offline file: LevelDB splits long messages into parts within blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, block_bytes, header_bytes = file.read_bytes(), 32768, 7
    position, message = header_bytes, b""
    while position < len(content):
        if block_bytes - position % block_bytes < header_bytes:
            position += block_bytes - position % block_bytes
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + header_bytes])
        message += content[position + header_bytes : position + header_bytes + length]
        position += header_bytes + length
        if kind in (1, 4):  # a complete message, or the last part
            yield Record.FromString(message)
            message = b""


def read_wandb_runs(storage: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> content of all offline files of a run, joined as `wandb sync` joins them."""
    runs: dict[str, dict[str, Any]] = {}
    for file in sorted(storage.glob("trackers/wandb/wandb/offline-run-*/*.wandb")):
        run: dict[str, Any] = {}
        for record in read_wandb_messages(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                new_run = {"group": record.run.run_group, "history": [], "summary": {}, "config": {}, "ids": set()}
                run = runs.setdefault(record.run.display_name, new_run)
                run["ids"].add(record.run.run_id)
            if kind in ("run", "config"):
                update = record.run.config.update if kind == "run" else record.config.update
                run["config"].update({item.key: json.loads(item.value_json) for item in update if item.key})
            if kind == "summary":
                update = record.summary.update
                run["summary"].update({item.key: json.loads(item.value_json) for item in update if item.key})
            if kind == "history":
                items = record.history.item
                run["history"].append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return runs


def test_wandb_has_one_run_per_category_in_one_group_in_offline_files(run: RecordedRun) -> None:
    runs = read_wandb_runs(run.storage)
    assert set(runs) == {"small", "small/board", "small/gear"}
    for category in CATEGORIES:
        wandb_run = runs[f"small/{category}"]
        assert wandb_run["group"] == "small"
        assert len(wandb_run["ids"]) == 1  # the resumed training and the evaluation use the first id
        assert wandb_run["config"]["model.image_size_px"] == 64
        assert wandb_run["config"]["tags"]["bundle"] == run.bundles[category]
        curve = {entry["step"]: entry["train/loss"] for entry in wandb_run["history"] if "train/loss" in entry}
        assert curve == read_manifest_losses(run, category)
        assert wandb_run["summary"]["test/recall"] == run.results[category]["recall"]
        (images,) = [entry for entry in wandb_run["history"] if "heat_maps/count" in entry]
        assert images["heat_maps/count"] == MAX_PICTURES


# A tracker that fails


class FakeTracker(Tracker):
    """A tracker that keeps (name of the run, call) in memory. It fails at the method `fails_at`."""

    calls: ClassVar[list[tuple[str, str]]] = []
    fails_at: ClassVar[str | None] = None

    @classmethod
    def check_usable(cls, settings: TrackerConfig, storage: str) -> str:
        return "memory"

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        pass

    def has_run(self, run: RunDescription) -> bool:
        return False

    def begin_run(self, run: RunDescription) -> Any:
        return FakeRun(run.name)


class FakeRun:
    """A run of `FakeTracker`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, method: str) -> Callable[..., None]:
        def record(argument: Any, *_: object) -> None:
            if method == FakeTracker.fails_at:
                raise ConnectionError("the server is gone")
            shown = f" {argument}" if method in ("log_step_metrics", "end") else ""  # a step, or whether the run failed
            FakeTracker.calls.append((self.name, method + shown))

        return record


@pytest.fixture
def fake_tracker(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    """Registers a fourth tracker, as its own file and its line in the table would do."""
    monkeypatch.setattr(FakeTracker, "calls", [])
    monkeypatch.setattr(FakeTracker, "fails_at", None)
    monkeypatch.setitem(TRACKERS.import_paths, "fake", f"{__name__}:FakeTracker")
    return FakeTracker


def test_a_tracker_that_fails_is_reported_once_and_the_training_goes_on(
    fake_tracker: type[FakeTracker], parts: str, tmp_path: Path
) -> None:
    fake_tracker.fails_at = "log_metrics"
    lines: list[str] = []
    assert set(train(make_config(parts, tmp_path, {"fake": {}}), log=lines.append)) == set(CATEGORIES)
    (warning,) = [line for line in lines if "WARNING" in line]
    assert warning.startswith("WARNING: fake failed")
    assert warning.endswith("ConnectionError: the server is gone")
    assert fake_tracker.calls == []


@pytest.mark.parametrize(
    ("training", "calls"),
    [
        ({}, ["log_step_metrics 1", "log_metrics", "set_tags", "end False"]),
        ({"steps": 30, "learning_rate": 10.0, "lambda_fine": 1e38}, ["set_tags", "end True"]),
    ],
    ids=["trained", "diverging"],
)
def test_a_fourth_tracker_needs_only_a_file_and_a_line_and_gets_the_end_of_each_category(
    fake_tracker: type[FakeTracker], parts: str, tmp_path: Path, training: dict[str, Any], calls: list[str]
) -> None:
    with contextlib.suppress(TrainingError):
        train(make_config(parts, tmp_path, {"fake": {}}, ["gear"], train={"steps": 1, **training}))
    assert fake_tracker.calls == [("small/gear", call) for call in calls]


def test_an_unreadable_bundle_loses_only_its_metrics(fake_tracker: type[FakeTracker], tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text("{}")
    lines: list[str] = []
    recorder = BackgroundRecorder({"fake": TrackerConfig()}, str(tmp_path), lines.append)
    config = make_config("parts", tmp_path, {"fake": {}})
    training_recorder = TrainingRecorder(recorder, config.model_dump(), str(tmp_path), {"gear": "f"})
    for _ in range(2):  # as after the loss of a worker
        training_recorder.log_interval("gear", {"step": 1, "loss": 1.0})
    training_recorder.record_finished_category("gear", str(tmp_path / "missing"))
    training_recorder.close(failed=False)
    assert fake_tracker.calls == [("small/gear", call) for call in ("log_step_metrics 1", "end False")]
    assert [line for line in lines if line.startswith("WARNING: gear: ")]


def test_a_broken_store_gives_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    recorder = BackgroundRecorder({"mlflow": TrackerConfig()}, str(tmp_path), lines.append)
    (tmp_path / "trackers/mlflow/mlflow.db").write_bytes(b"not a database" * 1000)
    for _ in range(3):
        recorder.write_to_run(
            RunDescription("0", "line/gear"), lambda run: run.log_step_metrics(1, {"train/loss": 1.0})
        )
    recorder.close()
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "mlflow failed" in warning


# Checks before a training begins


@pytest.mark.parametrize("kind", ["mlflow", "tensorboardX", "wandb"])
def test_a_missing_package_is_reported_before_anything_is_written(
    kind: str, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    extra = kind.removesuffix("X")
    with pytest.raises(MissingPackageError, match=rf"trackers.{extra} needs {kind}.*focus-ray\[{extra}\]"):
        train(make_config(parts, tmp_path / "runs", {extra: {}}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("tensorboard", {"uri": "FOLDER/file/board"}, r"trackers\.tensorboard: .*/file/board"),
        ("mlflow", {"uri": "http://127.0.0.1:1"}, r"trackers\.mlflow: .* 127\.0\.0\.1:1"),
        ("wandb", {"uri": "s3://plant/runs"}, r"set trackers\.wandb\.uri"),
    ],
)
def test_a_place_that_cannot_be_used_is_reported_before_anything_is_written(
    parts: str, tmp_path: Path, kind: str, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    settings = {key: value.replace("FOLDER", str(tmp_path)) for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        train(make_config(parts, tmp_path / "runs", {kind: settings}))
    assert not (tmp_path / "runs").exists()


def test_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        BackgroundRecorder({"wandb": TrackerConfig()}, str(tmp_path), print)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_storage_on_s3_needs_a_folder_for_trackers(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"set trackers\.{kind}\.uri"):
        BackgroundRecorder({kind: TrackerConfig()}, "s3://plant/runs", print)


def test_doctor_checks_trackers(parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = CheckContext(make_config(parts, tmp_path, {"tensorboard": {}}))
    (diagnosis,) = run_checks({"trackers": check_trackers}, context)
    assert (diagnosis.status, diagnosis.message) == ("ok", f"tensorboard: {tmp_path}/trackers/tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    (diagnosis,) = run_checks({"trackers": check_trackers}, context)
    assert diagnosis.status == "FAILED"
    assert "focus-ray[tensorboard]" in diagnosis.message


# Settings


@pytest.mark.parametrize("uri", ["http://me:secret@host:5000", "https://secret@host", "postgresql://u:p@host/db"])
def test_a_uri_with_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="user or password") as caught:
        parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": {"uri": uri}}})
    assert "secret" not in str(caught.value)


def test_a_tracker_needs_no_settings_and_a_known_name() -> None:
    with pytest.raises(ConfigError, match=r"'mlfow' .*'mlflow'"):
        parse_config({"data": {"uri": "x"}, "trackers": {"mlfow": {}}})
    assert parse_config({"data": {"uri": "x"}, "trackers": {"mlflow": None}}).trackers == {"mlflow": TrackerConfig()}


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
    parameters = flatten_parameters({"model": {"weights": uri, "tiling": None}, "bundles": [uri]})
    assert parameters == {"model.weights": shown, "bundles": json.dumps([shown])}


def test_the_password_in_mlflows_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/runs")
    assert TRACKERS["mlflow"].check_usable(TrackerConfig(), "runs") == "postgresql://127.0.0.1:9/runs"


# Evaluations


def test_an_evaluation_records_to_the_tracker_on_its_command_line_and_takes_no_other_settings(
    fake_tracker: type[FakeTracker], parts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(small_config(parts, tmp_path / "runs"))
    assert main(["evaluate", bundle, "trackers.fake={}", "--output", str(tmp_path / "report")]) == 0
    assert fake_tracker.calls == [
        ("small/gear", call) for call in ("set_tags", "log_metrics", "log_pictures", "end False")
    ]
    assert main(["evaluate", bundle, "train.steps=3", "--output", str(tmp_path / "other")]) == 1
    assert "train.steps=3" in capsys.readouterr().err


def test_an_evaluation_goes_on_without_a_tracker_of_its_training(
    run: RecordedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    lines: list[str] = []
    results = run.evaluate({"gear": run.bundles["gear"]}, tmp_path, lines)
    assert results["gear"]["image_auroc"] == run.results["gear"]["image_auroc"]
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "trackers.mlflow needs mlflow" in warning


# On Ray


@pytest.mark.ray
@pytest.mark.slow
def test_intervals_of_ray_train_are_recorded_during_the_training(
    ray_cluster: None, fake_tracker: type[FakeTracker], parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # record_finished_category would add intervals that were not recorded before.
    monkeypatch.setattr(TrainingRecorder, "record_finished_category", lambda *arguments: None)
    cluster = {"local": False, "num_workers": 2}
    train(make_config(parts, tmp_path, {"fake": {}}, ["gear"], train={"steps": STEPS}, cluster=cluster))
    assert [call for _, call in fake_tracker.calls if call.startswith("log_step_metrics")] == [
        "log_step_metrics 1",
        "log_step_metrics 2",
    ]


@pytest.mark.ray
def test_a_pool_records_the_same_as_one_process(
    ray_cluster: None, fake_tracker: type[FakeTracker], parts: str, tmp_path: Path
) -> None:
    cluster = {"local": False, "max_concurrent_categories": 1}  # one process imports torch
    train(make_config(parts, tmp_path, {"fake": {}}, cluster=cluster))
    calls = [
        (f"small/{category}", call) for category in CATEGORIES for call in ("log_metrics", "set_tags", "end False")
    ]
    assert sorted(fake_tracker.calls) == sorted([*calls, ("small", "end False")])


@pytest.mark.cluster
@pytest.mark.ray
def test_a_sweep_has_one_run_per_trial_below_its_run(
    ray_cluster: None, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sweeps")
    config = make_config(parts, tmp_path, {"mlflow": {}}, ["gear"], density={"coreset": 0})
    tree = config.model_dump(mode="json")
    space = {"density.num_channels": [4, 8]}
    outcome = run_sweep(parse_sweep_config({"base": tree, "space": space, "searcher": "grid", "name": "search"}))
    _, runs = read_mlflow_runs(tmp_path, "sweeps")
    assert set(runs) == {"search", "search/00000", "search/00001"}
    for record in outcome.records:
        trial = runs[f"search/{record.name}"].data
        assert trial.tags["mlflow.parentRunId"] == runs["search"].info.run_id
        assert trial.params == {"density.num_channels": str(record.point["density.num_channels"])}
        assert trial.metrics["score"] == trial.metrics["score/gear"] == record.score
        assert trial.tags["status"] == "finished"
    best = outcome.best_records[None]
    assert runs["search"].data.metrics["best/score"] == best.score
    assert runs["search"].data.tags["best_trial"] == str(best.number)
    assert resume_sweep(outcome.root).records == outcome.records  # no trial is left, and nothing is recorded twice
    resumed_runs = read_mlflow_runs(tmp_path, "sweeps")[1]
    resumed = {name: (run.info.run_id, run.data.metrics) for name, run in resumed_runs.items()}
    assert resumed == {name: (run.info.run_id, run.data.metrics) for name, run in runs.items()}
