"""Real sweeps: results and files, a killed driver and a resumed sweep, a stop, failing trials, DDP workers.

The file is long because its tests share fixtures that take seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from s3_server import S3Server
from small_set import CATEGORIES, draw_parts, small_config
from waiting import wait_for, wait_for_records

from focus_ray.cluster.ownership import FINGERPRINTS_FILE, FolderOwner, check_images_unchanged
from focus_ray.errors import ConfigError, DataError, FocusRayError, SweepError, TrainingError
from focus_ray.fitting.settings import load_config
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import list_folder_entries
from focus_ray.sweep import records
from focus_ray.sweep.driver import SweepOutcome, run_sweep
from focus_ray.sweep.proposer import SettingsProposer
from focus_ray.sweep.records import TrialRecord, read_sweep_config, read_trial_records
from focus_ray.sweep.settings import SweepConfig, parse_sweep_config
from focus_ray.sweep.trial import score_category
from focus_ray.sweep.trial_inputs import load_category_images, split_for_scoring

SPACE = {"density.num_channels": [4, 32], "density.shrinkage": [0.5, 4.0]}
SLOW = {"train.seed": list(range(40)), "train.steps": [200]}  # a sweep that runs long enough to be interrupted


def make_sweep(parts: str, storage: Path | str, base: dict[str, Any] | None = None, **keys: Any) -> SweepConfig:
    """Returns a grid sweep named `search`; `base` changes sections of its base configuration."""
    # Without a coreset: its choice depends on the last digits, which sharing changes. test_trial tests it.
    defaults = {"data": {"categories": list(CATEGORIES)}, "density": {"coreset": 0}}
    tree = small_config(parts, storage, **{**defaults, **(base or {})}).model_dump(mode="json")
    return parse_sweep_config({"base": tree, "space": SPACE, "searcher": "grid", "name": "search", **keys})


def score_in_process(config: SweepConfig) -> list[TrialRecord]:
    """Runs all trials in this process, without Ray, shared inputs or pruning."""
    base, trials = config.make_trial_config(), []
    images = {}
    for category in CATEGORIES:
        plan = split_for_scoring(base, category, config.objective).build_plan(base)
        images[category] = load_category_images(base, category, plan, config.objective, base.model.image_size_px)
    for number, point in enumerate(SettingsProposer(config).points):
        results = {
            category: score_category(
                config.make_trial_config(point), category, images[category], config.objective, torch.device("cpu")
            )
            for category in CATEGORIES
        }
        score = sum(result.score or 0.0 for result in results.values()) / len(results)
        categories = {category: dataclasses.asdict(result) for category, result in results.items()}
        trials.append(TrialRecord(number, None, point, "finished", score, categories))
    return trials


def wait_for_cleanup() -> None:
    """Waits until no actor and no placement group is left in this process's cluster.

    Ray's own actors remain: one per cluster, and Train's cleaner if its controller was killed early.
    """
    import ray
    from ray._private.state import actors

    own_actors = ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner", "_StatsActor")

    def is_clean() -> bool:
        alive = {str(actor["ActorClassName"]) for actor in actors().values() if actor["State"] != "DEAD"}
        groups = ray.util.placement_group_table().values()
        return alive <= {*own_actors} and all(group["state"] == "REMOVED" for group in groups)

    wait_for(is_clean, 60.0, "the end of all actors and placement groups")


@pytest.fixture(scope="module")
def finished(ray_cluster: None, parts: str, tmp_path_factory: pytest.TempPathFactory) -> SweepOutcome:
    """Runs one sweep for all tests of this file."""
    root = tmp_path_factory.mktemp("sweeps")
    (root / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        # each process imports torch; resume: the folder has no sweep yet
        return run_sweep(make_sweep(parts, root, max_concurrent_trials=2), resume=True)


# Results


@pytest.mark.ray
def test_every_trial_is_judged_on_every_category_and_the_best_is_the_highest_mean(finished: SweepOutcome) -> None:
    assert (finished.stopped, finished.failed_records) == (False, [])
    assert [record.number for record in finished.records] == list(range(4))
    for record in finished.records:
        assert (record.status, list(record.category_scores)) == ("finished", list(CATEGORIES))
        assert record.score == pytest.approx(sum(record.category_scores.values()) / 2)
    highest = max(record.score for record in finished.records if record.score)
    assert finished.best_records[None].score == pytest.approx(highest, abs=1e-4)  # the first of equal trials
    assert len({tuple(record.point.values()) for record in finished.records}) == 4


@pytest.mark.ray
def test_only_the_results_of_a_sweep_remain(finished: SweepOutcome) -> None:
    wait_for_cleanup()
    artifacts = Path(os.environ["RAY_TMPDIR"], "ray", "session_latest", "artifacts")
    assert list(artifacts.glob("*/sweep-*")) == []
    assert os.listdir(Path(finished.root).parent / "tmp") == []


@pytest.mark.ray
def test_the_folder_of_a_sweep_has_a_configuration_ready_to_train_and_a_report(finished: SweepOutcome) -> None:
    config = load_config(f"{finished.root}/best.yaml")
    point = finished.best_records[None].point
    assert (config.density.num_channels, config.density.shrinkage) == tuple(point.values())
    table = pq.read_table(f"{finished.root}/trials.parquet")
    assert table.num_rows == 4
    assert {"score:gear", "param:density.shrinkage"} <= set(table.column_names)
    page = Path(finished.root, "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # nothing was trained: no learning curves
    names = "sweep.yaml data.json state.json owners trials best.yaml trials.parquet report.html report.md report.json"
    assert set(os.listdir(finished.root)) == {*names.split(), "parallel.png", "importance.png"}


@pytest.mark.ray
def test_features_are_shared_and_do_not_change_the_scores(finished: SweepOutcome, parts: str) -> None:
    shared = {result["shared"] for record in finished.records for result in record.categories.values()}
    assert shared == {"features"}
    unshared = score_in_process(make_sweep(parts, "unused"))
    # batches of other sizes round differently
    assert [record.score for record in unshared] == pytest.approx([r.score for r in finished.records], abs=1e-5)


@pytest.mark.ray
def test_the_same_configuration_with_resume_continues_a_sweep_and_another_is_refused(
    finished: SweepOutcome, parts: str
) -> None:
    config = read_sweep_config(finished.root)
    messages: list[str] = []
    assert run_sweep(config, resume=True, log=messages.append).records == finished.records
    assert f"sweep: {finished.root}, 4 trials have records" in messages
    with pytest.raises(SweepError, match="already contains a sweep"):
        run_sweep(config)
    with pytest.raises(SweepError, match=r"seed was 0, is 7\..*sweep resume"):
        run_sweep(config.model_copy(update={"seed": 7}), resume=True)
    with pytest.raises(SweepError, match="needs the name"):
        run_sweep(config.model_copy(update={"name": None}), resume=True)


@pytest.mark.slow
@pytest.mark.ray
def test_inputs_over_the_budget_are_reported_and_computed_by_every_trial(
    ray_cluster: None, finished: SweepOutcome, parts: str, tmp_path: Path
) -> None:
    messages: list[str] = []
    small = run_sweep(make_sweep(parts, tmp_path, shared_budget_mb=1.0), log=messages.append)
    assert any("features of board take" in line and "shared_budget_mb" in line for line in messages)
    assert [record.score for record in small.records] == pytest.approx([r.score for r in finished.records], abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_per_category_finds_the_best_trial_of_each_category(
    ray_cluster: None, finished: SweepOutcome, parts: str, tmp_path: Path
) -> None:
    per_category = run_sweep(make_sweep(parts, tmp_path, scope="per_category"))
    for category in CATEGORIES:
        best = max(record.category_scores[category] for record in finished.records)
        assert per_category.best_records[category].score == pytest.approx(best, abs=1e-4)  # the first of equal trials
        assert load_config(f"{per_category.root}/best-{category}.yaml").data.categories == (category,)


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_trial_is_reported_and_the_other_trials_go_on(ray_cluster: None, parts: str, tmp_path: Path) -> None:
    space = {"model.weights": ["random", str(tmp_path / "absent.pth")], "density.shrinkage": [1.0, 2.0]}
    outcome = run_sweep(make_sweep(parts, tmp_path, space=space, share_work=False, objective="pixel_auroc"))
    assert [record.status for record in outcome.records] == ["finished", "finished", "failed", "failed"]
    assert all("absent.pth" in str(record.reason) for record in outcome.failed_records)
    assert {result["shared"] for record in outcome.records for result in record.categories.values()} == {"nothing"}
    wait_for_cleanup()
    with pytest.raises(SweepError, match=r"trial 00000: .*absent\.pth"):
        run_sweep(make_sweep(parts, tmp_path, space={"model.weights": [str(tmp_path / "absent.pth")]}, name="other"))


# A race


RATES = {"train.learning_rate": [1e-2, 1e-4, 1e-3, 0.03]}  # no rate diverges; all others lose to the first
TRAINED: dict[str, Any] = {"train": {"steps": 3}, "density": {"coreset": 0}}
HALVING: dict[str, Any] = {"race": {"enabled": True}, "scheduler": {"kind": "asha"}}


@pytest.mark.slow
@pytest.mark.ray
def test_a_race_finds_the_same_best_trial_with_fewer_steps(ray_cluster: None, parts: str, tmp_path: Path) -> None:
    config = make_sweep(parts, tmp_path, TRAINED, space=RATES, max_concurrent_trials=1, **HALVING)
    expected = records.find_best_records(score_in_process(config))[None]
    raced = run_sweep(config)
    best = raced.best_records[None]
    assert (best.point, best.score) == (expected.point, pytest.approx(expected.score))
    assert sum(record.steps for record in raced.records) <= 0.6 * 4 * 2 * 3
    reasons = [str(record.reason) for record in raced.records if record.status == "cut"]
    assert len(reasons) == 3
    assert all(reason.startswith(("race: ", "successive halving: ")) for reason in reasons)
    assert "curves.png" in os.listdir(raced.root)


# Refused sweeps


@pytest.mark.ray
@pytest.mark.parametrize(
    ("base", "space", "error", "message"),
    [
        (
            {},
            {"density.num_channels": [32, 500]},
            ConfigError,
            "num_channels=500.* 448 ",
        ),
        ({"data": {"categories": ["nut"]}}, SPACE, DataError, "nut.*board, gear"),
        ({"cluster": {"num_workers": 5, "use_gpu": False}}, SPACE, TrainingError, "need 5 CPU; the cluster has 4 CPU"),
        ({"cluster": {"labels": {"site": "x"}, "use_gpu": False}}, SPACE, TrainingError, "labelled {'site': 'x'}"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_and_creates_no_folder(
    ray_cluster: None,
    parts: str,
    tmp_path: Path,
    base: dict[str, Any],
    space: dict[str, Any],
    error: type[FocusRayError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run_sweep(make_sweep(parts, tmp_path, base, space=space))
    assert list_folder_entries(f"{tmp_path}/search") == []


# The folder


def test_a_record_is_read_as_it_was_written_and_an_invalid_one_is_named(tmp_path: Path) -> None:
    first = TrialRecord(3, None, {"a": 1}, "finished", 0.5, {"gear": {"score": 0.5, "curve": [[0, 0.5]]}})
    written = [first, dataclasses.replace(first, stage="gear", status="cut", score=None, reason="lost")]
    for record in written:
        records.write_trial_record(str(tmp_path), record)
    assert read_trial_records(str(tmp_path)) == written
    (tmp_path / "trials" / "00001.json").write_text('{"number": 1')
    with pytest.raises(SweepError, match=r"trials/00001\.json"):
        read_trial_records(str(tmp_path))


def test_a_folder_holds_one_sweep_which_is_resumed_only_with_the_same_images(parts: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="contains no sweep"):
        read_sweep_config(str(tmp_path))
    config = make_sweep(parts, tmp_path, race={"enabled": True, "order": ["gear"]})
    records.claim_sweep_folder(str(tmp_path), config, {"gear": "a", "board": "b"})
    assert read_sweep_config(str(tmp_path)) == config
    stored = tmp_path / records.SWEEP_FILE
    stored.write_text(stored.read_text().replace("batch_size: 4", "batch_size_per_worker: 4"))  # as in earlier versions
    assert "batch_size_per_worker: 4" in stored.read_text()
    assert read_sweep_config(str(tmp_path)) == config
    with pytest.raises(SweepError, match="already contains a sweep"):
        records.claim_sweep_folder(str(tmp_path), config, {})
    with pytest.raises(DataError, match="gear"):
        check_images_unchanged(str(tmp_path), {"gear": "x", "board": "b"})
    (tmp_path / FINGERPRINTS_FILE).unlink()  # the driver died at its start
    check_images_unchanged(str(tmp_path), {"gear": "x"})
    assert json.loads((tmp_path / FINGERPRINTS_FILE).read_text()) == {"gear": "x"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_that_is_taken_over_stops_and_writes_nothing_more(
    ray_cluster: None, parts: str, tmp_path: Path
) -> None:
    config = make_sweep(parts, tmp_path, {"train": {"learning_rate": 0.001}}, space=SLOW, max_concurrent_trials=1)
    owners: list[FolderOwner] = []
    records_before: list[list[TrialRecord]] = []

    def take_over_after_the_first_trial(message: str) -> None:
        if message.startswith("trial ") and not owners:
            owners.append(FolderOwner(f"{tmp_path}/search", 2, SweepError))
            records_before.append(read_trial_records(f"{tmp_path}/search"))

    with pytest.raises(SweepError, match=rf"search: process {os.getpid()} on .* has taken over this run"):
        run_sweep(config, log=take_over_after_the_first_trial)
    assert json.loads(Path(tmp_path, "search/state.json").read_text())["generation"] == 2
    assert read_trial_records(f"{tmp_path}/search") == records_before[0]
    assert not Path(tmp_path, "search/report.html").exists()
    owners[0].close("stopped")


# Killed and stopped drivers in separate processes


def start_sweep(config: SweepConfig, folder: Path) -> subprocess.Popen[str]:
    """Starts `focus-ray sweep` in a process."""
    path = folder / "sweep-to-run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return start_command("sweep", str(path))


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """Starts a `focus-ray` command in a process."""
    line = [sys.executable, "-m", "focus_ray.cli", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_killed_driver_loses_no_finished_trial_and_the_resumed_sweep_has_the_same_best_trial(
    s3: S3Server, parts: str, tmp_path: Path
) -> None:
    root = s3.new_uri()
    uri = f"{root}/data"
    ingest(draw_parts(tmp_path / "images"), uri, progress=False)
    base = {"train": {"steps": 4, "learning_rate": 0.01}}
    config = make_sweep(uri, f"{root}/sweeps", base, max_concurrent_trials=1, race={"enabled": True})
    folder = f"{root}/sweeps/search"
    undisturbed = start_sweep(config.model_copy(update={"name": "undisturbed"}), tmp_path)
    assert undisturbed.wait(timeout=250) == 0, undisturbed.communicate()[1][-3000:]
    driver = start_sweep(config, tmp_path)
    wait_for_records(folder, 2, driver, 200.0)
    driver.kill()
    driver.wait()
    before = {record.name: record for record in read_trial_records(folder)}
    assert 2 <= len(before) < 4
    resumed = start_command("sweep", "resume", folder)
    output, errors = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, errors[-3000:]
    after = {record.name: record for record in read_trial_records(folder)}
    assert len(after) == 4
    assert {name: after[name] for name in before} == before  # no trial was run again
    expected = read_trial_records(f"{root}/sweeps/undisturbed")
    assert [r.score for r in after.values()] == pytest.approx([r.score for r in expected], abs=1e-6)
    best_numbers = {records.find_best_records(trials)[None].number for trials in (list(after.values()), expected)}
    assert len(best_numbers) == 1
    assert f"{folder}/best.yaml" in output


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_sweep_prints_how_to_resume_it(parts: str, tmp_path: Path) -> None:
    driver = start_sweep(make_sweep(parts, tmp_path, {"train": {"learning_rate": 0.001}}, space=SLOW), tmp_path)
    wait_for_records(f"{tmp_path}/search", 1, driver, 200.0)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130, errors[-3000:]
    assert f"focus-ray sweep resume {tmp_path}/search" in errors
    assert json.loads(Path(tmp_path, "search/state.json").read_text())["state"] == "stopped"
    trials = read_trial_records(f"{tmp_path}/search")
    assert 1 <= len(trials) < 40
    assert {record.status for record in trials} == {"finished"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_sweep_leaves_no_actor_no_placement_group_and_no_file(
    ray_cluster: None, parts: str, tmp_path: Path, num_workers: int
) -> None:
    base = {"cluster": {"num_workers": num_workers, "use_gpu": False}}
    config = make_sweep(parts, tmp_path, base, space={**SLOW, "train.steps": [2000]})

    def stop() -> None:
        """Stops the sweep while its first trials run: with two workers, the trainer has begun to write files."""
        begun = Path(tmp_path, "search", "scratch" if num_workers > 1 else "sweep.yaml")
        wait_for(begun.exists, 100.0, "the first trial")
        time.sleep(5.0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    assert run_sweep(config).stopped
    wait_for_cleanup()
    assert not Path(tmp_path, "search/scratch").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_trials_with_two_workers_train_with_ddp(ray_cluster: None, parts: str, tmp_path: Path) -> None:
    base = {"cluster": {"num_workers": 2, "use_gpu": False}, "train": {"steps": 2}}
    trials = run_sweep(make_sweep(parts, tmp_path, base, space={"train.learning_rate": [1e-4, 1e-2]})).records
    assert [(record.status, record.steps) for record in trials] == [("finished", 4)] * 2
    assert {result["shared"] for record in trials for result in record.categories.values()} == {"images"}
    wait_for_cleanup()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_trial_trains_one_network_for_all_categories(
    ray_cluster: None, parts: str, tmp_path: Path, num_workers: int
) -> None:
    cluster = {"num_workers": num_workers, "use_gpu": False}
    base = {"cluster": cluster, "train": {"steps": 2, "scope": "plant"}}
    trials = run_sweep(make_sweep(parts, tmp_path, base, space={"train.learning_rate": [1e-4, 1e-1]})).records
    assert [(record.status, record.steps) for record in trials] == [("finished", 2)] * 2  # not for each category
    assert all(list(record.category_scores) == list(CATEGORIES) for record in trials)
    assert trials[0].category_scores != trials[1].category_scores
    wait_for_cleanup()
