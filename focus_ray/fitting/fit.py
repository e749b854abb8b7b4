"""From normal images to everything a bundle holds: train, add up the moments, calibrate. No files, no Ray.

Runs alone or on every worker of an initialised torch.distributed group; each worker brings its own shard of the images.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.config import Config
from focus_ray.data.shards import Shard, Steps
from focus_ray.density.base import (
    Statistics,
    build_density,
    choose_bank_images,
    leave_one_out_scorer,
    sample_evenly,
    supports_leave_one_out,
)
from focus_ray.density.moments import Moments
from focus_ray.density.relations import Relations, fold_numbers
from focus_ray.density.tiles import Tiles
from focus_ray.errors import ConfigError, DataError
from focus_ray.evaluation.calibration import Calibration, CalibrationBuilder, Method
from focus_ray.evaluation.selection import validation_images
from focus_ray.fitting.distributed import decided_by_first, gather_objects, gather_rows, world_size
from focus_ray.fitting.duplicates import (
    SHIFTS_PX,
    ImageOrigins,
    describe_images,
    describe_statistics,
    find_relations,
    measure_same_part_distance,
)
from focus_ray.fitting.left_out import leave_one_out_pass
from focus_ray.fitting.metric import Metric, images_to_look_at, metric_pass
from focus_ray.fitting.objective import Objective, build_optimizer, build_schedule, collapsed, train_epoch
from focus_ray.fitting.passes import (
    aligner_pass,
    calibration_pass,
    statistics_pass,
    validation_pass,
)
from focus_ray.fitting.profile import fit_profile
from focus_ray.fitting.scoring import GRID, Detector, to_images
from focus_ray.fitting.shared_metric import read_shared_metric
from focus_ray.fitting.state import Best, Notes, OnEpoch, TrainState
from focus_ray.kinds import DENSITIES
from focus_ray.model.alignment.congealing import CongealingAligner
from focus_ray.model.batch_norm import prepared_for_inference
from focus_ray.model.network import FocusNet, build_net
from focus_ray.model.reduction import ChannelReduction
from focus_ray.precision import compute_dtype
from focus_ray.progress import track
from focus_ray.seeds import derived_seed

_CALIBRATED = 128  # images, at most, that a density without a memory leaves out, each in turn
_MAX_COMPARED = (
    4096  # images among which the cross calibration looks for photographs of one part: all pairs are compared
)
# Fewer held-out images than this share show parts that training images do not show: then training images calibrate instead.
_MIN_UNRELATED_SHARE = 0.5


@dataclass
class FitResult:
    """What came out, the same on every worker."""

    detector: Detector
    statistics: Statistics
    calibration: Calibration
    notes: Notes = field(default_factory=Notes)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def net(self) -> FocusNet:
        return self.detector.net

    @property
    def reduction(self) -> ChannelReduction:
        return self.detector.reduction


def fit(
    config: Config,
    shard: Shard,
    num_images: int,
    device: torch.device,
    *,
    net: FocusNet | None = None,
    rank: int = 0,
    wrap: Callable[[torch.nn.Module], Any] | None = None,
    state: TrainState | None = None,
    on_epoch: OnEpoch | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> FitResult:
    """Aligns, trains, adds up the statistics and calibrates.

    Args:
        num_images: training images of all workers together.
        wrap: makes the objective data-parallel (DDP), when there are several workers.
        state: what `on_epoch`'s third argument gave at an earlier epoch, to go on from there.
        on_epoch: called by every worker after every epoch with its number, its figures and a function that gives the
            state to keep.

    Raises: DataError: too few images.  FloatingPointError: the loss is not finite.
    """
    run = Run(config, shard, num_images, device, net=net, rank=rank, log=log)
    run.learn(wrap, state, on_epoch)
    return run.finish()


def check_ingredients(config: Config) -> None:
    """Looks for what a fit needs besides images, so that it is told once and not by every worker.

    Raises: WeightsError: the weights cannot be had.  ConfigError: density.metric cannot be used, or calibration is to leave
        images out and the density cannot.
    """
    if config.calibration.method == "leave_one_out" and not supports_leave_one_out(
        config.density, config.model.shared_grid
    ):
        tiles = ", shared by tiles," if config.model.shared_grid != (1, 1) else ""
        raise ConfigError(
            f"calibration.method=leave_one_out: a density of kind {config.density.kind}{tiles} cannot leave an image out: set "
            "calibration.method=cross"
        )
    build_net(config.model)
    read_shared_metric(config)


def build_detector(config: Config, net: FocusNet, reduction: ChannelReduction, statistics: Statistics) -> Detector:
    """A detector of the density that the statistics give."""
    density = build_density(config.density, statistics)
    detector = Detector(net, reduction, density, config.scoring)
    if config.scoring.image_score == "profile" and statistics.bank is not None:
        apart = leave_one_out_scorer(config.density, statistics, density)
        detector.profile, detector.profiled = fit_profile(apart, statistics, detector.seen, detector.spread)
    return detector


class Run:
    """One category's way from images to a result; state that its stages share. Arguments as of `fit`."""

    def __init__(
        self,
        config: Config,
        shard: Shard,
        num_images: int,
        device: torch.device,
        *,
        net: FocusNet | None = None,
        rank: int = 0,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        torch.manual_seed(config.train.seed)
        net = build_net(config.model) if net is None else net
        net = net.to(device).to(memory_format=torch.channels_last)
        self.config, self.net, self.shard = config, net, shard
        self.device, self.rank, self.log = device, rank, log
        self._count_own(num_images)
        self.reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed).to(device)
        self.notes = Notes()
        self.seconds: dict[str, float] = {}
        self.best: Best | None = None
        self.metric: Metric | None = None  # once it is learnt
        self.validation = self._validation_set()
        self.method = self.calibration_method()
        # a few training images, photographed twice in simulation to measure how near two photographs of one part are
        self._references: Tensor | None = None
        self._own_parts: NDArray[np.int64] = shard.fit_groups()

    def _count_own(self, num_images: int) -> None:
        """Sets the number of training images of all workers, and where this worker's images lie among them."""
        self.num_images = num_images
        self.offset = num_images * self.rank // world_size()
        self.num_own = num_images * (self.rank + 1) // world_size() - self.offset

    def watched(self, what: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, with a line now and then of how many images are done."""
        return track(batches, what, self.num_images // world_size(), self.log, count=len)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    # ---- label-free selection
    def _validation_set(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """This worker's held-out normals and their synthetic defects; None where nothing is selected."""
        if not self.config.selection.enabled:
            return None
        normals = list(self.shard.validation_batches())
        if not normals:
            size = self.config.model.frame_px
            return np.empty((0, *size, 3), np.uint8), np.empty((0, *size), bool)
        return validation_images(
            torch.cat(normals).numpy(), seed=derived_seed(self.config.train.seed, "synthetic defects", self.rank)
        )

    def validate(self, what: dict[str, float | str]) -> float | None:
        """The validation score of the network as it is, noted with what it is; None where nothing is selected."""
        if self.validation is None:
            return None
        detector = build_detector(self.config, self.net, self.reduction, self.training_statistics())
        images, masks = self.validation
        figures = validation_pass(detector, images, masks)
        self.notes.selection.append({**what, **figures})
        self.log(
            ", ".join(f"{key} {value}" for key, value in what.items())
            + f": validation score {figures['score']:.4f} (image AUROC {figures['image_auroc']:.4f}, "
            f"AUPRO {figures['aupro']:.4f}, against synthetic defects)"
        )
        return figures["score"]

    def _own(self, chosen: set[int]) -> list[int]:
        """Places in this worker's share of images that are numbered over all workers."""
        return [number - self.offset for number in sorted(chosen) if number - self.offset in range(self.num_own)]

    # ---- image alignment
    def align(self) -> None:
        """Fits the image aligner; with selection on, keeps it only if it validates better than none does."""
        chosen = sample_evenly(self.num_images, self.config.model.image_alignment.max_images)
        batches = self.shard.fit_batches(places=self._own(chosen))
        found = aligner_pass(self.net, batches, self.device, self.config.train.seed)
        if found is None:
            return
        self.notes.alignment = found
        if found.enabled and self.validation is not None:
            aligner = self.net.image_aligner
            assert isinstance(aligner, CongealingAligner)
            group = self.config.model.image_alignment.group
            aligned = self.validate({"image_alignment": group})
            aligner.enabled.fill_(False)
            plain = self.validate({"image_alignment": "none"})
            assert aligned is not None
            assert plain is not None
            found.enabled = decided_by_first(lambda: aligned > plain)
            aligner.enabled.fill_(found.enabled)
        turned = "on" if found.enabled else "off"
        self.log(f"image alignment {turned} (pairwise L2 of held-out images falls by {found.drop:.0%})")

    # ---- training
    def learn(
        self,
        wrap: Callable[[torch.nn.Module], Any] | None = None,
        state: TrainState | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Aligns and trains, from the start or from a state; arguments as of `fit`."""
        if state is not None:
            self.restore(state)
        else:
            with self.timed("alignment"):
                self.align()
        with self.timed("train"):
            if self.config.train.epochs:
                self.train(wrap, state, on_epoch)

    def restore(self, state: TrainState) -> None:
        self.net.load_state_dict(state.net)
        self.notes, self.best = state.notes, state.best

    def train(
        self,
        wrap: Callable[[torch.nn.Module], Any] | None,
        state: TrainState | None,
        on_epoch: OnEpoch | None,
    ) -> None:
        train, net = self.config.train, self.net
        steps = Steps.agree(self.num_images, world_size(), train.batch_size_per_worker)
        objective = Objective(net, train)
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise DataError(
                "train.epochs is above 0, but no loss trains anything: set train.lambda_fine or lambda_ica above 0"
            )
        optimizer = build_optimizer(net, train)
        schedule = build_schedule(optimizer, train, steps.steps)
        first = 0
        if state is not None:
            optimizer.load_state_dict(state.optimizer)
            schedule.load_state_dict(state.schedule)
            first = state.epoch + 1
            schedule.last_epoch = first * steps.steps  # of this many workers: there may have been others before
        else:
            self._keep_best(-1)
        parallel = objective if wrap is None else wrap(objective)
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        autocast = train.precision == "bf16" or (train.precision == "auto" and bf16)
        for epoch in range(first, train.epochs):
            net.train()
            generator = torch.Generator().manual_seed(derived_seed(train.seed, "epoch", epoch, self.rank))
            start = time.perf_counter()
            batches = self._one_tile_each(self.shard.train_batches(steps.batch_size, steps.steps, generator), epoch)
            figures = train_epoch(parallel, batches, optimizer, schedule, train, self.device, generator, autocast)
            figures = {"epoch": float(epoch), **figures, "seconds": time.perf_counter() - start}
            self._note(figures)
            every = self.config.selection.every_epochs
            if (epoch + 1) % every == 0 or epoch + 1 == train.epochs:
                self._keep_best(epoch)
            if on_epoch is not None:

                def snapshot(epoch: int = epoch) -> TrainState:
                    kept = optimizer.state_dict(), schedule.state_dict()
                    return TrainState(epoch, net.state_dict(), *kept, copy.deepcopy(self.notes), self.best)

                on_epoch(epoch, figures, snapshot)
        if self.best is not None:
            net.load_state_dict(self.best.net)
            self.log(f"kept the network after epoch {self.best.epoch + 1} of {train.epochs} (0: untrained)")

    def _one_tile_each(self, batches: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        """Of images in tiles, one tile a batch, the same of all its images and on all workers; the tiles take turns."""
        tiles = Tiles.from_config(self.config.model)
        generator = torch.Generator().manual_seed(derived_seed(self.config.train.seed, "tiles", epoch))
        order = torch.randperm(tiles.num_tiles, generator=generator).tolist()
        for number, batch in enumerate(batches):
            yield batch if tiles.num_tiles == 1 else tiles.cut_tile(batch, order[number % len(order)])

    def _note(self, figures: dict[str, float]) -> None:
        """Keeps and logs an epoch's figures, with a warning where they show a collapse."""
        self.notes.history.append(figures)
        epoch, epochs = int(figures["epoch"]) + 1, self.config.train.epochs
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key != "epoch")
        self.log(f"epoch {epoch}/{epochs}: {shown}")
        if collapsed(figures):
            message = (
                f"epoch {epoch}: the features have collapsed (std {figures['feature_std']:.3g} of an even spread, "
                f"effective rank {figures['effective_rank']:.1f}): lower train.learning_rate or train.lambda_fine"
            )
            self.notes.warnings.append(message)
            self.log(f"WARNING: {message}")

    def _keep_best(self, epoch: int) -> None:
        """Validates the network; keeps a copy where it beats what was kept by the margin. Epoch -1 is the untrained."""
        self.net.eval()
        score = self.validate({"epoch": epoch + 1})
        if score is None:
            return
        best = self.best
        if best is None or decided_by_first(lambda: score > best.score + self.config.selection.margin):
            network = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
            self.best = Best(epoch, score, network)

    # ---- density and calibration
    def learn_metric(self) -> None:
        """Of the network as it is, where the reduction is one that learns."""
        if self.config.density.reduction == "discriminant":
            chosen = images_to_look_at(self.num_images, Tiles.from_config(self.config.model).num_tiles)
            places = self._own(chosen)
            self.metric = metric_pass(
                self.net,
                self.reduction,
                self.shard.fit_batches(places=places),
                self.device,
                self.num_images,
                [self.offset + place for place in places],
                self.config.train.seed,
                read_shared_metric(self.config),
                in_folds=self.method == "leave_one_out",
                origins=self._origins(sorted(chosen), self.reduction),
                log=self.log,
            )
            self.reduction.projection.copy_(self.metric.projection)

    def training_statistics(self, for_calibration: bool = False) -> Statistics:
        """Of the training images, under the network as it is.

        Args: for_calibration: keep the embeddings of some images also where the density needs none.
        """
        self.net.eval()
        config = self.config.density
        self.learn_metric()
        kept = choose_bank_images(config, self.num_images)
        if kept is None and for_calibration:
            kept = sample_evenly(self.num_images, _CALIBRATED)
        batches = self.watched("statistics", self.shard.fit_batches())
        known = None if self.metric is None else self.metric.known
        found = statistics_pass(self.net, self.reduction, batches, self.device, kept, self.offset, known)
        if self.metric is not None:
            self.metric = self.metric._replace(known=None)  # their memory is needed
        if found.bank is not None and kept is not None:
            self._relate(found, self._origins(sorted(kept), self.reduction))
        return found

    # ---- images that show the same part
    def _origins(self, positions: Sequence[int], reduction: ChannelReduction) -> ImageOrigins:
        """The origins of training images, which are named by their positions among the images of all workers."""
        groups, order = (
            torch.from_numpy(np.concatenate(gather_objects(numbers)))[list(positions)]
            for numbers in (self.shard.fit_groups(), self.shard.fit_order())
        )
        return ImageOrigins(groups, order, self._same_part_distance(reduction))

    def _same_part_distance(self, reduction: ChannelReduction) -> float | None:
        """As `measure_same_part_distance`, of a few training images; the same on every worker."""
        if self._references is None:
            places = self._own(sample_evenly(self.num_images, len(SHIFTS_PX)))
            images = list(self.shard.fit_batches(places=places))
            size = self.config.model.frame_px
            own = (
                torch.cat([batch[..., :3] for batch in images])
                if images
                else torch.empty(0, *size, 3, dtype=torch.uint8)
            )
            self._references = gather_rows(own, self.device)
        references = self._references
        return decided_by_first(lambda: measure_same_part_distance(self.net, reduction, references, self.device))

    def _relate(self, statistics: Statistics, origins: ImageOrigins) -> None:
        """Finds images of the bank that show the same part."""
        statistics.descriptors = describe_statistics(statistics, self.reduction)
        descriptors = statistics.descriptors.float()
        statistics.same_part_distance = origins.same_part_distance
        statistics.relations = decided_by_first(lambda: find_relations(descriptors, origins))

    def _describe(self, batches: Iterable[Tensor]) -> Tensor:
        """Descriptors (n, P, K) of images of all workers."""
        parts = [describe_images(self.net, self.reduction, to_images(batch, self.device)) for batch in batches]
        num_channels = self.reduction.num_coreset_channels or self.reduction.num_channels
        own = torch.cat(parts).cpu() if parts else torch.empty(0, GRID * GRID, num_channels)
        return gather_rows(own, self.device)

    @torch.inference_mode()
    def _unrelated_holdout(self, statistics: Statistics) -> list[int] | None:
        """Places, in this worker's share, of held-out images that show other parts than the images of the bank.

        Returns: None if too few do: then held-out images cannot say how a new part scores.
        """
        counts = gather_objects(self.shard.num_holdout())
        own_places = range(self.shard.num_holdout())
        if statistics.bank is None or statistics.descriptors is None:
            return list(own_places)
        holdout_descriptors = self._describe(self.shard.holdout_batches())
        bank_positions = sorted(
            choose_bank_images(self.config.density, self.num_images) or sample_evenly(self.num_images, _CALIBRATED)
        )
        bank_origins = self._origins(bank_positions, self.reduction)
        num_bank = len(bank_positions)
        groups, order = (
            torch.from_numpy(np.concatenate(gather_objects(numbers)))
            for numbers in (self.shard.holdout_groups(), self.shard.holdout_order())
        )
        origins = ImageOrigins(
            torch.cat([bank_origins.groups, groups]),
            torch.cat([bank_origins.order, order]),
            bank_origins.same_part_distance,
        )
        descriptors = torch.cat([statistics.descriptors.float(), holdout_descriptors])
        relations = decided_by_first(lambda: find_relations(descriptors, origins))
        if relations is None:
            return list(own_places)
        unrelated = ~relations.related[num_bank:, :num_bank].any(dim=1)
        num_related = int((~unrelated).sum())
        if num_related:
            self._warn(
                f"{num_related} of {len(unrelated)} held-out photographs show parts that training photographs show too: they do "
                "not set the threshold"
            )
        if float(unrelated.float().mean()) < _MIN_UNRELATED_SHARE:
            return None
        first = sum(counts[: self.rank])
        return [place for place in own_places if bool(unrelated[first + place])]

    def _note_relations(self, relations: Relations) -> None:
        """Tells how many parts the photographs show."""
        count, num_parts = len(relations.groups), relations.num_groups
        self.notes.parts = {"num_images": count, "num_parts": num_parts}
        self.log(f"{count} photographs show about {num_parts} parts: photographs of one part are left out together")

    def _warn(self, message: str) -> None:
        self.notes.warnings.append(message)
        self.log(f"WARNING: {message}")

    def _join_validation(self) -> None:
        """Adds the images that selection held out to the training images. Call it once nothing is left to be selected."""
        if self.validation is None:
            return
        self.shard = self.shard.join_validation()
        counts = gather_objects(len(self.shard.fit_groups()))
        self.num_images, self.num_own = sum(counts), counts[self.rank]
        self.offset = sum(counts[: self.rank])

    def calibration_method(self) -> Method:
        """The configured one; auto: by images that were held out, or else by leaving each out of the density."""
        method = self.config.calibration.method
        if method != "auto":
            return method
        if sum(gather_objects(self.shard.num_holdout())):
            return "split"
        return (
            "leave_one_out" if supports_leave_one_out(self.config.density, self.config.model.shared_grid) else "cross"
        )

    def finish(self) -> FitResult:
        self.net.eval()
        with prepared_for_inference(self.net, compute_dtype(self.config.model.precision, self.device)):
            return self._finish()

    def _finish(self) -> FitResult:
        folds: list[Statistics] = []
        fold_places: list[list[int]] = []
        held_out: list[int] | None = None
        self._join_validation()
        with self.timed("statistics"):
            if self.method == "split":
                statistics = self.training_statistics(for_calibration=True)
                held_out = self._unrelated_holdout(statistics)
                if held_out is None:
                    leave_out = supports_leave_one_out(self.config.density, self.config.model.shared_grid)
                    self.method = "leave_one_out" if leave_out else "cross"
                    self._warn("training photographs set the threshold instead, each scored with its part left out")
            if self.method == "cross":
                self.learn_metric()
                fold_places = self._folds_by_part()
                folds = [self._fold_statistics(places) for places in fold_places]
                statistics = _join_all(folds)
            elif self.method == "leave_one_out":
                statistics = self.training_statistics(for_calibration=True)
            statistics.limit_bank(self.config.density.max_images)
            statistics.scatter = None if self.metric is None else self.metric.scatters
        if statistics.relations is not None:
            self._note_relations(statistics.relations)
        with self.timed("calibration"):
            sample = statistics
            if not DENSITIES[self.config.density.kind].keeps_bank:
                statistics = dataclasses.replace(statistics, bank=None, thetas=None, shown=None, relations=None)
            detector = build_detector(self.config, self.net, self.reduction, statistics)
            if self.method == "cross":
                builder = self._cross_calibrate(folds, fold_places)
            elif self.method == "leave_one_out":
                builder = leave_one_out_pass(detector, sample, self.config, self.metric, self.log)
            else:
                held = self.watched("calibration", self.shard.holdout_batches(held_out))
                groups = self.shard.holdout_groups()[held_out]
                builder = calibration_pass(detector, held, self.config.calibration, self.method, self.device, groups)
        return FitResult(
            detector,
            statistics,
            builder.finish(),
            self.notes,
            self.seconds,
        )

    def _folds_by_part(self) -> list[list[int]]:
        """Places, in this worker's share, of the images of each fold of the cross calibration.

        Photographs that are recognised to show the same part are in the same fold.
        """
        num_folds = self.config.calibration.num_folds
        folds, self._own_parts = self.shard.fit_folds(), self.shard.fit_groups()
        if self.num_images <= _MAX_COMPARED:
            origins = self._origins(range(self.num_images), self.reduction)
            descriptors = self._describe(self.shard.fit_batches())
            relations = decided_by_first(lambda: find_relations(descriptors, origins))
            if relations is not None:
                self._note_relations(relations)
                own = slice(self.offset, self.offset + self.num_own)
                folds = fold_numbers(relations.groups, num_folds).numpy()[own]
                self._own_parts = relations.groups.numpy()[own]
        return [np.flatnonzero(folds == fold).tolist() for fold in range(num_folds)]

    def _fold_statistics(self, places: list[int]) -> Statistics:
        """Of the images of one fold; keeps no more embeddings than a memory made of the other folds alone would take."""
        config = self.config.density
        sizes = gather_objects(len(places))
        limit = -(-config.max_images // (self.config.calibration.num_folds - 1))
        kept = sample_evenly(sum(sizes), limit) if DENSITIES[config.kind].keeps_bank else None
        batches = self.shard.fit_batches(places)
        return statistics_pass(self.net, self.reduction, batches, self.device, kept, sum(sizes[: self.rank]))

    def _cross_calibrate(self, folds: list[Statistics], places: list[list[int]]) -> CalibrationBuilder:
        """Training images are scored by the density of the other folds: a memory no larger than the one that ships."""
        limit = -(-self.config.calibration.max_images // len(folds))  # of a fold
        joined: CalibrationBuilder | None = None
        groups = self._own_parts
        for fold, part in enumerate(folds):
            if not part.moments.count:
                continue
            rest = _join_all([other for number, other in enumerate(folds) if number != fold])
            rest.limit_bank(self.config.density.max_images)
            detector = build_detector(self.config, self.net, self.reduction, rest)
            sizes = gather_objects(len(places[fold]))
            first = sum(sizes[: self.rank])
            chosen = sample_evenly(sum(sizes), limit)
            own = [place for number, place in enumerate(places[fold]) if first + number in chosen]
            scored = self.shard.fit_batches(own)
            builder = calibration_pass(detector, scored, self.config.calibration, "cross", self.device, groups[own])
            joined = builder if joined is None else joined.merge(builder)
        assert joined is not None
        return joined


def _join_all(parts: list[Statistics]) -> Statistics:
    """The statistics of all parts together; the parts stay as they are."""
    first = parts[0].moments
    total = Statistics(
        Moments(first.height, first.width, first.channels, first.mean.device),
        None if parts[0].bank is None else parts[0].bank[:0],
        None if parts[0].thetas is None else parts[0].thetas[:0],
        shown=None if parts[0].shown is None else parts[0].shown[:0],
        grid=parts[0].grid,
    )
    for part in parts:
        total.join(part)
    return total
