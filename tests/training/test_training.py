"""Training for real: one, two and three processes agree; Ray Train, Ray Data, a killed worker, two nodes, failures.

Long, because its tests share fixtures that cost seconds.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from places import free_port
from small_set import NUM_TEST, NUM_TRAIN, corrupt_image, draw_parts, fit_alone, ingest_parts, small_config
from torch import Tensor
from waiting import wait_for

from focus_ray.bundle.bundle import find_bundles, read_bundle, read_manifest, read_statistics
from focus_ray.cluster.ownership import FINGERPRINTS, Heartbeat
from focus_ray.data.read import decode_rows, read_index
from focus_ray.density.moments import Moments
from focus_ray.errors import DataError, TrainingError
from focus_ray.fitting.fit import FitResult, build_detector, fit
from focus_ray.fitting.passes import compute_statistics
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BatchSchedule, build_shard, fits_memory
from focus_ray.fitting.split import NO_ROWS, SplitPlan, plan_category, split_category, split_key
from focus_ray.fitting.state import TrainState
from focus_ray.ingestion.ingest import ingest
from focus_ray.training.training import train

CPU = torch.device("cpu")
CASES = [(kind, group) for kind in ("gaussian", "nearest") for group in ("none", "rotation_translation")]
CASES.append(("learnt", "rotation_translation"))
TRAINED = {"train": {"epochs": 2}, "cluster": {"num_workers": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def case_config(data: str, case: tuple[str, str]) -> Config:
    """case: density.kind, or `learnt` for the default's metric and profile, and the transform group."""
    kind, group = case
    alignment = {"group": group, "min_drop": 0.0}
    density: dict[str, Any] = {"kind": kind, "max_images": 12}
    if kind == "learnt":
        density.update(kind="nearest", reduction="discriminant")
    scoring = {"image_score": "profile" if kind == "learnt" else "maximum"}
    return small_config(data, "unused", density=density, model={"image_alignment": alignment}, scoring=scoring)


def images_to_score(data: str) -> Tensor:
    rows = read_index(data, "gear", split="test")["row"].to_pylist()
    return torch.cat([torch.from_numpy(batch) for batch in decode_rows(data, "gear", rows, 64)])


def relative(first: Tensor, second: Tensor) -> float:
    """Returns the Frobenius norm of the difference divided by that of the first tensor."""
    return float((first - second).double().norm() / first.double().norm())


def assert_same_moments(first: Moments, second: Moments, bound: float) -> None:
    assert first.count == second.count
    assert relative(first.mean, second.mean) <= bound
    assert relative(first.scatter, second.scatter) <= bound


# The plan


def test_a_plan_assigns_every_normal_training_image(data: str) -> None:
    plan = plan_category(small_config(data, "unused"), "gear")
    index = read_index(data, "gear", split="train")
    assert sorted([*plan.fit_rows, *plan.holdout_rows]) == index["row"].to_pylist()
    assert len(plan.holdout_rows) == round(0.2 * NUM_TRAIN)
    assert len(plan.folds) == len(plan.fit_rows)
    assert list(plan.fit_rows) == sorted(plan.fit_rows)
    assert list(plan.holdout_rows) == sorted(plan.holdout_rows)


def test_a_plan_is_the_same_each_time_and_another_for_another_seed(data: str) -> None:
    config = small_config(data, "unused")
    assert split_category(config, "gear") == split_category(config, "gear")
    other = small_config(data, "unused", train={"seed": 1})
    assert plan_category(other, "gear").holdout_rows.tolist() != plan_category(config, "gear").holdout_rows.tolist()


@pytest.mark.parametrize("settings", [{}, {"selection": {"enabled": True, "fraction": 0.2}}])
def test_a_rule_gives_every_image_the_part_that_the_rows_say(data: str, settings: dict[str, Any]) -> None:
    config = small_config(data, "unused", **settings)
    split, plan = split_category(config, "gear"), plan_category(config, "gear")
    index = read_index(data, "gear", split="train")
    hashes = dict(zip(index["row"].to_pylist(), index["content_hash"].to_pylist(), strict=True))
    parts = {"fit": plan.fit_rows, "validation": plan.validation_rows, "holdout": plan.holdout_rows}
    assert {hashes[row]: part for part, rows in parts.items() for row in rows} == {
        found: split.part_of(found) for found in hashes.values()
    }
    assert [len(rows) for rows in parts.values()] == [split.num_fit, split.num_validation, split.num_holdout]
    assert split.num_images == plan.num_images


def test_a_rule_is_small_and_gives_the_rows_again_elsewhere(data: str) -> None:
    config = small_config(data, "unused")
    split, plan = pickle.loads(pickle.dumps(split_category(config, "gear"))), plan_category(config, "gear")
    assert len(pickle.dumps(split)) < 1000
    for name, value in vars(split.plan(config)).items():
        assert np.array_equal(value, getattr(plan, name)), name


def test_the_split_of_a_fixed_set_does_not_change() -> None:
    """Keys of four contents under seed 0, found with sha256sum: another order would change every model's images."""
    keys = {name: split_key(0, name)[:6] for name in "abcd"}
    assert keys == {"a": "9df3c5", "b": "e02192", "c": "be086d", "d": "7d98c2"}


def test_no_more_images_are_held_out_than_calibrate(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_CALIBRATION_IMAGES", 2)
    plan = plan_category(small_config(data, "unused"), "gear")
    assert (len(plan.holdout_rows), len(plan.fit_rows)) == (2, NUM_TRAIN - 2)


def test_cross_calibration_scores_no_more_images_than_asked(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focus_ray.fitting.fit.MAX_CALIBRATION_IMAGES", 10)
    config = small_config(data, "unused", calibration={"method": "cross"})
    assert fit_alone(config).calibration.num_images == 10


def test_a_plan_does_not_depend_on_the_order_of_the_rows(data: str, tmp_path: Path) -> None:
    images = draw_parts(tmp_path / "images")
    for path in sorted((images / "gear/train/good").iterdir()):
        path.rename(path.with_name(f"{99 - int(path.stem):03}.png"))
    ingest(images, tmp_path / "data", categories=["gear"], progress=False)
    parts = []
    for uri in (data, str(tmp_path / "data")):
        plan = plan_category(small_config(uri, "unused"), "gear")
        index = read_index(uri, "gear")
        hashes = dict(zip(index["row"].to_pylist(), index["content_hash"].to_pylist(), strict=True))
        folds = {hashes[row]: fold for row, fold in zip(plan.fit_rows, plan.folds, strict=True)}
        parts.append((folds, {hashes[row] for row in plan.holdout_rows}, plan.fingerprint))
    assert parts[0] == parts[1]


def test_cross_calibration_holds_nothing_out_and_fills_its_folds_evenly(data: str) -> None:
    plan = plan_category(small_config(data, "unused", calibration={"method": "cross"}), "gear")
    assert (len(plan.fit_rows), len(plan.holdout_rows)) == (NUM_TRAIN, 0)
    assert sorted(np.bincount(plan.folds)) == [4, 5, 5, 5, 5]


@given(st.lists(st.integers(0, 2**40), max_size=40), st.integers(1, 9))
def test_the_workers_slices_are_the_whole_in_order(values: list[int], num_workers: int) -> None:
    plan = SplitPlan(np.array(values, dtype=np.int64), NO_ROWS, NO_ROWS, NO_ROWS, "")
    slices = [list(plan.share(rank, num_workers).fit_rows) for rank in range(num_workers)]
    assert [value for part in slices for value in part] == values
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(st.integers(2, 500), st.integers(1, 8), st.integers(2, 64))
def test_the_agreed_steps_fit_every_worker(num_images: int, num_workers: int, batch_size: int) -> None:
    share = num_images // num_workers
    if share < 2:
        with pytest.raises(DataError, match=r"cluster\.num_workers"):
            BatchSchedule.agree(num_images, num_workers, batch_size)
        return
    steps = BatchSchedule.agree(num_images, num_workers, batch_size)
    assert 2 <= steps.batch_size <= batch_size
    assert steps.steps >= 1
    assert steps.steps * steps.batch_size <= share


# One, two and three workers, without Ray


def fit_as_worker(rank: int, port: int, configs: dict[Any, Config], data: str, folder: str, num_workers: int) -> None:
    """Runs all configurations in one of several gloo processes. The first process writes the results."""
    if rank >= num_workers:
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    found = {name: outcome(config, data, rank, num_workers) for name, config in configs.items()}
    if rank == 0:
        torch.save(found, Path(folder) / f"{num_workers}.pt")
    dist.destroy_process_group()


def fit_as_workers(rank: int, ports: dict[int, int], configs: dict[Any, Config], data: str, folder: str) -> None:
    """Runs all configurations with several numbers of workers, one after the other."""
    for num_workers, port in ports.items():
        fit_as_worker(rank, port, configs, data, folder, num_workers)


def outcome(config: Config, data: str, rank: int = 0, num_workers: int = 1) -> dict[str, Any]:
    """Returns moments, scores of the test images and thresholds of a run."""
    plan = plan_category(config, "gear")
    shard = build_shard(config, "gear", plan, rank, num_workers)
    result = fit(config, shard, len(plan.fit_rows), CPU, rank=rank)
    return summary(config, result, data)


def summary(config: Config, result: FitResult, data: str) -> dict[str, Any]:
    moments = result.statistics.moments
    detector = build_detector(config, result.net, result.reduction, result.statistics)
    return {
        "count": moments.count,
        "mean": moments.mean,
        "scatter": moments.scatter,
        "scores": detector(images_to_score(data)).score,
        "metric": result.reduction.projection,
        "threshold": result.calibration.image_threshold,
        "aligned": result.notes.alignment is not None and result.notes.alignment.enabled,
    }


@pytest.fixture(scope="module")
def outcomes(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    """Number of workers -> case -> outcome."""
    folder = tmp_path_factory.mktemp("outcomes")
    configs = {case: case_config(data, case) for case in CASES}
    ports = {3: free_port(), 2: free_port()}
    torch.multiprocessing.spawn(fit_as_workers, (ports, configs, data, str(folder)), nprocs=3)
    found = {num_workers: torch.load(folder / f"{num_workers}.pt") for num_workers in ports}
    return {1: {case: outcome(config, data) for case, config in configs.items()}, **found}


@pytest.fixture(scope="module")
def plain_outcome(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trains in two plain processes and returns the outcome."""
    folder = tmp_path_factory.mktemp("plain")
    configs = {"trained": small_config(data, "unused", **TRAINED)}
    torch.multiprocessing.spawn(fit_as_workers, ({2: free_port()}, configs, data, str(folder)), nprocs=2)
    return torch.load(folder / "2.pt")["trained"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_several_workers_give_the_moments_and_scores_of_one(
    outcomes: dict[int, dict[Any, Any]], case: tuple[str, str], num_workers: int
) -> None:
    single, several = outcomes[1][case], outcomes[num_workers][case]
    bound = 1e-5
    assert single["count"] == several["count"] == NUM_TRAIN - round(0.2 * NUM_TRAIN)
    assert single["aligned"] == several["aligned"] == (case[1] != "none")
    assert relative(single["mean"], several["mean"]) <= bound
    assert relative(single["scatter"], several["scatter"]) <= bound
    assert relative(single["metric"], several["metric"]) <= bound
    spread = float(single["scores"].std())
    assert spread > 0
    far = 1e-3 * spread
    assert float((single["scores"] - several["scores"]).abs().max()) <= far
    assert abs(single["threshold"] - several["threshold"]) <= far


def test_the_same_seed_gives_the_same_moments_and_scores(data: str) -> None:
    config = small_config(data, "unused", train={"epochs": 1, "batch_size_per_worker": 4})
    first, second = (summary(config, fit_alone(config), data) for _ in range(2))
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["scatter"], second["scatter"])
    assert torch.equal(first["scores"], second["scores"])


@pytest.mark.parametrize("method", ["split", "cross"])
def test_a_streamed_share_gives_the_images_of_one_in_memory(data: str, method: str) -> None:
    config = small_config(data, "unused", calibration={"method": method})
    streamed = small_config(data, "unused", calibration={"method": method}, data={"uri": data, "memory_budget_mb": 0})
    plan = plan_category(config, "gear")
    assert fits_memory(config, plan)
    assert not fits_memory(streamed, plan)
    in_memory, from_stream = (build_shard(item, "gear", plan, 1, 2) for item in (config, streamed))
    assert torch.equal(torch.cat(list(in_memory.fit_batches())), torch.cat(list(from_stream.fit_batches())))
    in_fold = np.flatnonzero(in_memory.fit_folds() == 2).tolist()
    for passes in (lambda shard: shard.fit_batches(in_fold), lambda shard: shard.holdout_batches()):
        batches = [list(passes(shard)) for shard in (in_memory, from_stream)]
        assert [batch.tolist() for batch in batches[0]] == [batch.tolist() for batch in batches[1]]


# Ray Train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(ray_cluster: None, data: str, runs: Path) -> Config:
    """Trains a run with two workers and returns its configuration."""
    config = small_config(data, runs, **TRAINED)
    assert train(config) == {"gear": f"{runs}/small/bundles/gear"}
    return config


@pytest.mark.ray
def test_two_workers_train_a_bundle_that_loads_and_scores(trained: Config, data: str, runs: Path) -> None:
    bundle = read_bundle(find_bundles(f"{runs}/small")["gear"])
    assert [entry["epoch"] for entry in bundle.manifest["metrics"]["history"]] == [0, 1]
    assert bundle.manifest["metrics"]["num_workers"] == 2
    assert bundle.manifest["moments"]["count"] == bundle.manifest["data"]["num_fit"] == 19
    scored = bundle.detector(images_to_score(data))
    assert scored.anomaly_map.shape == (NUM_TEST, 64, 64)
    assert bool((scored.score > 0).all())


@pytest.mark.ray
def test_ray_train_agrees_with_two_plain_processes(
    trained: Config, data: str, runs: Path, plain_outcome: dict[str, Any]
) -> None:
    moments = read_statistics(f"{runs}/small/bundles/gear").moments
    assert relative(plain_outcome["mean"], moments.mean) <= 1e-6
    assert relative(plain_outcome["scatter"], moments.scatter) <= 1e-6
    scores = read_bundle(f"{runs}/small/bundles/gear").detector(images_to_score(data)).score
    assert relative(plain_outcome["scores"], scores) <= 1e-5


@pytest.mark.ray
def test_a_run_of_the_same_name_is_refused(trained: Config) -> None:
    with pytest.raises(TrainingError, match=r"small already holds a run: .* --resume"):
        train(trained)


@pytest.mark.ray
def test_resuming_a_finished_run_returns_at_once(trained: Config, runs: Path) -> None:
    version = read_manifest(f"{runs}/small/bundles/gear")["sha256"]
    said: list[str] = []
    start = time.monotonic()
    train(trained, resume=True, log=said.append)
    assert time.monotonic() - start < 2
    assert said == [f"gear: already trained, {runs}/small/bundles/gear", f"report: {runs}/small/report.html"]
    assert read_manifest(f"{runs}/small/bundles/gear")["sha256"] == version


@pytest.mark.ray
def test_resuming_with_another_configuration_is_refused(trained: Config) -> None:
    longer = trained.model_copy(update={"train": trained.train.model_copy(update={"epochs": 3})})
    with pytest.raises(TrainingError, match=r"train\.epochs was 2, is 3"):
        train(longer, resume=True)


@pytest.mark.ray
def test_resuming_may_change_settings_without_effect_on_the_result(trained: Config) -> None:
    budget = trained.data.model_copy(update={"memory_budget_mb": 77})
    cluster = trained.cluster.model_copy(update={"max_concurrent_categories": 1, "max_failures": 5})
    train(trained.model_copy(update={"data": budget, "cluster": cluster}), resume=True)


@pytest.mark.ray
def test_resuming_is_refused_where_images_changed_or_a_driver_is_alive(trained: Config, runs: Path, data: str) -> None:
    place = runs / "small" / FINGERPRINTS
    stored_yaml = place.read_text()
    try:
        place.write_text(json.dumps({"gear": "another"}))
        with pytest.raises(DataError, match="the images of gear have changed"):
            train(trained, resume=True)
    finally:
        place.write_text(stored_yaml)
    alive = Heartbeat(str(runs / "small"))
    try:
        with pytest.raises(TrainingError, match=rf"small: still running, as process {os.getpid()} on "):
            train(trained, resume=True)
    finally:
        alive.close("finished")


@pytest.mark.cluster
@pytest.mark.ray
def test_a_streamed_run_takes_the_agreed_steps_and_counts_every_image_once(
    ray_cluster: None, data: str, runs: Path
) -> None:
    config = small_config(
        data,
        runs,
        data={"uri": data, "categories": ["gear"], "memory_budget_mb": 0},
        train={"epochs": 2, "batch_size_per_worker": 4, "learning_rate": 1e-3},
        cluster={"num_workers": 2, "use_gpu": False},
    ).model_copy(update={"name": "streamed"})
    place = train(config)["gear"]
    plan = plan_category(config, "gear")
    agreed = BatchSchedule.agree(len(plan.fit_rows), 2, 4)
    assert [entry["steps"] for entry in read_manifest(place)["metrics"]["history"]] == [agreed.steps] * 2
    detector = read_bundle(place).detector
    images = torch.cat([torch.from_numpy(b) for b in decode_rows(data, "gear", plan.fit_rows, 64)])
    again = compute_statistics(detector.net, detector.reduction, [images], CPU).moments
    assert_same_moments(again, read_statistics(place).moments, 1e-5)


def train_worker_pids() -> list[int]:
    """Returns the Ray Train workers among the descendants of this process."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return [pid for pid in found if os.getpid() in ancestors(pid, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
    return seen


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_worker_is_replaced_and_the_run_continues_from_its_checkpoint(
    ray_cluster: None, data: str, runs: Path
) -> None:
    num_epochs = 16
    config = small_config(
        data,
        runs,
        train={"epochs": num_epochs, "batch_size_per_worker": 2},
        cluster={"num_workers": 2, "use_gpu": False, "max_failures": 1},
    ).model_copy(update={"name": "killed"})
    errors: list[BaseException] = []

    def run() -> None:
        try:
            train(config)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    before: list[dict[str, float]] = []

    def three_epochs_are_kept() -> bool:
        nonlocal before
        # a checkpoint that another follows has been taken note of
        for path in (runs / "killed/train/gear").glob("checkpoint_*/state.pt"):
            try:
                state = TrainState.from_dict(torch.load(path, map_location="cpu"))
            except (OSError, RuntimeError, EOFError):  # being written, or replaced by the next
                continue
            before = max(before, state.notes.history, key=len)
        return len(before) >= 3 or not thread.is_alive()

    wait_for(three_epochs_are_kept, 90, "a checkpoint of three epochs", 0.05)
    pids = train_worker_pids()
    assert (len(before), len(pids)) == (max(3, len(before)), 2), (before, errors)
    os.kill(pids[0], signal.SIGKILL)
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert not errors
    history = read_manifest(runs / "killed/bundles/gear")["metrics"]["history"]
    assert [entry["epoch"] for entry in history] == list(range(num_epochs))
    assert history[0]["seconds"] == before[0]["seconds"]  # measured once: the first epoch was not run again


SPOT = """
import json, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from focus_ray.bundle.bundle import read_manifest
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
doomed = nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
config = parse_config(json.loads(sys.argv[1]))
said = []
gone = []

def log(line):
    said.append(line)
    if "epoch 3/" in line and not gone:
        gone.append(line)
        threading.Thread(target=nodes.remove_node, args=(doomed,), kwargs={"allow_graceful": False}).start()

places = train(config, log=log)
metrics = read_manifest(places["gear"])["metrics"]
print(json.dumps({"killed": len(gone), "workers": metrics["num_workers"], "epochs": len(metrics["history"]),
                  "steps": sorted({entry["steps"] for entry in metrics["history"]})}))
"""


@pytest.mark.cluster
@pytest.mark.ray
def test_an_elastic_training_continues_with_the_remaining_workers(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        train={"epochs": 30, "batch_size_per_worker": 2},
        cluster={"num_workers": 2, "min_workers": 1, "use_gpu": False, "local": False},
    )
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    command = [sys.executable, "-c", SPOT, json.dumps(config.model_dump(mode="json"))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    printed = json.loads(process.stdout.splitlines()[-1])
    num_images = len(plan_category(config, "gear").fit_rows)
    steps = sorted({BatchSchedule.agree(num_images, workers, 2).steps for workers in (1, 2)})
    assert printed == {"killed": 1, "workers": 1, "epochs": 30, "steps": steps}


TWO_NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train
if __name__ == "__main__":
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, logging_level="error")
    nodes.wait_for_nodes()
    assert [node["Resources"].get("CPU") for node in ray.nodes()] == [1.0, 1.0]
    train(parse_config(json.loads(sys.argv[1])))
    ray.shutdown()
    nodes.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_two_nodes_train_one_model(data: str, runs: Path) -> None:
    config = small_config(data, runs, **TRAINED).model_copy(update={"name": "nodes"})
    arguments = [sys.executable, "-c", TWO_NODES, json.dumps(config.model_dump(mode="json"))]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    manifest = read_manifest(runs / "nodes/bundles/gear")
    assert (manifest["metrics"]["num_workers"], len(manifest["metrics"]["history"])) == (2, 2)
    assert manifest["moments"]["count"] == 19


# Several categories, and failures


@pytest.mark.ray
def test_a_failing_category_is_named_with_its_reason_and_the_other_is_trained_and_a_resume_finishes(
    ray_cluster: None, data: str, runs: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    row = plan_category(small_config(str(copy), runs), "gear").fit_rows[3]
    corrupt_image(str(copy), "gear", row)
    config = small_config(
        str(copy), tmp_path, data={"uri": str(copy), "categories": None}, cluster={"max_failures": 0, "use_gpu": False}
    )
    said: list[str] = []
    with pytest.raises(TrainingError, match=r"^1 of 2 categories failed; gear: .*image.*--resume$") as caught:
        train(config, log=said.append)
    assert "Traceback" not in str(caught.value)
    assert list(find_bundles(f"{tmp_path}/small")) == ["board"]
    assert any(line.startswith("gear: FAILED: ") for line in said)
    version = read_manifest(tmp_path / "small/bundles/board")["sha256"]

    shutil.rmtree(copy)
    shutil.copytree(data, copy)
    assert sorted(train(config, resume=True)) == ["board", "gear"]
    assert sorted(find_bundles(f"{tmp_path}/small")) == ["board", "gear"]
    assert read_manifest(tmp_path / "small/bundles/board")["sha256"] == version


def test_a_category_with_too_few_images_is_refused_before_anything_starts(data: str, tmp_path: Path) -> None:
    images = draw_parts(tmp_path / "images")
    for path in sorted((images / "board/train/good").iterdir())[3:]:
        path.unlink()
    ingest(images, tmp_path / "data", progress=False)
    config = small_config(str(tmp_path / "data"), tmp_path / "runs", data={"uri": str(tmp_path / "data")})
    config = config.model_copy(update={"data": config.data.model_copy(update={"categories": None})})
    with pytest.raises(DataError, match=r"category 'board' of .* has 3 normal training images; at least 4"):
        train(config)


def test_more_workers_than_the_images_can_feed_are_refused_before_anything_starts(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, cluster={"num_workers": 10})
    with pytest.raises(DataError, match=r"category 'gear': 19 training images .*10 workers"):
        train(config)
    assert not (tmp_path / "small").exists()  # the name is still free for the mended run


def test_an_unknown_category_is_refused_with_the_existing_categories(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, data={"uri": data, "categories": ["gaer"]})
    with pytest.raises(DataError, match=r"has no category gaer; it has board, gear"):
        train(config)


def test_a_place_without_bundles_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no bundle here: give a bundle, or the folder of a run"):
        find_bundles(str(tmp_path))


@pytest.mark.ray
def test_training_in_the_process_equals_one_worker_on_ray_to_the_last_digit(data: str, tmp_path: Path) -> None:
    manifests = {}
    for name, local in (("here", "auto"), ("ray", False)):
        config = small_config(
            data,
            tmp_path / name,
            density={"reduction": "discriminant"},
            scoring={"image_score": "profile"},
            calibration={"method": "auto"},
            cluster={"local": local},
        )
        manifests[name] = read_manifest(train(config)["gear"])
    parts = [{part: entry["sha256"] for part, entry in manifest["files"].items()} for manifest in manifests.values()]
    assert parts[0] == parts[1]
    assert manifests["here"]["calibration"] == manifests["ray"]["calibration"]


def test_training_in_the_process_continues_from_its_last_checkpoint(data: str, tmp_path: Path) -> None:
    def settings(place: str, epochs: int) -> Config:
        return small_config(data, tmp_path / place, train={"epochs": epochs}, cluster={"local": True})

    whole = read_manifest(train(settings("whole", 2))["gear"])

    def stop_after_one(message: str) -> None:
        if "epoch 2/2" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings("broken", 2), log=stop_after_one)
    lines: list[str] = []
    resumed = read_manifest(train(settings("broken", 2), resume=True, log=lines.append)["gear"])
    assert not any("epoch 1/2" in line for line in lines)
    assert resumed["files"]["network"]["sha256"] == whole["files"]["network"]["sha256"]


def test_streamed_training_in_the_process_sees_every_image(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        data={"memory_budget_mb": 0.0},
        train={"epochs": 1},
        cluster={"local": True},
    )
    assert read_manifest(train(config)["gear"])["moments"]["count"] == NUM_TRAIN - round(0.2 * NUM_TRAIN)


def test_several_workers_do_not_fit_in_the_process(data: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cluster\.local=true .*num_workers=2"):
        train(small_config(data, tmp_path, cluster={"local": True, "num_workers": 2}))
