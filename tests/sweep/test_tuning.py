"""Real sweeps: results and files, a killed driver and a resumed sweep, a stop, failing trials, DDP workers.

The file is long because its tests share fixtures that take seconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from s3_server import S3Server
from small_set import CATEGORIES, draw_parts, ingest_parts, small_config
from waiting import wait_for_records

from focus_ray.cluster.ownership import FINGERPRINTS, Heartbeat, check_fingerprints, read_state
from focus_ray.errors import ConfigError, DataError, SweepError, TrainingError
from focus_ray.fitting.settings import load_config
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import list_names
from focus_ray.sweep import records
from focus_ray.sweep.driver import SweepOutcome, run_sweep
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.race import Judge
from focus_ray.sweep.records import TrialRecord, read_records, read_sweep
from focus_ray.sweep.settings import SweepConfig, parse_sweep
from focus_ray.sweep.trial import judge_category
from focus_ray.sweep.trial_inputs import load_images, split_for_judging

UNALIGNED = {"image_alignment": {"group": "none"}}
SPACE = {"density.num_channels": [4, 8, 32], "density.shrinkage": [0.5, 4.0]}
SLOW = {"train.seed": list(range(40)), "train.epochs": [40]}  # a sweep that runs long enough to be interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the URI of a small data set."""
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def make_sweep(data: str, storage: Path | str, base: dict[str, Any] | None = None, **keys: Any) -> SweepConfig:
    """Returns a grid sweep named `search`; `base` changes sections of its base configuration."""
    # Without a coreset: its choice depends on the last digits, which sharing changes. test_trial tests it.
    defaults = {"data": {"categories": list(CATEGORIES)}, "model": UNALIGNED, "density": {"coreset": 0}}
    sections = {**defaults, **(base or {})}
    tree = small_config(data, storage, **sections).model_dump(mode="json")
    return parse_sweep({"base": tree, "space": SPACE, "searcher": "grid", "name": "search", **keys})


def judge_in_process(config: SweepConfig) -> list[TrialRecord]:
    """Runs all trials in this process, without Ray, shared inputs or pruning."""
    base, proposer, trials = config.config_at(), Proposer(config), []
    images = {
        category: load_images(
            base,
            category,
            split_for_judging(base, category, config.objective).plan(base),
            config.objective,
            base.model.image_size_px,
        )
        for category in CATEGORIES
    }
    while (proposal := proposer.ask()) is not None:
        number, point = proposal
        settings = config.config_at(point)
        results = [
            judge_category(settings, category, images[category], config.objective, torch.device("cpu"))
            for category in CATEGORIES
        ]
        score = float(np.mean([result.score for result in results if result.score is not None]))
        proposer.tell(number, point, score)
        categories = {result.category: dataclasses.asdict(result) for result in results}
        epochs = sum(result.epochs for result in results)
        trials.append(TrialRecord(number, None, point, "finished", score, categories, epochs=epochs))
    return trials


def cluster_leftovers() -> tuple[list[str], list[str]]:
    """Returns the classes of living actors and the placement groups of this process's cluster."""
    import ray
    from ray._private.state import actors

    alive = [str(actor["ActorClassName"]) for actor in actors().values() if actor["State"] != "DEAD"]
    table = ray.util.placement_group_table()
    return alive, [group["name"] or key for key, group in table.items() if group["state"] != "REMOVED"]


def wait_for_cleanup(timeout_s: float = 20.0) -> tuple[list[str], list[str]]:
    """Waits until nothing is left in the cluster. Returns the leftovers at the end."""
    deadline = time.monotonic() + timeout_s
    while (leftovers := cluster_leftovers()) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.2)
    return leftovers


@pytest.fixture(scope="module")
def finished(ray_cluster: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> SweepOutcome:
    """Runs one sweep for all tests of this file."""
    root = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        (root / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        return run_sweep(make_sweep(data, root))


# Results


@pytest.mark.ray
def test_every_trial_is_judged_on_every_category_and_the_best_is_the_highest_mean(finished: SweepOutcome) -> None:
    assert [record.number for record in finished.records] == list(range(6))
    for record in finished.records:
        assert (record.status, list(record.categories)) == ("finished", list(CATEGORIES))
        scores = [result["score"] for result in record.categories.values()]
        assert record.score == pytest.approx(sum(scores) / 2)
    highest = max(record.score for record in finished.records if record.score)
    assert finished.best[None].score == pytest.approx(highest, abs=1e-4)  # the first of equal trials
    assert len({tuple(record.point.values()) for record in finished.records}) == 6
    assert (finished.stopped, finished.failed) == (False, [])


@pytest.mark.ray
def test_the_best_configuration_is_ready_to_train_and_names_its_sweep(finished: SweepOutcome) -> None:
    config = load_config(f"{finished.root}/best.yaml")
    point = finished.best[None].point
    assert (config.density.num_channels, config.density.shrinkage) == tuple(point.values())
    assert config.name == "search-best"
    assert "label-free validation score" in Path(finished.root, "best.yaml").read_text().splitlines()[0]


@pytest.mark.ray
def test_table_plots_and_page_are_in_the_folder_of_the_sweep(finished: SweepOutcome) -> None:
    table = pq.read_table(f"{finished.root}/trials.parquet")
    assert table.num_rows == 6
    assert {"score:gear", "param:density.shrinkage"} <= set(table.column_names)
    assert table.schema.metadata[b"labelled"] == b"False"
    page = Path(finished.root, "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # nothing was trained: no learning curves
    assert "a hint, not a measurement" in page
    names = set(os.listdir(finished.root))
    assert {"sweep.yaml", "best.yaml", "report.md", "report.json", "parallel.png", "importance.png"} <= names


@pytest.mark.slow
@pytest.mark.ray
def test_only_the_results_remain(finished: SweepOutcome) -> None:
    assert wait_for_cleanup() == ([], [])
    assert "scratch" not in os.listdir(finished.root)
    session = Path(os.environ["RAY_TMPDIR"], "ray", "session_latest", "artifacts")
    assert list(session.glob("*/search-*")) == []
    assert os.listdir(Path(finished.root).parent / "tmp") == []


@pytest.mark.ray
def test_features_are_shared_and_do_not_change_the_scores(finished: SweepOutcome, data: str, tmp_path: Path) -> None:
    shared = {result["shared"] for record in finished.records for result in record.categories.values()}
    assert shared == {"features"}
    unshared = judge_in_process(make_sweep(data, tmp_path))
    assert [record.score for record in unshared] == pytest.approx([r.score for r in finished.records], abs=1e-6)


@pytest.mark.slow
@pytest.mark.ray
def test_inputs_over_the_budget_are_reported_and_computed_by_every_trial(
    ray_cluster: None, finished: SweepOutcome, data: str, tmp_path: Path
) -> None:
    messages: list[str] = []
    small = run_sweep(make_sweep(data, tmp_path, shared_budget_mb=1.0), log=messages.append)
    assert any("features of board take" in line and "shared_budget_mb" in line for line in messages)
    assert [record.score for record in small.records] == pytest.approx([r.score for r in finished.records], abs=1e-6)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_per_category_finds_the_best_trial_of_each_category(
    ray_cluster: None, finished: SweepOutcome, data: str, tmp_path: Path
) -> None:
    per_category = run_sweep(make_sweep(data, tmp_path, scope="per_category"))
    for category in CATEGORIES:
        best = max(record.categories[category]["score"] for record in finished.records)
        assert per_category.best[category].score == pytest.approx(best, abs=1e-4)  # the first of equal trials
        assert load_config(f"{per_category.root}/best-{category}.yaml").data.categories == (category,)


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_trial_is_reported_and_the_other_trials_go_on(ray_cluster: None, data: str, tmp_path: Path) -> None:
    space = {"model.weights": ["random", str(tmp_path / "absent.pth")], "density.shrinkage": [1.0, 2.0]}
    outcome = run_sweep(make_sweep(data, tmp_path, space=space, share_work=False, objective="pixel_auroc"))
    assert [record.status for record in outcome.records] == ["finished", "finished", "failed", "failed"]
    assert all("absent.pth" in str(record.reason) for record in outcome.failed)
    assert {result["shared"] for record in outcome.records for result in record.categories.values()} == {"nothing"}
    assert "pixel_auroc on LABELLED test images" in Path(outcome.root, "best.yaml").read_text()
    assert wait_for_cleanup() == ([], [])


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_fails_if_every_trial_fails(ray_cluster: None, data: str, tmp_path: Path) -> None:
    space = {"model.weights": [str(tmp_path / "absent.pth")]}
    with pytest.raises(SweepError, match=r"trial 00000: .*absent\.pth"):
        run_sweep(make_sweep(data, tmp_path, space=space))


# A race


RATES = {"train.learning_rate": [1e-2, 1e-4, 1e-3, 0.03]}  # no rate diverges; all others lose to the first
TRAINED: dict[str, Any] = {"train": {"epochs": 3}, "density": {"coreset": 0}}
HALVING: dict[str, Any] = {"race": {"enabled": True}, "scheduler": {"kind": "asha"}}


@pytest.fixture(scope="module")
def unpruned(data: str) -> list[TrialRecord]:
    """Returns the records of four learning rates without pruning."""
    return judge_in_process(make_sweep(data, "unused", TRAINED, space=RATES))


def test_a_race_finds_the_same_best_trial_with_fewer_epochs(unpruned: list[TrialRecord], data: str) -> None:
    judge = Judge(make_sweep(data, "unused", TRAINED, space=RATES, **HALVING), CATEGORIES, 3)
    raced = []
    epochs = 0
    for record in unpruned:  # the decisions of the judge do not change their scores
        judge.begin(record.number)
        reason = None
        for category, curve in record.curves().items():
            for epoch, score in curve:
                epochs += reason is None
                reason = reason or judge.report(record.number, category, epoch, score, epoch == 3)
        status = "finished" if reason is None else "cut"
        raced.append(dataclasses.replace(record, status=status, score=record.score if reason is None else None))
    assert records.best_records(raced)[None] == records.best_records(unpruned)[None]
    assert sum(record.epochs for record in unpruned) == 4 * 2 * 3
    assert epochs <= 0.6 * 4 * 2 * 3, epochs
    assert [record.status for record in raced] == ["finished", "cut", "cut", "cut"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_race_on_ray_finds_the_best_of_all_unpruned_trials(
    ray_cluster: None, unpruned: list[TrialRecord], data: str, tmp_path: Path
) -> None:
    raced = run_sweep(make_sweep(data, tmp_path, TRAINED, space=RATES, max_concurrent_trials=1, **HALVING))
    expected = records.best_records(unpruned)[None]
    assert raced.best[None].point == expected.point
    assert raced.best[None].score == pytest.approx(expected.score)
    epochs = sum(record.epochs for record in raced.records)
    assert epochs <= 0.6 * 4 * 2 * 3, epochs
    reasons = [str(record.reason) for record in raced.records if record.status == "cut"]
    assert len(reasons) == 3
    assert all(reason.startswith(("race: ", "successive halving: ")) for reason in reasons)
    assert "curves.png" in os.listdir(raced.root)


# Refused sweeps


@pytest.mark.ray
def test_an_existing_name_is_refused(finished: SweepOutcome, data: str) -> None:
    with pytest.raises(SweepError, match="search already contains a sweep"):
        run_sweep(make_sweep(data, Path(finished.root).parent))


def test_more_channels_than_the_network_has_are_refused_before_anything_starts(data: str, tmp_path: Path) -> None:
    space = {"density.num_channels": [32, 100], "density.layers": [["layer1"]]}
    with pytest.raises(
        ConfigError, match=r"at density.num_channels=100, density.layers=\['layer1'\]: .* have 64 channels"
    ):
        run_sweep(make_sweep(data, tmp_path, space=space))
    assert os.listdir(tmp_path) == []


def test_an_unknown_category_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nut.*board, gear"):
        run_sweep(make_sweep(data, tmp_path, {"data": {"categories": ["nut"]}}))


@pytest.mark.ray
def test_a_sweep_that_is_too_large_for_the_cluster_is_refused_and_creates_no_folder(
    ray_cluster: None, data: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"5 worker\(s\) of 1 CPU need 5 CPU; the cluster has 4 CPU"):
        run_sweep(make_sweep(data, tmp_path, {"cluster": {"num_workers": 5, "use_gpu": False}}))
    with pytest.raises(TrainingError, match=r"need 1 CPU; the cluster has .* labelled {'site': 'nowhere'}"):
        run_sweep(make_sweep(data, tmp_path, {"cluster": {"labels": {"site": "nowhere"}, "use_gpu": False}}))
    assert list_names(f"{tmp_path}/search") == []


# The folder


def make_record(**keys: Any) -> TrialRecord:
    """Returns a record with other values in `keys`."""
    categories = {"gear": {"score": 0.5, "curve": [[0, 0.5]]}}
    return TrialRecord(
        **{
            "number": 3,
            "stage": None,
            "point": {"a": 1},
            "status": "finished",
            "score": 0.5,
            "categories": categories,
            **keys,
        }
    )


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for record in (make_record(), make_record(stage="gear", status="cut", score=None, reason="lost")):
        records.write_record(str(tmp_path), record)
    assert [dataclasses.replace(r, stage=None).name for r in read_records(str(tmp_path))] == ["00003", "00003"]
    assert read_records(str(tmp_path))[0] == make_record()


def test_an_invalid_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "00001.json").write_text('{"number": 1')
    with pytest.raises(SweepError, match=r"trials/00001\.json"):
        read_records(str(tmp_path))


def test_a_driver_without_heartbeat_is_lost(tmp_path: Path) -> None:
    assert read_state(str(tmp_path))["state"] == "lost"
    heartbeat = Heartbeat(str(tmp_path))
    assert read_state(str(tmp_path), lambda seconds: None)["state"] == "lost"  # no time passed, so no further heartbeat
    assert read_state(str(tmp_path), lambda seconds: heartbeat._write("running"))["state"] == "running"
    heartbeat.close("stopped")
    assert read_state(str(tmp_path))["state"] == "stopped"


def test_a_sweep_with_changed_images_is_not_resumed(data: str, tmp_path: Path) -> None:
    records.claim_folder(str(tmp_path), make_sweep(data, tmp_path), {"gear": "a", "board": "b"})
    check_fingerprints(str(tmp_path), {"gear": "a", "board": "b"})
    with pytest.raises(DataError, match="gear"):
        check_fingerprints(str(tmp_path), {"gear": "x", "board": "b"})


def test_a_sweep_whose_driver_died_at_its_start_can_be_resumed(data: str, tmp_path: Path) -> None:
    records.claim_folder(str(tmp_path), make_sweep(data, tmp_path), {"gear": "a"})
    (tmp_path / FINGERPRINTS).unlink()
    check_fingerprints(str(tmp_path), {"gear": "b"})
    assert json.loads((tmp_path / FINGERPRINTS).read_text()) == {"gear": "b"}


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="contains no sweep"):
        read_sweep(str(tmp_path))


def test_the_configuration_of_a_sweep_is_read_from_its_folder(data: str, tmp_path: Path) -> None:
    config = make_sweep(data, tmp_path, race={"enabled": True, "order": ["gear"]})
    records.claim_folder(str(tmp_path), config, {})
    assert read_sweep(str(tmp_path)) == config


# Killed and stopped drivers in separate processes


def start_sweep(config: SweepConfig, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Starts `focus-ray sweep` in a process."""
    path = folder / "sweep-to-run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return start_command("sweep", str(path), *overrides)


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """Starts a `focus-ray` command in a process."""
    line = [sys.executable, "-m", "focus_ray.cli", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_killed_driver_loses_no_finished_trial_and_the_resumed_sweep_has_the_same_best_trial(
    s3: S3Server, data: str, tmp_path: Path
) -> None:
    root = s3.new_uri()
    uri = f"{root}/data"
    ingest(draw_parts(tmp_path / "images"), uri, progress=False)
    base = {"train": {"epochs": 4, "learning_rate": 0.01}}
    config = make_sweep(uri, f"{root}/sweeps", base, max_concurrent_trials=1, race={"enabled": True})
    folder = f"{root}/sweeps/search"
    undisturbed = start_sweep(config.model_copy(update={"name": "undisturbed"}), tmp_path)
    assert undisturbed.wait(timeout=250) == 0, undisturbed.communicate()[1][-3000:]
    driver = start_sweep(config, tmp_path)
    wait_for_records(folder, 2, driver, 200.0)
    driver.kill()
    driver.wait()
    before = {record.name: record for record in read_records(folder)}
    assert 2 <= len(before) < 6
    resumed = start_command("sweep", "resume", folder)
    output, errors = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, errors[-3000:]
    after = {record.name: record for record in read_records(folder)}
    assert len(after) == 6
    assert {name: after[name] for name in before} == before  # no trial was run again
    expected = read_records(f"{root}/sweeps/undisturbed")
    assert [r.score for r in after.values()] == pytest.approx([r.score for r in expected], abs=1e-6)
    assert records.best_records(list(after.values()))[None].number == records.best_records(expected)[None].number
    assert f"{folder}/best.yaml" in output


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_leaves_no_process_or_file_and_prints_how_to_resume_it(
    number: signal.Signals, data: str, tmp_path: Path
) -> None:
    config = make_sweep(data, tmp_path, {"train": {"learning_rate": 0.001}}, space=SLOW)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    try:
        driver = start_sweep(config, tmp_path)
    finally:
        del os.environ["TMPDIR"]
    wait_for_records(f"{tmp_path}/search", 1, driver, 200.0)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors[-3000:]
    assert f"focus-ray sweep resume {tmp_path}/search" in errors
    assert json.loads(Path(tmp_path, "search/state.json").read_text())["state"] == "stopped"
    assert list(temporary.glob("focus-ray-sweep-*")) == []
    assert not Path(tmp_path, "search/scratch").exists()
    trials = read_records(f"{tmp_path}/search")
    assert 1 <= len(trials) < 40
    assert {record.status for record in trials} == {"finished"}


STOP_IN_A_RUNNING_CLUSTER = """
import json, os, sys, threading, time
import ray
from focus_ray.sweep.settings import parse_sweep
from focus_ray.storage.files import list_names
from focus_ray.sweep.driver import run_sweep
from ray.util.state import list_actors, list_placement_groups

if __name__ == "__main__":
    config = parse_sweep(json.loads(sys.argv[1]))
    ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", logging_level="error")
    place = f"{config.base['storage']}/{config.name}/trials"

    def stop():
        while not list_names(place) and not list_names(os.path.dirname(place) + "/scratch"):
            time.sleep(0.2)
        time.sleep(float(sys.argv[2]))
        os.kill(os.getpid(), 2)

    threading.Thread(target=stop, daemon=True).start()
    outcome = run_sweep(config, log=lambda line: print(line, file=sys.stderr))
    deadline = time.monotonic() + 60
    address = ray.get_runtime_context().gcs_address
    while True:
        alive = [actor.class_name for actor in list_actors(address, filters=[("state", "!=", "DEAD")])]
        # Ray's own actors remain: one per cluster, and Train's cleaner if its controller was killed early.
        leftovers = [name for name in alive if name not in ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")]
        groups = [group.placement_group_id for group in list_placement_groups(address, filters=[("state", "!=", "REMOVED")])]
        free = ray.available_resources().get("CPU")
        if (not leftovers and not groups and free == 4.0) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    print(json.dumps({"stopped": outcome.stopped, "actors": leftovers, "groups": groups, "free": free}))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_sweep_leaves_no_actor_no_placement_group_and_no_file(
    ray_cluster: None, data: str, tmp_path: Path, num_workers: int
) -> None:
    base = {"cluster": {"num_workers": num_workers, "use_gpu": False}}
    config = make_sweep(data, tmp_path, base, space={**SLOW, "train.epochs": [400]})
    arguments = json.dumps(config.model_dump(mode="json", exclude_none=True))
    line = [sys.executable, "-c", STOP_IN_A_RUNNING_CLUSTER, arguments, "5"]
    if num_workers == 1:  # a trial of 400 epochs does not end soon: stop while the first trials run
        line[-1] = "0"
        config = make_sweep(data, tmp_path, base, space=SLOW)
        line[-2] = json.dumps(config.model_dump(mode="json", exclude_none=True))
    process = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    state = json.loads(process.stdout.strip().splitlines()[-1])
    assert state == {"stopped": True, "actors": [], "groups": [], "free": 4.0}
    assert not Path(tmp_path, "search/scratch").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_trials_with_two_workers_train_with_ddp(ray_cluster: None, data: str, tmp_path: Path) -> None:
    base = {"cluster": {"num_workers": 2, "use_gpu": False}, "train": {"epochs": 2}}
    trials = run_sweep(make_sweep(data, tmp_path, base, space={"train.learning_rate": [1e-4, 1e-2]})).records
    assert [(record.status, record.epochs) for record in trials] == [("finished", 4)] * 2
    assert {result["shared"] for record in trials for result in record.categories.values()} == {"images"}
    assert not Path(tmp_path, "search/scratch").exists()
    status = start_command("sweep", "status", f"{tmp_path}/search")
    state = json.loads(status.communicate(timeout=60)[0].partition("\n**")[0])
    assert (state["state"], state["planned"], state["finished"], state["epochs"]) == ("finished", 2, 2, 8)
    Path(tmp_path, "search/report.html").unlink()
    report = start_command("sweep", "report", f"{tmp_path}/search")
    report.communicate(timeout=60)
    assert report.returncode == 0
    assert Path(tmp_path, "search/report.html").exists()
