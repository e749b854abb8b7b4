"""Training for real: one and three processes agree; Ray Train, Ray Data, a killed worker, two nodes, failures."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from places import free_port
from s3_server import S3Server
from small_set import NUM_TEST, NUM_TRAIN, corrupt_image, draw_parts, fit_alone, ingest_parts, small_config
from torch import Tensor

from focus_ray.bundle.bundle import find_bundles_in_folder, read_bundle, read_manifest, read_statistics
from focus_ray.cluster.ownership import FINGERPRINTS_FILE, FolderOwner, find_next_generation
from focus_ray.data.read import decode_rows, read_index
from focus_ray.errors import DataError, TrainingError
from focus_ray.features.network import build_network
from focus_ray.fitting.passes import compute_image_statistics
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import StreamShard, build_shard, fits_in_memory, read_train_batches
from focus_ray.fitting.split import compute_split_key, compute_split_plan, compute_split_rule
from focus_ray.fyd.batch_schedule import BatchSchedule
from focus_ray.ingestion.ingest import ingest
from focus_ray.training.category import fit_category, load_plant_network
from focus_ray.training.streams import read_blocks_with_ray_data
from focus_ray.training.training import train

# density.kind, or `learnt` for the default's metric and profile, and the transform group
CASES = [("gaussian", "none"), ("nearest", "none"), ("learnt", "rotation_translation")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def make_case_config(data: str, storage: Path, case: tuple[str, str]) -> Config:
    kind, group = case
    alignment = {"group": group, "min_drop": 0.0}
    density: dict[str, Any] = {"kind": kind, "max_images": 12}
    if kind == "learnt":
        density.update(kind="nearest", reduction="discriminant")
    scoring = {"image_score": "profile" if kind == "learnt" else "maximum"}
    return small_config(
        data, storage / "-".join(case), density=density, model={"image_alignment": alignment}, scoring=scoring
    )


def read_test_images(data: str) -> Tensor:
    rows = read_index(data, "gear", split="test")["row"].to_pylist()
    return torch.cat([torch.from_numpy(batch) for batch in decode_rows(data, "gear", rows, 64)])


def compute_relative_difference(first: Tensor, second: Tensor) -> float:
    """Returns the Frobenius norm of the difference, relative to the first tensor."""
    return float((first - second).double().norm() / first.double().norm())


# The plan


@pytest.mark.parametrize(
    ("method", "max_images", "num_holdout"),
    [("split", 100, round(0.2 * NUM_TRAIN)), ("split", 2, 2), ("cross", 100, 0)],
)
def test_a_plan_assigns_every_normal_training_image_and_fills_its_folds_evenly(
    data: str, monkeypatch: pytest.MonkeyPatch, method: str, max_images: int, num_holdout: int
) -> None:
    monkeypatch.setattr("focus_ray.fitting.split.MAX_CALIBRATION_IMAGES", max_images)
    plan = compute_split_plan(small_config(data, "unused", calibration={"method": method}), "gear")
    rows = read_index(data, "gear", split="train")["row"].to_pylist()
    assert sorted([*plan.fit.rows, *plan.holdout.rows]) == rows
    assert len(plan.holdout.rows) == num_holdout
    assert all(np.diff(plan.fit.rows) > 0)
    assert len(plan.folds) == len(plan.fit.rows)
    assert np.ptp(np.bincount(plan.folds)) <= 1


def test_another_seed_gives_another_plan(data: str) -> None:
    plans = [compute_split_plan(small_config(data, "unused", train={"seed": seed}), "gear") for seed in (0, 1)]
    assert plans[0].holdout.rows.tolist() != plans[1].holdout.rows.tolist()


@pytest.mark.parametrize("settings", [{}, {"selection": {"fraction": 0.2}}])
def test_a_small_pickled_rule_gives_the_rows_of_the_plan_and_the_part_of_every_image(
    data: str, settings: dict[str, Any]
) -> None:
    config = small_config(data, "unused", **settings)
    pickled, plan = pickle.dumps(compute_split_rule(config, "gear")), compute_split_plan(config, "gear")
    assert len(pickled) < 1000
    split = pickle.loads(pickled)
    again = split.build_plan(config)
    index = read_index(data, "gear", split="train")
    hashes = dict(zip(index["row"].to_pylist(), index["content_hash"].to_pylist(), strict=True))
    parts = {part: getattr(plan, part) for part in ("fit", "validation", "holdout")}
    assert {hashes[row]: part for part, images in parts.items() for row in images.rows} == {
        content_hash: split.find_subset(content_hash) for content_hash in hashes.values()
    }
    assert [len(images) for images in parts.values()] == [split.num_fit, split.num_validation, split.num_holdout]
    assert split.num_images == plan.num_images
    for part, images in parts.items():
        for column, values in vars(images).items():
            assert np.array_equal(values, getattr(getattr(again, part), column)), (part, column)
    assert np.array_equal(again.folds, plan.folds)
    assert np.array_equal(again.fit_hashes, plan.fit_hashes)


def test_the_split_of_a_fixed_set_does_not_change() -> None:
    """Keys of four contents under seed 0, found with sha256sum: another order would change every model's images."""
    keys = {name: compute_split_key(0, name)[:6] for name in "abcd"}
    assert keys == {"a": "9df3c5", "b": "e02192", "c": "be086d", "d": "7d98c2"}


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
        plan = compute_split_plan(small_config(uri, "unused"), "gear")
        index = read_index(uri, "gear")
        hashes = dict(zip(index["row"].to_pylist(), index["content_hash"].to_pylist(), strict=True))
        folds = {hashes[row]: fold for row, fold in zip(plan.fit.rows, plan.folds, strict=True)}
        parts.append((folds, {hashes[row] for row in plan.holdout.rows}, plan.fingerprint))
    assert parts[0] == parts[1]


@given(st.lists(st.integers(2, 500), min_size=1, max_size=3), st.integers(1, 8), st.integers(2, 64))
def test_any_number_of_workers_shares_each_global_batch(
    num_images: list[int], num_workers: int, batch_size: int
) -> None:
    if min(num_images) < 2 * num_workers:
        with pytest.raises(DataError, match=r"cluster\.num_workers"):
            BatchSchedule.plan(num_images, num_workers, batch_size, 0)
        return
    schedule = BatchSchedule.plan(num_images, num_workers, batch_size, 0)
    assert schedule == BatchSchedule.plan(num_images, 1, batch_size, 0)
    totals = np.zeros(num_workers, int)
    for step in range(20):
        size = schedule.get_batch_size(step)
        assert 2 <= size <= batch_size
        shares = [schedule.get_share(step, rank, num_workers) for rank in range(num_workers)]
        assert sorted(position for share in shares for position in share) == list(range(size))
        assert np.ptp([len(share) for share in shares]) <= 1
        totals += [len(share) for share in shares]
    assert len(num_images) > 1 or np.ptp(totals) <= 1


@given(st.lists(st.integers(2, 600), min_size=1, max_size=3), st.integers(2, 64), st.integers(0, 100))
def test_every_pass_uses_every_image_of_a_category_once_and_no_batch_has_an_image_twice(
    num_images: list[int], batch_size: int, seed: int
) -> None:
    schedule = BatchSchedule.plan(num_images, 1, batch_size, seed)
    steps = 2 * schedule.count_batches_in_pass()
    batches = [(category, batch.tolist()) for category, batch in schedule.iterate_batches(range(steps))]
    assert all(len(set(batch)) == len(batch) == schedule.get_batch_size(i) for i, (_, batch) in enumerate(batches))
    for start in range(0, steps, len(num_images)):  # the categories take turns
        assert sorted(category for category, _ in batches[start : start + len(num_images)]) == [*range(len(num_images))]
    for category, count in enumerate(num_images):
        used = [image for number, batch in batches if number == category for image in batch]
        for start in range(0, len(used) - count + 1, count):
            assert sorted(used[start : start + count]) == list(range(count))
    later = [(category, batch.tolist()) for category, batch in schedule.iterate_batches(range(steps // 2, steps))]
    assert later == batches[steps // 2 :]  # a resumed training continues with the same images


@pytest.mark.parametrize("num_images", [5, 63, 64])
def test_small_sets_take_as_many_steps_as_large_ones(num_images: int) -> None:
    schedule = BatchSchedule.plan([num_images], 1, 32, 0)
    assert len(list(schedule.iterate_batches(range(100)))) == 100


def test_a_batch_of_a_large_set_has_images_of_few_sections_which_a_stream_reads_together() -> None:
    (_, batch), *_ = BatchSchedule.plan([10_000], 1, 64, 0).iterate_batches(range(1))
    assert len({number // 32 for number in batch.tolist()}) <= 8
    assert max(batch.tolist()) - min(batch.tolist()) > 1000


# One and several workers, without Ray


def fit_in_this_process(config: Config) -> None:
    """Fits in this process, which may be one of several workers."""
    fit_category(config, compute_split_rule(config, "gear"), f"{config.storage}/small", print)


def fit_as_worker(rank: int, port: int, configs: list[Config], num_workers: int) -> None:
    """Fits all configurations in one of several gloo processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    for config in configs:
        fit_in_this_process(config)
    dist.destroy_process_group()


def assert_same_bundles(data: str, config: Config, other: Config, bound: float, score_bound: float) -> None:
    """Compares moments, projections, scores of the test images and thresholds of two runs.

    Args:
        bound: largest relative difference of moments and projections.
        score_bound: largest difference of scores, in standard deviations of the scores.
    """
    places = [f"{item.storage}/small/bundles/gear" for item in (config, other)]
    first, second = (read_statistics(place).moments for place in places)
    assert first.count == second.count == NUM_TRAIN - round(0.2 * NUM_TRAIN)
    assert compute_relative_difference(first.mean, second.mean) <= bound
    assert compute_relative_difference(first.scatter, second.scatter) <= bound
    bundles = [read_bundle(place) for place in places]
    assert compute_relative_difference(*(bundle.detector.reduction.projection for bundle in bundles)) <= bound
    scores = [bundle.detector(read_test_images(data)).score for bundle in bundles]
    spread = float(scores[0].std())
    assert spread > 0
    assert float((scores[0] - scores[1]).abs().max()) <= score_bound * spread
    thresholds = [bundle.calibration.image_threshold for bundle in bundles]
    assert abs(thresholds[0] - thresholds[1]) <= score_bound * spread


@pytest.fixture(scope="module")
def fitted_by_three(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which three workers fitted all cases."""
    folder = tmp_path_factory.mktemp("three")
    configs = [*(make_case_config(data, folder, case) for case in CASES), make_trained_config(data, folder)]
    configs.append(make_streamed_config(data, folder))
    torch.multiprocessing.spawn(fit_as_worker, (free_port(), configs, 3), nprocs=3)
    return folder


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_three_workers_give_the_moments_and_scores_of_one(
    data: str, fitted_by_three: Path, tmp_path: Path, case: tuple[str, str]
) -> None:
    config, other = (make_case_config(data, folder, case) for folder in (tmp_path, fitted_by_three))
    fit_in_this_process(config)
    assert_same_bundles(data, config, other, 1e-5, 1e-3)
    alignments = [
        read_manifest(f"{item.storage}/small/bundles/gear")["metrics"]["alignment"] for item in (config, other)
    ]
    assert [bool(alignment and alignment["enabled"]) for alignment in alignments] == [case[1] != "none"] * 2


def make_trained_config(data: str, storage: Path, **cluster: Any) -> Config:
    """Returns a configuration whose losses and batch norms use the whole global batch, which two and three do not divide."""
    return small_config(
        data,
        storage / "trained",
        model={
            "batch_norm": "train",
            "feature_alignment": {"layer3": "rotation_scale"},
        },
        train={"steps": 2, "batch_size": 7, "learning_rate": 1e-3},
        cluster=cluster,
    )


def assert_same_weights(config: Config, weights: dict[str, Tensor], others: dict[str, Tensor], bound: float) -> None:
    """Compares the changes that two trainings made to the weights; see `assert_same_training` for the bound."""
    torch.manual_seed(config.train.seed)
    start = build_network(config.model).state_dict()  # as before the training
    moved = [name for name in weights if not torch.equal(weights[name], start[name])]
    # the mean is subtracted from the parameters of a transform, so their bias moves by rounding only
    moved = [name for name in moved if not name.endswith("parameters_out.bias")]
    assert any("feature_aligners" in name for name in moved)
    assert any("running_var" in name for name in moved)
    for name in moved:
        change = (weights[name] - start[name]).double().norm()
        rounding = 1e-6 * weights[name].double().norm()
        difference = (weights[name] - others[name]).double().norm()
        assert difference <= 50 * bound * change + rounding, name


def assert_same_training(data: str, config: Config, other: Config, bound: float) -> None:
    """Compares the training metrics, the changes of the weights and the scores of two runs.

    Args: bound: largest relative difference of metrics. Changes of weights, small sums of large terms, may differ 50 times more.
    """
    places = [f"{item.storage}/small/bundles/gear" for item in (config, other)]
    histories = [read_manifest(place)["metrics"]["history"] for place in places]
    for step, other_step in zip(*histories, strict=True):
        assert step["learning_rate"] == other_step["learning_rate"]
        for name in ("loss", "loss_fine", "feature_std", "effective_rank"):
            assert step[name] == pytest.approx(other_step[name], rel=bound, abs=bound / 10), name
    weights, other_weights = (read_bundle(place).detector.net.state_dict() for place in places)
    assert_same_weights(config, weights, other_weights, bound)
    assert_same_bundles(data, config, other, bound, 10 * bound)


def make_streamed_config(data: str, storage: Path, **cluster: Any) -> Config:
    """Returns the configuration of `make_trained_config` with images that are read again on every pass."""
    config = make_trained_config(data, storage, **cluster)
    updates = {"storage": f"{storage}/streamed", "data": config.data.model_copy(update={"memory_budget_mb": 0.0})}
    return config.model_copy(update=updates)


@pytest.mark.parametrize("make_other_config", [make_trained_config, make_streamed_config])
def test_three_workers_train_the_network_of_one_with_images_in_memory_and_streamed(
    data: str, fitted_by_three: Path, tmp_path: Path, make_other_config: Callable[[str, Path], Config]
) -> None:
    config, other = make_trained_config(data, tmp_path), make_other_config(data, fitted_by_three)
    fit_in_this_process(config)
    assert_same_training(data, config, other, 1e-3)


def test_streamed_images_train_the_same_network_as_images_in_memory(data: str, tmp_path: Path) -> None:
    bundles = []
    for make_config in (make_trained_config, make_streamed_config):
        config = make_config(data, tmp_path)
        fit_in_this_process(config)
        bundles.append(read_bundle(f"{config.storage}/small/bundles/gear").detector.net.state_dict())
    assert all(torch.equal(weight, bundles[1][name]) for name, weight in bundles[0].items())


@pytest.mark.parametrize("method", ["split", "cross"])
def test_a_streamed_share_gives_the_images_of_one_in_memory(data: str, method: str) -> None:
    config = small_config(data, "unused", calibration={"method": method})
    streamed = small_config(data, "unused", calibration={"method": method}, data={"uri": data, "memory_budget_mb": 0})
    plan = compute_split_plan(config, "gear")
    assert fits_in_memory(config, plan)
    assert not fits_in_memory(streamed, plan)
    in_memory, from_stream = (build_shard(item, "gear", plan, 1, 2) for item in (config, streamed))
    assert torch.equal(torch.cat(list(in_memory.read_batches("fit"))), torch.cat(list(from_stream.read_batches("fit"))))
    in_fold = np.flatnonzero(in_memory.get_fit_folds() == 2).tolist()
    for passes in (lambda shard: shard.read_batches("fit", in_fold), lambda shard: shard.read_batches("holdout")):
        batches = [list(passes(shard)) for shard in (in_memory, from_stream)]
        assert [batch.tolist() for batch in batches[0]] == [batch.tolist() for batch in batches[1]]


# Ray Train


@pytest.fixture(scope="module")
def trained(ray_cluster: None, data: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Trains a run with two workers and returns its configuration."""
    config = make_trained_config(data, tmp_path_factory.mktemp("runs"), num_workers=2)
    assert train(config) == {"gear": f"{config.storage}/small/bundles/gear"}
    return config


@pytest.mark.ray
def test_two_workers_train_a_bundle_that_loads_and_scores(trained: Config, data: str) -> None:
    bundle = read_bundle(find_bundles_in_folder(f"{trained.storage}/small")["gear"])
    assert [entry["step"] for entry in bundle.manifest["metrics"]["history"]] == [1, 2]
    assert bundle.manifest["metrics"]["num_workers"] == 2
    assert bundle.manifest["moments"]["count"] == bundle.manifest["data"]["num_fit"] == 19
    scored = bundle.detector(read_test_images(data))
    assert scored.anomaly_map.shape == (NUM_TEST, 64, 64)
    assert bool((scored.score > 0).all())
    assert list(Path(trained.storage).glob("small/scratch/*")) == []


@pytest.mark.ray
def test_two_workers_of_ray_train_train_the_network_of_one(trained: Config, data: str, tmp_path: Path) -> None:
    alone = make_trained_config(data, tmp_path)
    fit_in_this_process(alone)
    assert_same_training(data, alone, trained, 1e-3)


@pytest.mark.ray
def test_ray_data_gives_the_batches_of_images_in_memory(ray_cluster: None, data: str) -> None:
    config = make_trained_config(data, Path("unused"))
    plan = compute_split_plan(config, "gear")
    schedule = BatchSchedule.plan([len(plan.fit.rows)] * 2, 1, 7, 0)
    in_memory, streamed = build_shard(config, "gear", plan, 0, 1), StreamShard(config, "gear", plan, 0, 1)
    reader = partial(read_blocks_with_ray_data, config)
    expected = list(read_train_batches([in_memory] * 2, schedule, range(3, 12), reader))
    batches = list(read_train_batches([streamed] * 2, schedule, range(3, 12), reader))
    assert len(batches) == 9
    assert all(torch.equal(batch, other) for batch, other in zip(batches, expected, strict=True))


@pytest.mark.cluster
@pytest.mark.ray
def test_ray_train_agrees_with_two_plain_processes(trained: Config, data: str, tmp_path: Path) -> None:
    plain = trained.model_copy(update={"storage": str(tmp_path)})
    torch.multiprocessing.spawn(fit_as_worker, (free_port(), [plain], 2), nprocs=2)
    assert_same_bundles(data, plain, trained, 1e-6, 1e-4)


@pytest.mark.ray
def test_resuming_a_finished_run_trains_nothing_even_with_other_settings_that_have_no_effect(
    trained: Config,
) -> None:
    root = f"{trained.storage}/small"
    version = read_manifest(f"{root}/bundles/gear")["sha256"]
    budget = trained.data.model_copy(update={"memory_budget_mb": 77})
    cluster = trained.cluster.model_copy(update={"max_concurrent_categories": 1})
    lines: list[str] = []
    train(trained.model_copy(update={"data": budget, "cluster": cluster}), resume=True, log=lines.append)
    assert lines == [f"gear: already trained, {root}/bundles/gear", f"report: {root}/report.html"]
    assert read_manifest(f"{root}/bundles/gear")["sha256"] == version


@pytest.mark.ray
def test_a_run_is_refused_under_a_used_name_with_other_settings_or_images_or_while_a_driver_is_alive(
    trained: Config,
) -> None:
    with pytest.raises(TrainingError, match=r"small already holds a run.*--resume"):
        train(trained)
    longer = trained.model_copy(update={"train": trained.train.model_copy(update={"steps": 3})})
    with pytest.raises(TrainingError, match=r"train\.steps was 2, is 3"):
        train(longer, resume=True)
    place = Path(trained.storage, "small", FINGERPRINTS_FILE)
    stored = place.read_text()
    place.write_text(json.dumps({"gear": "another"}))
    with pytest.raises(DataError, match="gear"):
        train(trained, resume=True)
    place.write_text(stored)
    root = f"{trained.storage}/small"
    alive = FolderOwner(root, find_next_generation(root, TrainingError), TrainingError)
    with pytest.raises(TrainingError, match=rf"process {os.getpid()} on "):
        train(trained, resume=True)
    alive.close("finished")


@pytest.mark.cluster
@pytest.mark.ray
def test_a_streamed_run_takes_the_agreed_steps_and_counts_every_image_once(
    ray_cluster: None, data: str, tmp_path: Path
) -> None:
    config = small_config(
        data,
        tmp_path,
        data={"uri": data, "categories": ["gear"], "memory_budget_mb": 0},
        train={"steps": 12, "batch_size": 4, "learning_rate": 1e-3},  # more than two passes
        cluster={"num_workers": 2, "use_gpu": False},
    )
    place = train(config)["gear"]
    plan = compute_split_plan(config, "gear")
    assert [entry["step"] for entry in read_manifest(place)["metrics"]["history"]] == [2, 4, 6, 8, 10, 12]
    detector = read_bundle(place).detector
    images = torch.cat([torch.from_numpy(b) for b in decode_rows(data, "gear", plan.fit.rows, 64)])
    again = compute_image_statistics(detector.net, detector.reduction, [images], torch.device("cpu")).moments
    moments = read_statistics(place).moments
    assert again.count == moments.count
    assert compute_relative_difference(again.mean, moments.mean) <= 1e-5
    assert compute_relative_difference(again.scatter, moments.scatter) <= 1e-5


SITES = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train

site_a = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": int(sys.argv[2])}
nodes = Cluster(initialize_head=True, head_node_args={**site_a, "labels": {"site": "a"}})
nodes.add_node(num_cpus=3, labels={"site": "b"})
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
train(parse_config(json.loads(sys.argv[1]), is_fitted=True), log=lambda line: print(line, file=sys.stderr))
sites = {node["NodeID"]: node["Labels"]["site"] for node in ray.nodes()}
tasks = list_tasks(detail=True, limit=10_000, filters=[("type", "=", "NORMAL_TASK")])
print(json.dumps([[task.name, sites[task.node_id]] for task in tasks if task.node_id]))
"""


@pytest.mark.cluster
@pytest.mark.ray
def test_every_task_of_the_stream_of_images_runs_on_nodes_with_the_labels(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        data={"uri": data, "categories": ["gear"], "memory_budget_mb": 0},
        train={"steps": 2},
        cluster={"num_workers": 2, "labels": {"site": "b"}},
    )
    command = [sys.executable, "-c", SITES, json.dumps(config.model_dump(mode="json")), str(free_port())]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    sites: dict[str, set[str]] = {}
    for name, site in json.loads(process.stdout.splitlines()[-1]):
        sites.setdefault(name, set()).add(site)
    assert any("read_block" in name for name in sites), sites
    assert set().union(*sites.values()) == {"b"}, sites


def find_train_worker_pids() -> list[int]:
    """Returns the Ray Train workers of this test session, whose processes inherit its folder of Ray."""
    folder = f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}".encode()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayTrainWorker" in (process / "cmdline").read_bytes() and folder in (process / "environ").read_bytes():
                pids.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return pids


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_worker_is_replaced_and_the_run_continues_from_its_checkpoint(
    ray_cluster: None, data: str, tmp_path: Path
) -> None:
    config = small_config(
        data,
        tmp_path,
        train={"steps": 160, "batch_size": 2},
        cluster={"num_workers": 2},
    )
    lines: list[str] = []

    def kill_a_worker_after_32_steps(line: str) -> None:
        if "step 32/" in line and not any("step 32/" in earlier for earlier in lines):
            os.kill(find_train_worker_pids()[0], signal.SIGKILL)
        lines.append(line)

    metrics = read_manifest(train(config, log=kill_a_worker_after_32_steps)["gear"])["metrics"]
    assert metrics["num_workers"] == 2
    assert [entry["step"] for entry in metrics["history"]] == list(range(16, 161, 16))
    assert sum("reading" in line for line in lines) == 2  # once by each group of workers
    assert sum("step 16/" in line for line in lines) == 1


SPOT = """
import json, sys, threading
import ray
from ray.cluster_utils import Cluster
from focus_ray.bundle.bundle import read_manifest
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
lost = []

def log(line):
    if "step 72/" in line and not lost:
        lost.append(line)
        threading.Thread(target=nodes.remove_node, args=(second,), kwargs={"allow_graceful": False}).start()

bundles = train(parse_config(json.loads(sys.argv[1]), is_fitted=True), log=log)
metrics = read_manifest(bundles["gear"])["metrics"]
print(json.dumps({"workers": metrics["num_workers"], "steps": [entry["step"] for entry in metrics["history"]]}))
"""


@pytest.mark.cluster
@pytest.mark.ray
def test_an_elastic_training_over_two_nodes_continues_with_the_remaining_node(data: str, tmp_path: Path) -> None:
    config = small_config(
        data,
        tmp_path,
        train={"steps": 240, "batch_size": 2},
        cluster={"num_workers": 2, "min_workers": 1},
    )
    command = [sys.executable, "-c", SPOT, json.dumps(config.model_dump(mode="json"))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout.splitlines()[-1]) == {"workers": 1, "steps": list(range(24, 241, 24))}


# Several categories, and failures


def test_a_failing_category_is_named_the_other_is_trained_and_a_resume_finishes(data: str, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    config = small_config(str(copy), tmp_path, data={"uri": str(copy), "categories": None}, cluster={"local": True})
    corrupt_image(str(copy), "gear", compute_split_plan(config, "gear").fit.rows[3])
    lines: list[str] = []
    with pytest.raises(TrainingError, match=r"^1 of 2 categories failed; gear: .*image.*--resume$") as caught:
        train(config, log=lines.append)
    assert "Traceback" not in str(caught.value)
    assert list(find_bundles_in_folder(f"{tmp_path}/small")) == ["board"]
    assert any(line.startswith("gear: FAILED: ") for line in lines)
    version = read_manifest(tmp_path / "small/bundles/board")["sha256"]
    shutil.rmtree(copy)
    shutil.copytree(data, copy)
    assert (
        sorted(train(config, resume=True)) == sorted(find_bundles_in_folder(f"{tmp_path}/small")) == ["board", "gear"]
    )
    assert read_manifest(tmp_path / "small/bundles/board")["sha256"] == version


def test_a_category_with_too_few_images_is_refused_before_anything_starts(data: str, tmp_path: Path) -> None:
    images = draw_parts(tmp_path / "images")
    for path in sorted((images / "board/train/good").iterdir())[3:]:
        path.unlink()
    ingest(images, tmp_path / "data", progress=False)
    with pytest.raises(DataError, match=r"category 'board' of .* has 3 normal training images; at least 4"):
        train(small_config(str(tmp_path / "data"), tmp_path / "runs", data={"categories": None}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cluster": {"num_workers": 10}}, r"category 'gear': 19 training images .*10 workers"),
        ({"data": {"categories": ["gaer"]}}, "has no category gaer; it has board, gear"),
        ({"cluster": {"local": True, "num_workers": 2}}, r"cluster\.local=true .*num_workers=2"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_anything_is_written(
    data: str, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, TrainingError), match=message):
        train(small_config(data, tmp_path, **sections))
    assert not (tmp_path / "small").exists()  # the name is still free for the corrected run


@pytest.mark.ray
def test_training_in_the_process_equals_one_worker_on_ray_to_the_last_digit(
    ray_cluster: None, data: str, tmp_path: Path
) -> None:
    manifests = []
    for is_local in (True, False):
        config = small_config(
            data,
            tmp_path / str(is_local),
            data={"categories": None},
            density={"reduction": "discriminant"},
            scoring={"image_score": "profile"},
            calibration={"method": "auto"},
            cluster={"local": is_local, "max_concurrent_categories": 1},  # one process imports torch
        )
        bundles = {category: read_manifest(bundle) for category, bundle in train(config).items()}
        manifests.append(
            {
                category: ([entry["sha256"] for entry in manifest["files"].values()], manifest["calibration"])
                for category, manifest in bundles.items()
            }
        )
    assert manifests[0] == manifests[1]
    assert list(manifests[0]) == ["board", "gear"]


def test_training_in_the_process_continues_from_its_last_checkpoint_to_the_same_bundle(
    data: str, tmp_path: Path
) -> None:
    whole, broken = (
        small_config(data, tmp_path / name, train={"steps": 2}, cluster={"local": True}) for name in ("a", "b")
    )
    uninterrupted = read_manifest(train(whole)["gear"])

    def stop_after_one(message: str) -> None:
        if "step 2/2" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, log=stop_after_one)
    stored = tmp_path / "b/small/config.yaml"
    stored.write_text(stored.read_text().replace("batch_size: 4", "batch_size_per_worker: 4"))  # as in earlier versions
    assert "batch_size_per_worker: 4" in stored.read_text()
    lines: list[str] = []
    resumed = read_manifest(train(broken, resume=True, log=lines.append)["gear"])
    assert not any("step 1/2" in line for line in lines)
    hashes = [
        {name: entry["sha256"] for name, entry in manifest["files"].items()} for manifest in (resumed, uninterrupted)
    ]
    assert hashes[0] == hashes[1]


def test_the_same_command_with_resume_starts_a_run_and_finds_it_finished(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, cluster={"local": True})
    lines: list[str] = []
    bundles = [train(config, resume=True, log=lines.append) for _ in range(2)]
    assert bundles[0] == bundles[1]
    assert [line.partition(",")[0] for line in lines if "done in" not in line and "report" not in line][-1] == (
        "gear: already trained"
    )
    assert sum("done in" in line for line in lines) == 1


@pytest.mark.parametrize("steps", [0, 2])
def test_a_driver_whose_run_is_taken_over_stops_and_writes_nothing_more(data: str, tmp_path: Path, steps: int) -> None:
    root = f"{tmp_path}/small"
    config = small_config(data, tmp_path, data={"categories": None}, train={"steps": steps}, cluster={"local": True})
    owners: list[FolderOwner] = []

    def take_over_during_the_second_category(message: str) -> None:
        if message.startswith("gear: reading"):
            owners.append(FolderOwner(root, 2, TrainingError))

    with pytest.raises(TrainingError, match=rf"{root}: process {os.getpid()} on .* has taken over this run"):
        train(config, log=take_over_during_the_second_category)
    assert list(find_bundles_in_folder(root)) == ["board"]
    assert not Path(root, "train/gear").exists()
    assert not Path(root, "report.html").exists()
    state = json.loads(Path(root, "state.json").read_text())
    assert (state["state"], state["generation"]) == ("running", 2)
    owners[0].close("failed")
    assert sorted(train(config, resume=True)) == ["board", "gear"]


def test_streamed_training_in_the_process_sees_every_image(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, data={"memory_budget_mb": 0.0}, train={"steps": 1}, cluster={"local": True})
    assert read_manifest(train(config)["gear"])["moments"]["count"] == NUM_TRAIN - round(0.2 * NUM_TRAIN)


# One network for all categories


def make_plant_config(data: str, storage: Path, categories: list[str] | None = None, **sections: Any) -> Config:
    """Returns a configuration that trains one network for all categories, in this process."""
    train = {"steps": 4, "batch_size": 7, "scope": "plant"}
    sections = {"train": train, "cluster": {"local": True}, **sections}
    aligned = {"batch_norm": "train", "feature_alignment": {"layer3": "rotation_scale"}}
    return small_config(data, storage, data={"uri": data, "categories": categories}, model=aligned, **sections)


def read_plant_hashes(config: Config) -> dict[str, str]:
    """Returns category -> hash of the network in its bundle."""
    bundles = find_bundles_in_folder(f"{config.storage}/small")
    return {category: read_manifest(place)["files"]["network"]["sha256"] for category, place in bundles.items()}


def test_all_categories_get_one_trained_network_and_a_new_category_gets_it_without_training(
    data: str, tmp_path: Path
) -> None:
    parts = shutil.copytree(data, tmp_path / "data")
    shutil.move(parts / "category=board", tmp_path / "later")
    shutil.copytree(parts / "category=gear", parts / "category=wheel")
    config = make_plant_config(str(parts), tmp_path)
    lines: list[str] = []
    train(config, log=lines.append)
    assert sum("step 4/4" in line for line in lines) == 1  # once for both categories
    hashes = read_plant_hashes(config)
    assert list(hashes) == ["gear", "wheel"]
    assert len(set(hashes.values())) == 1
    start = build_network(config.model).state_dict()
    bundle = read_bundle(find_bundles_in_folder(f"{tmp_path}/small")["gear"])
    weights = bundle.detector.net.state_dict()
    assert any(not torch.equal(weights[name], start[name]) for name in weights if "backbone" in name)
    assert [entry["step"] for entry in bundle.manifest["metrics"]["history"]] == [1, 2, 3, 4]
    shutil.move(tmp_path / "later", parts / "category=board")
    train(config, resume=True, log=lines.append)
    assert sum("step 4/4" in line for line in lines) == 1
    assert read_plant_hashes(config) == {"board": hashes["gear"], **hashes}


def test_an_interrupted_training_of_the_common_network_continues_to_the_same_network(data: str, tmp_path: Path) -> None:
    whole, broken = (make_plant_config(data, tmp_path / name) for name in ("a", "b"))
    train(whole)

    def stop_after_two(message: str) -> None:
        if "step 3/4" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, log=stop_after_two)
    with pytest.raises(DataError, match="board"):  # the order of the batches depends on all categories
        train(make_plant_config(data, tmp_path / "b", ["gear"]), resume=True)
    lines: list[str] = []
    train(broken, resume=True, log=lines.append)
    assert not any("step 2/4" in line for line in lines)
    assert read_plant_hashes(broken) == read_plant_hashes(whole)


def test_streamed_images_train_the_same_common_network(data: str, tmp_path: Path) -> None:
    configs = [make_plant_config(data, tmp_path / "a")]
    configs.append(make_plant_config(data, tmp_path / "b"))
    configs[1] = configs[1].model_copy(update={"data": configs[1].data.model_copy(update={"memory_budget_mb": 0.0})})
    for config in configs:
        train(config)
    assert read_plant_hashes(configs[0]) == read_plant_hashes(configs[1])


@pytest.mark.ray
@pytest.mark.parametrize("memory_budget_mb", [1000.0, 0.0])
def test_two_workers_train_the_common_network_of_one(
    ray_cluster: None, data: str, tmp_path: Path, memory_budget_mb: float
) -> None:
    alone = make_plant_config(data, tmp_path / "a")
    train(alone)
    pair = make_plant_config(data, tmp_path / "b", cluster={"num_workers": 2, "use_gpu": False})
    data_settings = pair.data.model_copy(update={"memory_budget_mb": memory_budget_mb})
    pair = pair.model_copy(update={"data": data_settings})
    train(pair)
    networks = [load_plant_network(f"{config.storage}/small") for config in (alone, pair)]
    assert_same_weights(alone, networks[0].net, networks[1].net, 1e-3)
    losses = [[entry["loss"] for entry in network.notes.history] for network in networks]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
for num_cpus in (2, 1):  # each worker needs a node of its own; the third node reads the stream
    nodes.add_node(num_cpus=num_cpus)
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
train(parse_config(json.loads(sys.argv[1]), is_fitted=True), log=lambda line: print(line, file=sys.stderr))
"""


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
def test_two_nodes_that_stream_from_s3_train_the_network_of_one_process(
    data: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_plant_config(data, tmp_path)
    train(alone)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    root = s3.new_uri()
    ingest(draw_parts(tmp_path / "images"), f"{root}/data", progress=False)
    cluster = {"num_workers": 2, "cpus_per_worker": 2, "use_gpu": False}
    pair = make_plant_config(f"{root}/data", Path("runs"), cluster=cluster)
    data_settings = pair.data.model_copy(update={"memory_budget_mb": 0.0})
    pair = pair.model_copy(update={"data": data_settings, "storage": f"{root}/runs"})
    command = [sys.executable, "-c", NODES, json.dumps(pair.model_dump(mode="json"))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-3000:]
    network = load_plant_network(f"{root}/runs/small")
    assert network.categories == ("board", "gear")
    assert_same_weights(alone, load_plant_network(f"{tmp_path}/small").net, network.net, 1e-3)
