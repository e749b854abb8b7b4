"""The network: two workers equal one, frames of levels, frozen batch norms, and channel reduction."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from worker_processes import run_workers

from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.settings import DensityConfig
from focus_ray.features.alignment.theta import warp_images
from focus_ray.features.batch_norm import GlobalBatchNorm2d
from focus_ray.features.network import (
    ALIGNED_IMAGE_PADDING,
    AlignedFeatures,
    build_network,
    warp_features_to_common_frame,
)
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.passes import compute_image_statistics
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fyd.head import ProjectorPredictorHead
from focus_ray.fyd.objective import TrainingObjective
from focus_ray.fyd.settings import TrainConfig

WORKERS = 2
MODES = ("frozen", "train")
PAIRS = torch.tensor([5, 2, 7, 0, 6, 3, 1, 4])  # in the global batch: some pairs have images of both workers


@pytest.mark.parametrize("padding", ["border", "reflection"])
def test_a_feature_aligner_fills_the_border_as_configured(padding: str) -> None:
    config = {"feature_alignment": {"layer1": "rotation_two_scales", "padding": padding}}
    tree = {"weights": "random", "image_size_px": 64, "image_alignment": {"group": "none"}, **config}
    net = build_network(ModelConfig.model_validate(tree, context={"is_fitted": True})).eval()
    nn.init.normal_(net.feature_aligners["layer1"].parameters_out.bias, mean=-1.0)
    images = random_images(2)
    aligned = net(images)
    first = net.backbone.layer1((images - net.pixel_mean) / net.pixel_std)
    assert torch.equal(aligned.levels[0], warp_images(first, aligned.thetas[0], padding))
    lengths = aligned.thetas[0][:, :, :2].norm(dim=1)
    assert bool((lengths[:, 0] != lengths[:, 1]).all())  # the scales along x and y differ


def model_config(batch_norm: str = "frozen", **sections: Any) -> ModelConfig:
    tree = {"weights": "random", "image_size_px": 64, "predictor_width": 8, **sections}
    tree.setdefault("image_alignment", {"group": "none"})
    return ModelConfig.model_validate({"batch_norm": batch_norm, **tree})


def aligned_config(batch_norm: str) -> ModelConfig:
    """Returns a configuration with all parts that train: both kinds of alignment, projector and predictor."""
    return model_config(
        batch_norm,
        image_alignment={"group": "rotation", "method": "localisation"},
        feature_alignment={"layer1": "rotation", "layer2": "translation", "layer3": "similarity"},
    )


def random_images(count: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=64, mode="bilinear")


# Two workers


def norm_case() -> tuple[GlobalBatchNorm2d, Tensor, Tensor]:
    """Returns a batch norm with random statistics, the input of both workers, and factors for the output."""
    generator = torch.Generator().manual_seed(0)
    norm = GlobalBatchNorm2d(5)
    nn.init.uniform_(norm.weight, 0.5, 2.0, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    norm.running_mean.normal_(generator=generator)
    x = torch.randn(8, 5, 3, 4, generator=generator) * 2 + 1
    return norm, x, torch.randn(8, 5, 3, 4, generator=generator)


def run_norm(norm: nn.Module, x: Tensor, factors: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * factors).sum().backward()
    return {"out": out.detach(), "x": x.grad, "mean": norm.running_mean, "var": norm.running_var}


def build_objective(mode: str) -> TrainingObjective:
    net = build_network(aligned_config(mode))
    return TrainingObjective(net, ProjectorPredictorHead(net), TrainConfig()).train()


def load_objective(folder: Path | str, mode: str) -> TrainingObjective:
    objective = build_objective(mode)
    objective.load_state_dict(torch.load(f"{folder}/{mode}.pth", weights_only=True))
    return objective


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORKERS)
    norm, x, factors = norm_case()
    results: dict[str, Any] = {"norm": run_norm(norm, x.chunk(WORKERS)[rank], factors.chunk(WORKERS)[rank])}
    for mode in MODES:
        objective = load_objective(folder, mode)
        parallel = nn.parallel.DistributedDataParallel(objective)
        loss = parallel(random_images(8).chunk(WORKERS)[rank], PAIRS, first=rank * 8 // WORKERS)["loss"]
        loss.backward()
        results[mode] = {name: parameter.grad for name, parameter in objective.named_parameters()}
        results[f"{mode} loss"] = loss.detach()
    torch.save(results, f"{folder}/rank{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Runs both workers once. Returns: the folder with their initial networks, and the results of each worker."""
    folder = tmp_path_factory.mktemp("workers")
    for mode in MODES:
        torch.manual_seed(0)
        objective = build_objective(mode)
        for aligner in objective.net.feature_aligners.values():
            # at the identity, no gradient reaches the first layers of an aligner
            nn.init.normal_(aligner.parameters_out.weight, std=0.02)
        torch.save(objective.state_dict(), folder / f"{mode}.pth")
    run_workers(worker, (str(folder),), WORKERS)
    return folder, [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(WORKERS)]


def test_batch_norm_over_two_workers_equals_torch_on_the_joined_batch(workers) -> None:
    norm, x, factors = norm_case()
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(norm.state_dict())
    expected = run_norm(plain, x, factors)
    parts = [results["norm"] for results in workers[1]]
    for key in ("out", "x"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), expected[key], rtol=0, atol=1e-5)
    for part in parts:
        for key in ("mean", "var"):
            torch.testing.assert_close(part[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_two_workers_equal_those_of_one_worker_on_the_joined_batch(workers, mode: str) -> None:
    folder, results = workers
    objective = load_objective(folder, mode)
    loss = objective(random_images(8), PAIRS)["loss"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.mean([float(part[f"{mode} loss"]) for part in results]), abs=1e-5)
    for name, parameter in objective.named_parameters():
        gradient = results[0][mode][name]
        assert torch.equal(gradient, results[1][mode][name])
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=0, atol=1e-5 * max(1, largest), msg=lambda m, n=name: f"{n}: {m}"
        )
        # the image aligner is at the identity, where only its last layer has a gradient; the last bias of f and those of
        # aligners have none, because the batch norm of g and the subtraction of the mean remove them
        if not name.startswith(
            ("net.image_aligner.transformer.features", "net.image_aligner.transformer.head", "head.projector.6.b")
        ) and not name.endswith("parameters_out.bias"):
            assert largest > 1e-6, name


def compute_gradients_in_double_precision(images: Tensor, first: int, num_workers: int) -> dict[str, Tensor]:
    """Returns the gradients of the losses of 7 images for a network in which all aligners move images."""
    single, default = Tensor.float, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # the package asks for single precision in some places
    try:
        torch.manual_seed(0)
        objective = build_objective("train").double()
        for aligner in (objective.net.image_aligner.transformer, *objective.net.feature_aligners.values()):
            nn.init.normal_(aligner.parameters_out.weight, std=0.02)
        model = nn.parallel.DistributedDataParallel(objective) if num_workers > 1 else objective
        model(images.double(), torch.tensor([3, 0, 4, 6, 1, 2, 5]), first=first)["loss"].backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters()}
    finally:
        Tensor.float = single
        torch.set_default_dtype(default)


def double_precision_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    share = (range(2), range(2, 4), range(4, 7))[rank]
    gradients = compute_gradients_in_double_precision(random_images(7)[share.start : share.stop], share.start, 3)
    torch.save(gradients, f"{folder}/rank{rank}.pth")
    dist.destroy_process_group()


def test_workers_with_unequal_shares_have_the_gradients_of_one_worker_except_for_rounding(tmp_path: Path) -> None:
    run_workers(double_precision_worker, (str(tmp_path),), 3)
    gradients = torch.load(tmp_path / "rank0.pth", weights_only=True)
    expected = compute_gradients_in_double_precision(random_images(7), 0, 1)
    assert float(expected["net.image_aligner.transformer.features.0.weight"].abs().max()) > 0
    for name, gradient in expected.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-8 * max(1.0, float(gradient.norm())), name


# Frozen statistics


@pytest.mark.parametrize(("mode", "moves"), [("frozen", False), ("train", True)])
def test_only_a_frozen_backbone_keeps_its_statistics_in_training_but_learns_its_weights(mode: str, moves: bool) -> None:
    objective = build_objective(mode)
    before = {name: value.clone() for name, value in objective.state_dict().items() if "running" in name}
    objective(random_images(2), torch.tensor([1, 0]))["loss"].backward()
    for name, value in objective.state_dict().items():
        if "running" in name:
            assert torch.equal(before[name], value) != (moves or not name.startswith("net.backbone.")), name
    assert float(objective.net.backbone.layer1[1].weight.grad.abs().max()) > 0


# Frames


def matrix(angle: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Builds a homogeneous transform (3, 3) without the tested code."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]], [0, 0, 1]])


def theta_of(transform: np.ndarray | None) -> Tensor | None:
    return None if transform is None else torch.tensor(transform[None, :2], dtype=torch.float32)


def scene(transform: np.ndarray, size: int) -> Tensor:
    """Makes (1, 2, size, size): a smooth function of the input image's coordinates, sampled in a transformed frame."""
    centres = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(centres, centres)
    u, v, _ = np.tensordot(transform, np.stack([x, y, np.ones_like(x)]), axes=1)
    return torch.tensor(np.stack([np.cos(u + 2 * v), np.sin(u - v) + u * v]), dtype=torch.float32)[None]


IMAGE, FIRST, SECOND, THIRD = (
    matrix(0.9, 1.05, (0.1, -0.05)),
    matrix(0.2, 0.95, (-0.1, 0.0)),
    matrix(0.0, 1.0, (0.12, 0.08)),
    matrix(-0.3, 1.1, (0.05, 0.1)),
)


@pytest.mark.parametrize("is_moved", list(itertools.product([True, False], repeat=4))[:-1])
def test_every_level_is_warped_to_the_last_frame(is_moved: tuple[bool, ...]) -> None:
    moved = [frame if move else None for frame, move in zip((IMAGE, FIRST, SECOND, THIRD), is_moved, strict=True)]
    image, first, second, third = (np.eye(3) if transform is None else transform for transform in moved)
    frames = (image @ first, image @ first @ second, image @ first @ second @ third)
    levels = tuple(scene(frame, size) for frame, size in zip(frames, (96, 64, 32), strict=True))
    thetas = tuple(theta_of(transform) for transform in moved[1:])
    common, total = warp_features_to_common_frame(AlignedFeatures(levels, thetas, scene(image, 64), theta_of(moved[0])))
    np.testing.assert_allclose(total[0], frames[2][:2], atol=1e-5)
    for level, size in zip(common, (96, 64, 32), strict=True):
        inside = slice(round(size * 0.3), round(size * 0.7))  # all levels show these pixels
        expected = scene(frames[2], size)
        torch.testing.assert_close(level[..., inside, inside], expected[..., inside, inside], rtol=0, atol=5e-3)


def test_levels_without_alignment_do_not_change() -> None:
    levels = tuple(scene(np.eye(3), size) for size in (16, 8, 4))
    common, total = warp_features_to_common_frame(
        AlignedFeatures(levels, (None, None, None), scene(np.eye(3), 64), None)
    )
    assert total is None
    assert all(warped is level for warped, level in zip(common, levels, strict=True))


def test_levels_and_thetas_of_the_network_are_in_the_documented_frames() -> None:
    net = build_network(aligned_config("frozen")).eval()
    for aligner in [net.image_aligner.transformer, *net.feature_aligners.values()]:
        nn.init.constant_(aligner.parameters_out.bias, 0.3)
    images = random_images(2)
    with torch.inference_mode():
        aligned = net(images)
        assert torch.equal(aligned.image, warp_images(images, aligned.theta_image, ALIGNED_IMAGE_PADDING))
        x = (aligned.image - net.pixel_mean) / net.pixel_std
        for number, layer in enumerate(("layer1", "layer2", "layer3")):
            x = warp_images(getattr(net.backbone, layer)(x), aligned.thetas[number], "reflection")
            torch.testing.assert_close(aligned.levels[number], x)
    angle = 0.3 * math.pi  # for a bias of 0.3, before the tanh
    assert float(aligned.theta_image[0, 1, 0]) == pytest.approx(math.sin(math.tanh(0.3) / 0.3 * angle), abs=1e-5)


def config_of(model: ModelConfig, **density: Any) -> Config:
    return parse_config(
        {
            "data": {"uri": "images"},
            "model": model.model_dump(),
            "density": {"kind": "gaussian", "num_channels": 24, **density},
        }
    )


def parts(count: int, seed: int) -> Tensor:
    """Makes images (count, 3, 64, 64) of one smooth part with a little noise."""
    line = torch.linspace(0, 3, 64)
    part = 0.5 + 0.2 * torch.sin(line[None, :] + 2 * line[:, None])
    return (part + 0.02 * torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@pytest.mark.parametrize("quarter_turns", [0, 1, 2])
def test_an_anomaly_is_marked_at_its_position_in_the_input_image(quarter_turns: int) -> None:
    torch.manual_seed(0)
    net = build_network(aligned_config("frozen")).eval()
    nn.init.constant_(net.image_aligner.transformer.parameters_out.bias, math.atanh(min(quarter_turns / 2, 0.9999)))
    for aligner in net.feature_aligners.values():
        nn.init.constant_(aligner.parameters_out.bias, 0.4)
    config = config_of(net.config)
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    statistics = compute_image_statistics(net, reduction, parts(24, 0).split(8), torch.device("cpu"))
    detector = build_detector(config, net, reduction, statistics)
    images = parts(3, 1)
    spots = [(20, 38), (40, 22), (26, 26)]
    for image, (row, column) in zip(images, spots, strict=True):
        image[:, row - 3 : row + 4, column - 3 : column + 4] = 1 - image[:, row, column, None, None].round()
    scored = detector(images)
    assert scored.anomaly_map.shape == (3, 64, 64)
    for anomaly_map, spot in zip(scored.anomaly_map, spots, strict=True):
        peak = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
        assert math.dist(peak, spot) <= 8, f"marked at {peak}, expected {spot}"


# Channel reduction


def slow_embedding(levels: tuple[Tensor, ...], config: DensityConfig) -> Tensor:
    """Smooths all levels, resamples them to one size, and concatenates all channels."""
    size = levels[0 if config.map_stride_px == 4 else 1].shape[2]
    resampled = []
    for name in config.layers:
        level = levels[int(name[-1]) - 1]
        if name in config.smooth_layers:
            level = F.avg_pool2d(level, 3, 1, 1, count_include_pad=False)
        if level.shape[2] > size:
            level = F.avg_pool2d(level, level.shape[2] // size)
        elif level.shape[2] < size:
            smooth = {} if config.map_stride_px == 4 else {"mode": "bilinear", "align_corners": False}
            level = F.interpolate(level, size=size, **smooth)
        resampled.append(level)
    return torch.cat(resampled, dim=1)


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("layers", [("layer1", "layer2", "layer3"), ("layer2", "layer3"), ("layer2",)])
@pytest.mark.parametrize("kind", ["random", "semi_orthogonal", "none"])
def test_reducing_each_level_first_equals_concatenating_first(kind: str, layers: tuple[str, ...], stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = tuple(torch.randn(2, 4 * n, 16 // n, 16 // n, generator=generator) for n in (1, 2, 4))
    settings = {"layers": layers, "reduction": kind, "num_channels": 6, "map_stride_px": stride, "coreset": 0}
    config = DensityConfig.model_validate(settings, context={"is_fitted": True})
    reduction = ChannelReduction((4, 8, 16), config, seed=3)
    whole = slow_embedding(levels, config)
    if kind == "random":
        whole = whole[:, reduction.chosen]
        assert len(set(reduction.chosen.tolist())) == 6
    elif kind == "semi_orthogonal":
        whole = torch.einsum("dc,bchw->bdhw", reduction.projection, whole)
        torch.testing.assert_close(reduction.projection @ reduction.projection.T, torch.eye(6))
    assert reduction.num_channels == whole.shape[1]
    torch.testing.assert_close(reduction(levels), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "semi_orthogonal"])
def test_the_reduction_depends_on_the_seed_only(kind: str) -> None:
    first, same_seed, other_seed = (
        ChannelReduction((64, 128, 256), DensityConfig(reduction=kind, coreset=0), seed).state_dict()
        for seed in (0, 0, 1)
    )
    (name,) = first
    assert torch.equal(first[name], same_seed[name])
    assert not torch.equal(first[name], other_seed[name])


def test_more_channels_than_the_layers_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"density\.num_channels=100, .*24 channels"):
        ChannelReduction((4, 8, 12), DensityConfig(), 0)
