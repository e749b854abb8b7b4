"""A real sweep: what it finds and leaves, a driver killed and taken up again, a stop, trials that fail, workers of DDP.

Long, because its tests share fixtures that cost seconds.
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

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from s3_server import S3Server
from small_set import CATEGORIES, draw_parts, ingest_parts, small_config
from waiting import wait_for_records

from focus_ray.cluster.ownership import FINGERPRINTS, Heartbeat, check_fingerprints, read_state
from focus_ray.config import load_config
from focus_ray.data.ingest import ingest
from focus_ray.errors import ConfigError, DataError, SweepError, TrainingError
from focus_ray.storage import list_names
from focus_ray.sweep import records
from focus_ray.sweep.driver import Outcome, sweep
from focus_ray.sweep.proposer import Proposer
from focus_ray.sweep.race import Judge
from focus_ray.sweep.records import Record, read_records, read_sweep
from focus_ray.sweep.report import write_report
from focus_ray.sweep.settings import SweepConfig, parse_sweep
from focus_ray.sweep.shared import judging_split, load_images
from focus_ray.sweep.trial import judge_category

PLAIN = {"image_alignment": {"group": "none"}}
SPACE = {"density.num_channels": [4, 8, 32], "density.shrinkage": [0.5, 4.0]}
SLOW = {"train.seed": list(range(40)), "train.epochs": [40]}  # a sweep that is not over before it is interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def sweep_of(data: str, storage: Path | str, base: dict[str, Any] | None = None, **keys: Any) -> SweepConfig:
    # a coreset hangs on the last digits, which sharing changes; its own tests are in test_trial
    plain = {"data": {"categories": list(CATEGORIES)}, "model": PLAIN, "density": {"coreset": 0}}
    sections = {**plain, **(base or {})}
    tree = small_config(data, storage, **sections).model_dump(mode="json")
    return parse_sweep({"base": tree, "space": SPACE, "searcher": "grid", "name": "found", **keys})


def judged_alone(config: SweepConfig) -> list[Record]:
    """All trials one after the other in this process: no Ray, nothing shared, nothing cut."""
    base, proposer, found = config.base_config(), Proposer(config), []
    images = {
        category: load_images(
            base,
            category,
            judging_split(base, category, config.objective).plan(base),
            config.objective,
            base.model.image_size_px,
        )
        for category in CATEGORIES
    }
    while (asked := proposer.ask()) is not None:
        number, point = asked
        settings = config.base_config(point)
        parts = [
            judge_category(settings, category, images[category], config.objective, torch.device("cpu"))
            for category in CATEGORIES
        ]
        score = records.mean_score([part.score for part in parts if part.score is not None])
        proposer.tell(number, point, score)
        ended = {part.category: dataclasses.asdict(part) for part in parts}
        epochs = sum(part.epochs for part in parts)
        found.append(Record(number, None, point, "finished", score, ended, epochs=epochs))
    return found


def what_is_left() -> tuple[list[str], list[str]]:
    """Classes of living actors, and placement groups, of the cluster that this process is in."""
    import ray
    from ray._private.state import actors

    alive = [str(actor["ActorClassName"]) for actor in actors().values() if actor["State"] != "DEAD"]
    table = ray.util.placement_group_table()
    return alive, [group["name"] or key for key, group in table.items() if group["state"] != "REMOVED"]


def wait_until_nothing_is_left(timeout_s: float = 20.0) -> tuple[list[str], list[str]]:
    deadline = time.monotonic() + timeout_s
    while (left := what_is_left()) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def found(ray_cluster: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        (root / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        return sweep(sweep_of(data, root))


# What it finds


@pytest.mark.ray
def test_every_trial_is_judged_on_every_category_and_the_best_is_the_highest_mean(found: Outcome) -> None:
    assert [record.number for record in found.records] == list(range(6))
    for record in found.records:
        assert (record.status, list(record.categories)) == ("finished", list(CATEGORIES))
        scores = [part["score"] for part in record.categories.values()]
        assert record.score == pytest.approx(sum(scores) / 2)
    highest = max(record.score for record in found.records if record.score)
    assert found.best[None].score == pytest.approx(highest, abs=1e-4)  # of equal ones the first
    assert len({tuple(record.point.values()) for record in found.records}) == 6
    assert (found.stopped, found.failed) == (False, [])


@pytest.mark.ray
def test_the_best_configuration_is_ready_to_train_and_says_where_it_is_from(found: Outcome) -> None:
    config = load_config(f"{found.root}/best.yaml")
    point = found.best[None].point
    assert (config.density.num_channels, config.density.shrinkage) == tuple(point.values())
    assert config.name == "found-best"
    assert "label-free validation score" in Path(found.root, "best.yaml").read_text().splitlines()[0]


@pytest.mark.ray
def test_table_plots_and_page_lie_beside_the_records(found: Outcome) -> None:
    table = pq.read_table(f"{found.root}/trials.parquet")
    assert table.num_rows == 6
    assert {"score:gear", "param:density.shrinkage"} <= set(table.column_names)
    assert table.schema.metadata[b"labelled"] == b"False"
    page = Path(found.root, "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # nothing was trained: no learning curves
    assert "a hint, not a measurement" in page
    names = set(os.listdir(found.root))
    assert {"sweep.yaml", "best.yaml", "report.md", "report.json", "parallel.png", "importance.png"} <= names


@pytest.mark.slow
@pytest.mark.ray
def test_nothing_but_the_results_is_left(found: Outcome) -> None:
    assert wait_until_nothing_is_left() == ([], [])
    assert "scratch" not in os.listdir(found.root)
    session = Path(os.environ["RAY_TMPDIR"], "ray", "session_latest", "artifacts")
    assert list(session.glob("*/found-*")) == []
    assert os.listdir(Path(found.root).parent / "tmp") == []


@pytest.mark.ray
def test_features_are_made_once_and_the_scores_are_those_without_sharing(
    found: Outcome, data: str, tmp_path: Path
) -> None:
    shared = {part["shared"] for record in found.records for part in record.categories.values()}
    assert shared == {"features"}
    alone = judged_alone(sweep_of(data, tmp_path))
    assert [record.score for record in alone] == pytest.approx([r.score for r in found.records], abs=1e-6)


@pytest.mark.slow
@pytest.mark.ray
def test_what_is_over_the_budget_is_told_and_every_trial_makes_its_own(
    ray_cluster: None, found: Outcome, data: str, tmp_path: Path
) -> None:
    said: list[str] = []
    small = sweep(sweep_of(data, tmp_path, shared_budget_mb=1.0), log=said.append)
    assert any("features of board take" in line and "shared_budget_mb" in line for line in said)
    assert [record.score for record in small.records] == pytest.approx([r.score for r in found.records], abs=1e-6)


@pytest.mark.slow
@pytest.mark.ray
def test_one_sweep_a_category_finds_the_best_of_each(
    ray_cluster: None, found: Outcome, data: str, tmp_path: Path
) -> None:
    each = sweep(sweep_of(data, tmp_path, scope="per_category"))
    for category in CATEGORIES:
        best = max(record.categories[category]["score"] for record in found.records)
        assert each.best[category].score == pytest.approx(best, abs=1e-4)  # of equal ones the first
        assert load_config(f"{each.root}/best-{category}.yaml").data.categories == (category,)


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_that_fails_is_told_and_the_others_go_on(ray_cluster: None, data: str, tmp_path: Path) -> None:
    space = {"model.weights": ["random", str(tmp_path / "absent.pth")], "density.shrinkage": [1.0, 2.0]}
    outcome = sweep(sweep_of(data, tmp_path, space=space, share_work=False, objective="pixel_auroc"))
    assert [record.status for record in outcome.records] == ["finished", "finished", "failed", "failed"]
    assert all("absent.pth" in str(record.reason) for record in outcome.failed)
    assert {part["shared"] for record in outcome.records for part in record.categories.values()} == {"nothing"}
    assert "pixel_auroc on LABELLED test images" in Path(outcome.root, "best.yaml").read_text()
    assert wait_until_nothing_is_left() == ([], [])


@pytest.mark.slow
@pytest.mark.ray
def test_where_every_trial_fails_the_sweep_does(ray_cluster: None, data: str, tmp_path: Path) -> None:
    space = {"model.weights": [str(tmp_path / "absent.pth")]}
    with pytest.raises(SweepError, match=r"none of 1 trials came to a score; trial 00000: .*absent.pth"):
        sweep(sweep_of(data, tmp_path, space=space))


def test_a_labelled_objective_is_marked_in_table_yaml_and_page(data: str, tmp_path: Path) -> None:
    config = sweep_of(data, tmp_path, objective="pixel_auroc", space={"density.shrinkage": [1.0, 2.0]})
    write_report(str(tmp_path), config, [a_record(point={"density.shrinkage": value}) for value in (1.0, 2.0)])
    best = (tmp_path / "best.yaml").read_text()
    assert "pixel_auroc on LABELLED test images" in best
    assert "no fair test" in best
    assert "<span class=mark>labelled</span>" in (tmp_path / "report.html").read_text()
    assert "LABELLED" in (tmp_path / "report.md").read_text()
    assert pq.read_schema(tmp_path / "trials.parquet").metadata[b"labelled"] == b"True"


# A race


RATES = {"train.learning_rate": [1e-2, 1e-4, 1e-3, 0.03]}  # none diverges: what loses loses to the first
TRAINED: dict[str, Any] = {"train": {"epochs": 3, "learning_rate_head": 0.05}, "density": {"coreset": 0}}
HALVING: dict[str, Any] = {"race": {"enabled": True}, "scheduler": {"kind": "asha"}}


@pytest.fixture(scope="module")
def raceless(data: str) -> list[Record]:
    """Four rates, every trial to its end."""
    return judged_alone(sweep_of(data, "unused", TRAINED, space=RATES))


def test_a_race_finds_the_same_best_for_fewer_epochs(raceless: list[Record], data: str) -> None:
    judge = Judge(sweep_of(data, "unused", TRAINED, space=RATES, **HALVING), CATEGORIES, 3)
    ended = []
    epochs = 0
    for record in raceless:  # whose scores do not depend on what the judge says of them
        judge.begin(record.number)
        reason = None
        for category, curve in record.curves().items():
            for epoch, score in curve:
                epochs += reason is None
                reason = reason or judge.report(record.number, category, epoch, score, epoch == 3)
        status = "finished" if reason is None else "cut"
        ended.append(dataclasses.replace(record, status=status, score=record.score if reason is None else None))
    assert records.best_of(ended)[None] == records.best_of(raceless)[None]
    assert sum(record.epochs for record in raceless) == 4 * 2 * 3
    assert epochs <= 0.6 * 4 * 2 * 3, epochs
    assert [record.status for record in ended] == ["finished", "cut", "cut", "cut"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_race_on_ray_finds_the_best_of_all_trials_to_their_end(
    ray_cluster: None, raceless: list[Record], data: str, tmp_path: Path
) -> None:
    raced = sweep(sweep_of(data, tmp_path, TRAINED, space=RATES, max_concurrent_trials=1, **HALVING))
    whole = records.best_of(raceless)[None]
    assert raced.best[None].point == whole.point
    assert raced.best[None].score == pytest.approx(whole.score)
    epochs = sum(record.epochs for record in raced.records)
    assert epochs <= 0.6 * 4 * 2 * 3, epochs
    reasons = [str(record.reason) for record in raced.records if record.status == "cut"]
    assert len(reasons) == 3
    assert all(reason.startswith(("race: ", "successive halving: ")) for reason in reasons)
    assert "curves.png" in os.listdir(raced.root)


# Refusals


@pytest.mark.ray
def test_a_name_that_is_taken_is_refused(found: Outcome, data: str) -> None:
    with pytest.raises(SweepError, match=r"found holds a sweep already: give another name, or `focus-ray sweep resume"):
        sweep(sweep_of(data, Path(found.root).parent))


def test_more_channels_than_there_are_are_refused_before_anything_starts(data: str, tmp_path: Path) -> None:
    space = {"density.num_channels": [32, 100], "density.layers": [["layer1"]]}
    with pytest.raises(
        ConfigError, match=r"at density.num_channels=100, density.layers=\['layer1'\]: .* have 64 channels"
    ):
        sweep(sweep_of(data, tmp_path, space=space))
    assert os.listdir(tmp_path) == []


def test_a_category_that_is_not_there_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no category nut; it has board, gear"):
        sweep(sweep_of(data, tmp_path, {"data": {"categories": ["nut"]}}))


@pytest.mark.ray
def test_a_sweep_that_the_cluster_cannot_hold_is_refused_and_takes_no_name(
    ray_cluster: None, data: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"5 worker\(s\) of 1 CPU need 5 CPU; the cluster has 4 CPU"):
        sweep(sweep_of(data, tmp_path, {"cluster": {"num_workers": 5, "use_gpu": False}}))
    with pytest.raises(TrainingError, match=r"need 1 CPU; the cluster has .* labelled {'site': 'nowhere'}"):
        sweep(sweep_of(data, tmp_path, {"cluster": {"labels": {"site": "nowhere"}, "use_gpu": False}}))
    assert list_names(f"{tmp_path}/found") == []


# The folder


def a_record(**keys: Any) -> Record:
    part = {"gear": {"score": 0.5, "curve": [[0, 0.5]]}}
    return Record(
        **{
            "number": 3,
            "stage": None,
            "point": {"a": 1},
            "status": "finished",
            "score": 0.5,
            "categories": part,
            **keys,
        }
    )


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for record in (a_record(), a_record(stage="gear", status="cut", score=None, reason="lost")):
        records.write_record(str(tmp_path), record)
    assert [dataclasses.replace(r, stage=None).name for r in read_records(str(tmp_path))] == ["00003", "00003"]
    assert read_records(str(tmp_path))[0] == a_record()


def test_a_record_that_cannot_be_understood_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "00001.json").write_text('{"number": 1')
    with pytest.raises(
        SweepError, match=r"trials/00001.json: not a trial's record .*remove it to have the trial run again"
    ):
        read_records(str(tmp_path))


def test_a_driver_that_gives_no_sign_of_life_is_lost(tmp_path: Path) -> None:
    assert read_state(str(tmp_path))["state"] == "lost"
    alive = Heartbeat(str(tmp_path))
    assert read_state(str(tmp_path), lambda seconds: None)["state"] == "lost"  # no time passed: no further sign
    assert read_state(str(tmp_path), lambda seconds: alive._write("running"))["state"] == "running"
    alive.close("stopped")
    assert read_state(str(tmp_path))["state"] == "stopped"


def test_changed_images_are_no_ground_to_go_on_from(data: str, tmp_path: Path) -> None:
    records.claim(str(tmp_path), sweep_of(data, tmp_path), {"gear": "a", "board": "b"})
    check_fingerprints(str(tmp_path), {"gear": "a", "board": "b"})
    with pytest.raises(
        DataError, match=r"the images of gear have changed since it began, .*: start anew under another"
    ):
        check_fingerprints(str(tmp_path), {"gear": "x", "board": "b"})


def test_a_sweep_whose_driver_died_as_it_began_can_be_taken_up(data: str, tmp_path: Path) -> None:
    records.claim(str(tmp_path), sweep_of(data, tmp_path), {"gear": "a"})
    (tmp_path / FINGERPRINTS).unlink()
    check_fingerprints(str(tmp_path), {"gear": "b"})
    assert json.loads((tmp_path / FINGERPRINTS).read_text()) == {"gear": "b"}


def test_a_folder_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"no sweep here: give the folder that `focus-ray sweep` named"):
        read_sweep(str(tmp_path))


def test_a_sweep_comes_back_from_its_folder(data: str, tmp_path: Path) -> None:
    config = sweep_of(data, tmp_path, race={"enabled": True, "order": ["gear"]})
    records.claim(str(tmp_path), config, {})
    assert read_sweep(str(tmp_path)) == config


# Killed and stopped drivers, in processes of their own


def start(config: SweepConfig, folder: Path, *more: str) -> subprocess.Popen[str]:
    path = folder / "sweep-to-run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return command("sweep", str(path), *more)


def command(*arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "focus_ray.cli", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_killed_driver_loses_no_finished_trial_and_the_resumed_sweep_ends_with_the_same_best(
    s3: S3Server, data: str, tmp_path: Path
) -> None:
    root = s3.new_uri()
    uri = f"{root}/data"
    ingest(draw_parts(tmp_path / "images"), uri, progress=False)
    base = {"train": {"epochs": 4, "learning_rate": 0.01}}
    config = sweep_of(uri, f"{root}/sweeps", base, max_concurrent_trials=1, race={"enabled": True})
    place = f"{root}/sweeps/found"
    whole = start(config.model_copy(update={"name": "whole"}), tmp_path)
    assert whole.wait(timeout=250) == 0, whole.communicate()[1][-3000:]
    driver = start(config, tmp_path)
    wait_for_records(place, 2, driver, 200.0)
    driver.kill()
    driver.wait()
    before = {record.name: record for record in read_records(place)}
    assert 2 <= len(before) < 6
    again = command("sweep", "resume", place)
    output, errors = again.communicate(timeout=250)
    assert again.returncode == 0, errors[-3000:]
    after = {record.name: record for record in read_records(place)}
    assert len(after) == 6
    assert {name: after[name] for name in before} == before  # not one was run again
    expected = read_records(f"{root}/sweeps/whole")
    assert [r.score for r in after.values()] == pytest.approx([r.score for r in expected], abs=1e-6)
    assert records.best_of(list(after.values()))[None].number == records.best_of(expected)[None].number
    assert f"{place}/best.yaml" in output


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_leaves_no_process_or_file_and_says_how_to_go_on(
    number: signal.Signals, data: str, tmp_path: Path
) -> None:
    config = sweep_of(data, tmp_path, {"train": {"learning_rate": 0.001}}, space=SLOW)
    environment = tmp_path / "tmp"
    environment.mkdir()
    os.environ["TMPDIR"] = str(environment)
    try:
        driver = start(config, tmp_path)
    finally:
        del os.environ["TMPDIR"]
    wait_for_records(f"{tmp_path}/found", 1, driver, 200.0)
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors[-3000:]
    assert f"stopped; go on with: focus-ray sweep resume {tmp_path}/found" in errors
    assert json.loads(Path(tmp_path, "found/state.json").read_text())["state"] == "stopped"
    assert list(environment.glob("focus-ray-sweep-*")) == []
    assert not Path(tmp_path, "found/scratch").exists()
    done = read_records(f"{tmp_path}/found")
    assert 1 <= len(done) < 40
    assert {record.status for record in done} == {"finished"}


STOPPED_IN_A_CLUSTER_THAT_STAYS = """
import json, os, sys, threading, time
import ray
from focus_ray.sweep.settings import parse_sweep
from focus_ray.storage import list_names
from focus_ray.sweep.driver import sweep
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
    outcome = sweep(config, log=lambda line: print(line, file=sys.stderr))
    deadline = time.monotonic() + 60
    here = ray.get_runtime_context().gcs_address
    while True:
        alive = [actor.class_name for actor in list_actors(here, filters=[("state", "!=", "DEAD")])]
        # Ray's own: one a cluster; and a watcher of Train's that stays, without a name to end it by, where its controller
        # was ended by force before it had begun to watch
        left = [name for name in alive if name not in ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")]
        groups = [group.placement_group_id for group in list_placement_groups(here, filters=[("state", "!=", "REMOVED")])]
        free = ray.available_resources().get("CPU")
        if (not left and not groups and free == 4.0) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    print(json.dumps({"stopped": outcome.stopped, "actors": left, "groups": groups, "free": free}))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_after_a_stop_no_actor_and_no_placement_group_is_left_in_a_cluster_that_stays(
    data: str, tmp_path: Path, num_workers: int
) -> None:
    base = {"cluster": {"num_workers": num_workers, "use_gpu": False}}
    config = sweep_of(data, tmp_path, base, space={**SLOW, "train.epochs": [400]})
    arguments = json.dumps(config.model_dump(mode="json", exclude_none=True))
    line = [sys.executable, "-c", STOPPED_IN_A_CLUSTER_THAT_STAYS, arguments, "5"]
    if num_workers == 1:  # a trial of 400 epochs does not end by itself: stop while the first ones run
        line[-1] = "0"
        config = sweep_of(data, tmp_path, base, space=SLOW)
        line[-2] = json.dumps(config.model_dump(mode="json", exclude_none=True))
    ended = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    assert told == {"stopped": True, "actors": [], "groups": [], "free": 4.0}
    assert not Path(tmp_path, "found/scratch").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_trials_of_two_workers_train_with_ddp_and_status_and_report_tell_of_them(data: str, tmp_path: Path) -> None:
    base = {"cluster": {"num_workers": 2, "use_gpu": False}, "train": {"epochs": 2}}
    config = sweep_of(data, tmp_path, base, space={"train.learning_rate": [1e-4, 1e-2]})
    driver = start(config, tmp_path)
    _, errors = driver.communicate(timeout=250)
    assert driver.returncode == 0, errors[-3000:]
    found = read_records(f"{tmp_path}/found")
    assert [(record.status, record.epochs) for record in found] == [("finished", 4)] * 2
    assert {part["shared"] for record in found for part in record.categories.values()} == {"images"}
    assert not Path(tmp_path, "found/scratch").exists()
    status = command("sweep", "status", f"{tmp_path}/found")
    told = json.loads(status.communicate(timeout=60)[0].partition("\n**")[0])
    assert (told["state"], told["planned"], told["finished"], told["epochs"]) == ("finished", 2, 2, 8)
    Path(tmp_path, "found/report.html").unlink()
    report = command("sweep", "report", f"{tmp_path}/found")
    report.communicate(timeout=60)
    assert report.returncode == 0
    assert Path(tmp_path, "found/report.html").exists()
