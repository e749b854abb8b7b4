"""Module that fits the detector of one category: aligns, trains, computes statistics, and calibrates. It does not use Ray.

The fit runs in one process, or on every worker of an initialised torch.distributed group. Each worker has its own shard (share
of the images). An image number counts the training images of all workers, from 0. Rank is the number of a worker. The bank
contains the stored embeddings of normal images. "Selection" means: a validation score on synthetic defects chooses alignment and
training length.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.density.base import (
    NormalStatistics,
    build_density,
    build_leave_one_out_scorer,
    choose_bank_images,
    choose_evenly_spaced,
    supports_leave_one_out,
)
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.registry import DENSITIES
from focus_ray.density.relations import ImageRelations, assign_folds
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.calibration import Calibration, CalibrationBuilder, Method
from focus_ray.detect.detector import GRID, Detector
from focus_ray.detect.profile import fit_profile
from focus_ray.distributed import all_gather_objects, all_gather_rows, compute_on_rank0_and_broadcast, get_world_size
from focus_ray.errors import ConfigError
from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.batch_norm import use_inference_backbone
from focus_ray.features.network import FocusNet, build_network, convert_to_float_images
from focus_ray.fitting.duplicates import (
    SHIFTS_PX,
    ImageGroupsAndOrder,
    compute_bank_descriptors,
    compute_image_descriptors,
    find_related_images,
    measure_same_part_distance,
)
from focus_ray.fitting.leave_one_out import collect_leave_one_out_scores
from focus_ray.fitting.passes import (
    collect_calibration_scores,
    compute_image_statistics,
    fit_aligner,
    validate_detector,
)
from focus_ray.fitting.projection import DiscriminantProjection, choose_projection_images, learn_projection
from focus_ray.fitting.selection import MIN_GAIN, make_validation_images
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import BlockReader, Shard, read_blocks, read_train_batches
from focus_ray.fitting.shared_metric import read_shared_metric
from focus_ray.fitting.split import MAX_CALIBRATION_IMAGES, NUM_CALIBRATION_FOLDS
from focus_ray.fitting.state import BestNetwork, FitNotes, IntervalCallback, TrainState
from focus_ray.fyd.batch_schedule import BatchSchedule
from focus_ray.precision import choose_compute_dtype
from focus_ray.progress import track_progress
from focus_ray.seeds import derive_seed

if TYPE_CHECKING:
    from focus_ray.fyd.training import FydTraining

_MAX_LEAVE_ONE_OUT_IMAGES = 128  # images that a density without a bank keeps for leave-one-out
MAX_ALIGNMENT_IMAGES = 512  # images from which congealing learns its mean image
# Cross calibration searches for photographs of one part among at most this many images, because it compares all pairs.
_MAX_COMPARED_IMAGES = 4096
# If a smaller share of the held-out images shows parts that no training image shows, training images calibrate instead.
_MIN_UNRELATED_SHARE = 0.5


@dataclass
class FitResult:
    """The result of a fit, the same on every worker except for `seconds`.

    statistics: from which the density of the detector was built.
    notes: intermediate results for reports.
    seconds: name of a stage of the fit -> its duration on this worker.
    """

    detector: Detector
    statistics: NormalStatistics
    calibration: Calibration
    notes: FitNotes = field(default_factory=FitNotes)
    seconds: dict[str, float] = field(default_factory=dict)


def fit(
    config: Config,
    shard: Shard,
    num_images: int,
    device: torch.device,
    *,
    net: FocusNet | None = None,
    notes: FitNotes | None = None,
    rank: int = 0,
    state: TrainState | None = None,
    on_interval: IntervalCallback | None = None,
    block_reader: BlockReader | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> FitResult:
    """Fits the detector of one category: aligns, trains, computes statistics, and calibrates.

    Sets the global random seed of torch to train.seed.

    Args:
        shard: this worker's images.
        num_images: number of training images of all workers.
        net: network to fit, which is changed in place; None: a new network with the configured weights.
        notes: notes of the training of `net`; None: `net` was not trained.
        device: device of the network and the density.
        rank: number of this worker, from 0.
        state: saved state from which training resumes; None starts a new fit.
        on_interval: called by every worker after every interval of the training; see `IntervalCallback`.
        block_reader: reads images for the training that are not in RAM; None: `read_blocks` in this process.
        log: called with each message.

    Returns: the detector, its statistics and its calibration.

    Raises:
        DataError: there are too few images, no loss trains a parameter, or the mask of a region cannot be used.
        ValueError: too few images remain for the density, its calibration or the image aligner; or train.scope is plant and there
            is no network.
        FloatingPointError: the loss, or a weight after an interval, is not finite.
        WeightsError, ConfigError: see `check_fit_prerequisites`.
    """
    fitter = DetectorFitter(
        config, shard, num_images, device, net=net, notes=notes, rank=rank, block_reader=block_reader, log=log
    )
    fitter.align_and_train(state, on_interval)
    return fitter.build_and_calibrate()


def check_fit_prerequisites(config: Config) -> None:
    """Checks before a fit that the backbone weights, the shared metric and the calibration method can be used.

    Call it once before the workers start. Otherwise the same error would appear once for each worker. A shared metric is a file
    with directions that were learnt from other categories (density.metric).

    Raises:
        WeightsError: the pretrained weights cannot be loaded.
        ConfigError: density.metric cannot be used, or the density does not support calibration.method=leave_one_out.
    """
    if config.calibration.method == "leave_one_out" and not supports_leave_one_out(
        config.density, config.model.density_tile_grid
    ):
        tiles = " that tiles share" if config.model.density_tile_grid != (1, 1) else ""
        raise ConfigError(
            f"calibration.method=leave_one_out: density.kind={config.density.kind}{tiles} does not support leave-one-out: set "
            "calibration.method=cross"
        )
    build_network(config.model)
    read_shared_metric(config)


def build_detector(
    config: Config, net: FocusNet, reduction: ChannelReduction, statistics: NormalStatistics
) -> Detector:
    """Builds a detector: fits its density and, if scoring.image_score is "profile", its profile of good images.

    Args: statistics: statistics of the normal images. Without a bank, the detector has no profile.

    Raises: ValueError: fewer than two images, or the density needs a bank and the statistics have none.
    """
    density = build_density(config.density, statistics)
    detector = Detector(net, reduction, density, config.scoring)
    if config.scoring.image_score == "profile" and statistics.bank is not None:
        scorer = build_leave_one_out_scorer(config.density, statistics, density)
        detector.profile, detector.profile_distances = fit_profile(
            scorer, statistics, detector.coverage_mask, detector.map_generator
        )
    return detector


class DetectorFitter:
    """The fit of the detector of one category; it holds the state that the stages share. `fit` describes the arguments.

    Attributes:
        num_images: number of training images of all workers.
        num_own: number of training images of this worker.
        offset: image number of this worker's first training image.
        validation: this worker's validation images (N, H, W, C) and masks (N, H, W) of their synthetic defects; None if no
            validation score chooses alignment and training length (selection.fraction=0).
        training: the training of the network for this category; None without such a training.
        method: calibration method.
        best: the network with the best validation score so far; None before the first validation, and with selection.fraction=0.
        projection: the learnt projection; None before it is learnt, and for other reductions.
        notes: intermediate results for the bundle's manifest and for reports.
        seconds: duration of each stage, by name.
    """

    def __init__(
        self,
        config: Config,
        shard: Shard,
        num_images: int,
        device: torch.device,
        *,
        net: FocusNet | None = None,
        notes: FitNotes | None = None,
        rank: int = 0,
        block_reader: BlockReader | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        if config.train.trains_plant and net is None:
            raise ValueError(
                "train.scope=plant: pass the network that was trained for all categories (`fitting.plant`)"
            )
        torch.manual_seed(config.train.seed)
        net = build_network(config.model) if net is None else net
        net = net.to(device).to(memory_format=torch.channels_last)
        self.training: FydTraining | None = None
        if config.train.trains_each_category:
            from focus_ray.fyd.training import FydTraining

            self.training = FydTraining(net, device, config.train)
        self.config, self.net, self.shard = config, net, shard
        self.device, self.rank, self.log = device, rank, log
        self.block_reader = block_reader or functools.partial(read_blocks, config)
        self.num_images = num_images
        self.offset = num_images * rank // get_world_size()
        self.num_own = num_images * (rank + 1) // get_world_size() - self.offset
        self.reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed).to(device)
        self.notes = copy.deepcopy(notes) if notes is not None else FitNotes()
        self.seconds: dict[str, float] = {}
        self.best: BestNetwork | None = None
        self.projection: DiscriminantProjection | None = None
        self.validation = self._make_validation_set()
        self.method = self._choose_calibration_method()
        # a few training images (N, H, W, 3), from which the distance between two photographs of one part is measured
        self._reference_images: Tensor | None = None

    def _track_progress(self, stage: str, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Generator: yields the batches unchanged, and logs from time to time how many images are finished."""
        return track_progress(batches, stage, self.num_images // get_world_size(), self.log, count=len)

    @contextmanager
    def _measure_stage_time(self, stage: str) -> Iterator[None]:
        """Context manager: stores the duration of the with block in `seconds`, under the name of the stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    # ---- label-free selection
    def _make_validation_set(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """Makes the validation set: this worker's normal validation images, and copies with synthetic defects.

        Returns: images (N, H, W, C), and masks (N, H, W) of the defects; None with selection.fraction=0.

        Raises: DataError: the worker has only one validation image.
        """
        if not self.config.selection.enabled:
            return None
        normals = self._concatenate_batches(self.shard.read_batches("validation")).numpy()
        if not len(normals):
            return normals, np.empty(normals.shape[:3], bool)
        return make_validation_images(normals, derive_seed(self.config.train.seed, "synthetic defects", self.rank))

    def _concatenate_batches(self, batches: Iterable[Tensor]) -> Tensor:
        """Concatenates batches to images (N, H, W, C) uint8; without batches, N is 0."""
        parts = list(batches)
        return torch.cat(parts) if parts else torch.empty(0, *self.config.model.resized_image_px, 3, dtype=torch.uint8)

    def _validate_network(self, choice: dict[str, float | str]) -> float:
        """Computes the validation score of the current network, adds the validation metrics to the notes, and logs them.

        Args: choice: describes the network in notes and logs, for instance {"step": 3}.
        """
        assert self.validation is not None
        detector = build_detector(self.config, self.net, self.reduction, self.compute_training_statistics())
        figures = validate_detector(detector, *self.validation)
        self.notes.selection.append({**choice, **figures})
        self.log(
            ", ".join(f"{key} {value}" for key, value in choice.items())
            + f": validation score {figures['score']:.4f} (image AUROC {figures['image_auroc']:.4f}, "
            f"AUPRO {figures['aupro']:.4f}, against synthetic defects)"
        )
        return figures["score"]

    def _select_own_positions(self, images: set[int]) -> list[int]:
        """Converts image numbers to ascending positions in this worker's shard; drops the images of other workers."""
        return [number - self.offset for number in sorted(images) if number - self.offset in range(self.num_own)]

    # ---- image alignment
    def fit_image_aligner(self) -> None:
        """Fits a congealing image aligner to some training images, and adds the report to the notes.

        A network without a congealing aligner does not change. With selection, the aligner stays on only if it raises the
        validation score.
        """
        chosen = choose_evenly_spaced(self.num_images, MAX_ALIGNMENT_IMAGES)
        batches = self.shard.read_batches("fit", positions=self._select_own_positions(chosen))
        report = fit_aligner(self.net, batches, self.device, self.config.train.seed)
        if report is None:
            return
        self.notes.alignment = report
        if report.enabled and self.validation is not None:
            aligner = self.net.image_aligner
            assert isinstance(aligner, CongealingAligner)
            group = self.config.model.image_alignment.group
            aligned_score = self._validate_network({"image_alignment": group})
            aligner.enabled.fill_(False)
            unaligned_score = self._validate_network({"image_alignment": "none"})
            report.enabled = compute_on_rank0_and_broadcast(lambda: aligned_score > unaligned_score)
            aligner.enabled.fill_(report.enabled)
        on_or_off = "on" if report.enabled else "off"
        self.log(f"image alignment {on_or_off} (pairwise L2 of held-out images falls by {report.drop:.0%})")

    # ---- training
    def align_and_train(self, state: TrainState | None = None, on_interval: IntervalCallback | None = None) -> None:
        """Fits the image aligner and trains the network, or resumes training from a saved state.

        The arguments are described in `fit`.
        """
        if state is not None:
            assert self.training is not None
            self.training.load_network_weights(state.net)
            self.notes, self.best = state.notes, state.best
        else:
            with self._measure_stage_time("alignment"):
                self.fit_image_aligner()
        with self._measure_stage_time("train"):
            if self.training is not None:
                self.train_network(self.training, state, on_interval)

    def train_network(
        self, training: FydTraining, state: TrainState | None, on_interval: IntervalCallback | None
    ) -> None:
        """Trains for train.steps steps. With selection, the network then gets the weights of `best`.

        The arguments are described in `fit`.

        Raises:
            DataError: no loss trains a parameter, or a worker has fewer than two images.
            TrainingError: the stream of images ended too early.
            FloatingPointError: the loss, or a weight after an interval, is not finite.
        """
        from focus_ray.fyd.training import count_batches_to_read, cut_one_tile_per_image, recompute_running_statistics

        train, tiles = self.config.train, TileGrid(*self.config.model.tile_layout)
        schedule = BatchSchedule.plan([self.num_images], get_world_size(), train.batch_size, train.seed)
        training.build_optimizer_and_schedule(schedule)
        if state is None:
            self._keep_best_network(0)
        else:
            training.restore_optimizer(state.optimizer, state.schedule)
        first_step = 0 if state is None else state.step
        steps_to_read = range(first_step, count_batches_to_read(train, schedule))
        batches = read_train_batches([self.shard], schedule, steps_to_read, self.block_reader)
        batches = cut_one_tile_per_image(batches, tiles, train.seed, first_step)
        for figures in training.run_intervals(batches, first_step):
            step = int(figures["step"])
            self.notes.record_interval(figures, train.steps, self.log)
            self._keep_best_network(step)
            if on_interval is not None:

                def build_train_state(step: int = step) -> TrainState:
                    return TrainState(step, *training.get_state_dicts(), copy.deepcopy(self.notes), self.best)

                on_interval(step, figures, build_train_state)
        if self.best is not None:
            self.net.load_state_dict(self.best.net)
            self.log(f"kept the network after step {self.best.step} of {train.steps} (0: untrained)")
        if self.best is None or self.best.step:
            recompute_running_statistics(self.net, batches, self.device)

    def _keep_best_network(self, step: int) -> None:
        """Validates the network, and stores a copy as `best` if `best` is empty or its score is exceeded by more than MIN_GAIN.

        Without selection, nothing happens. The score uses synthetic defects in good images, never test images.

        Args: step: number of finished steps; 0 for the untrained network.
        """
        if self.validation is None:
            return
        self.net.eval()
        score = self._validate_network({"step": step})
        best = self.best
        if best is None or compute_on_rank0_and_broadcast(lambda: score > best.score + MIN_GAIN):
            network = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
            self.best = BestNetwork(step, score, network)

    # ---- density and calibration
    def learn_projection(self) -> None:
        """Learns the discriminant projection from the current network's features, and copies it into the reduction.

        Nothing happens unless density.reduction=discriminant.

        Raises: ValueError: fewer than two images. ConfigError: density.metric cannot be used.
        """
        if self.config.density.reduction != "discriminant":
            return
        chosen = choose_projection_images(self.num_images, TileGrid(*self.config.model.tile_layout).num_tiles)
        rows = self._select_own_positions(chosen)
        self.projection = learn_projection(
            self.net,
            self.reduction,
            self.shard.read_batches("fit", positions=rows),
            self.device,
            self.num_images,
            [self.offset + row for row in rows],
            self.config.train.seed,
            read_shared_metric(self.config),
            has_folds=self.method == "leave_one_out",
            groups_and_order=self._collect_groups_and_order(sorted(chosen)),
            log=self.log,
        )
        self.reduction.projection.copy_(self.projection.projection)

    def compute_training_statistics(self, for_calibration: bool = False) -> NormalStatistics:
        """Learns the projection, and then computes the statistics of the training images of all workers.

        Args: for_calibration: True: store the embeddings of some images in a bank even if the density needs no bank.

        Raises: see `learn_projection`.
        """
        self.net.eval()
        self.learn_projection()
        bank_images = self._choose_bank_images(for_calibration)
        batches = self._track_progress("statistics", self.shard.read_batches("fit"))
        cache = None if self.projection is None else self.projection.cache
        statistics = compute_image_statistics(
            self.net, self.reduction, batches, self.device, bank_images, self.offset, cache
        )
        if self.projection is not None:
            self.projection = self.projection._replace(cache=None)  # frees its memory
        if bank_images is not None:
            statistics.descriptors = compute_bank_descriptors(statistics, self.reduction)
            groups_and_order = self._collect_groups_and_order(sorted(bank_images))
            statistics.same_part_distance = groups_and_order.same_part_distance
            statistics.relations = _find_related_images(statistics.descriptors.float(), groups_and_order)
        return statistics

    def _choose_bank_images(self, for_calibration: bool) -> set[int] | None:
        """Chooses the image numbers of the images whose embeddings are stored in the bank; None: there is no bank.

        Args: for_calibration: see `compute_training_statistics`.
        """
        images = choose_bank_images(self.config.density, self.num_images)
        if images is None and for_calibration:
            return choose_evenly_spaced(self.num_images, _MAX_LEAVE_ONE_OUT_IMAGES)
        return images

    # ---- images that show the same part
    def _collect_groups_and_order(self, positions: Sequence[int]) -> ImageGroupsAndOrder:
        """Returns the groups and the order of some training images of all workers. Args: positions: their image numbers."""
        groups, order = (
            _gather_from_workers(self.shard.share.fit.groups),
            _gather_from_workers(self.shard.share.fit.order),
        )
        return ImageGroupsAndOrder(groups[list(positions)], order[list(positions)], self._measure_same_part_distance())

    def _measure_same_part_distance(self) -> float | None:
        """Measures how different two photographs of one physical part may be; the result is the same on every worker.

        `measure_same_part_distance` explains the result. The images for the measurement are gathered once and then kept.
        """
        if self._reference_images is None:
            rows = self._select_own_positions(choose_evenly_spaced(self.num_images, len(SHIFTS_PX)))
            own_images = self._concatenate_batches(self.shard.read_batches("fit", positions=rows))[..., :3]
            self._reference_images = all_gather_rows(own_images)
        images = self._reference_images
        return compute_on_rank0_and_broadcast(
            lambda: measure_same_part_distance(self.net, self.reduction, images, self.device)
        )

    def _compute_descriptors(self, batches: Iterable[Tensor]) -> Tensor:
        """Computes descriptors (n, P, K), coarse features, of the images of all workers.

        Args: batches: this worker's images.
        """
        num_channels = self.reduction.num_coreset_channels or self.reduction.num_channels
        parts = [torch.empty(0, GRID * GRID, num_channels)]
        for batch in batches:
            images = convert_to_float_images(batch, self.device)
            parts.append(compute_image_descriptors(self.net, self.reduction, images).cpu())
        return all_gather_rows(torch.cat(parts))

    @torch.inference_mode()
    def _find_unrelated_holdout(self, statistics: NormalStatistics) -> list[int] | None:
        """Finds this worker's held-out images that show other physical parts than the images of the bank.

        If some held-out images show the same parts, it adds a warning to the notes and logs it.

        Returns: positions among this worker's held-out images. None if less than `_MIN_UNRELATED_SHARE` of the held-out images
            of all workers show other parts: the scores of held-out images then do not show how a new part scores.
        """
        counts = all_gather_objects(len(self.shard.share.holdout))
        bank_images = self._choose_bank_images(for_calibration=True)
        assert bank_images is not None
        assert statistics.descriptors is not None
        bank = self._collect_groups_and_order(sorted(bank_images))
        groups, order = (
            _gather_from_workers(self.shard.share.holdout.groups),
            _gather_from_workers(self.shard.share.holdout.order),
        )
        groups_and_order = ImageGroupsAndOrder(
            torch.cat([bank.groups, groups]), torch.cat([bank.order, order]), bank.same_part_distance
        )
        holdout_descriptors = self._compute_descriptors(self.shard.read_batches("holdout"))
        relations = _find_related_images(
            torch.cat([statistics.descriptors.float(), holdout_descriptors]), groups_and_order
        )
        is_related = torch.zeros(sum(counts), dtype=torch.bool)
        if relations is not None:
            is_related = relations.related[len(bank_images) :, : len(bank_images)].any(dim=1)
        if num_related := int(is_related.sum()):
            self.notes.add_warning(
                f"{num_related} of {len(is_related)} held-out photographs show parts that training photographs also show: these "
                "photographs are not used for the threshold",
                self.log,
            )
        if 1 - float(is_related.float().mean()) < _MIN_UNRELATED_SHARE:
            return None
        first = sum(counts[: self.rank])
        return [row for row in range(len(self.shard.share.holdout)) if not is_related[first + row]]

    def _record_related_images(self, relations: ImageRelations) -> None:
        """Adds the number of physical parts that the photographs show to the notes, and logs it."""
        count, num_parts = len(relations.groups), relations.num_groups
        self.notes.parts = {"num_images": count, "num_parts": num_parts}
        self.log(f"{count} photographs show about {num_parts} parts: photographs of one part are left out together")

    def _add_validation_to_training(self) -> None:
        """Adds the validation images to the training images. Call it after the last validation."""
        if self.validation is None:
            return
        self.shard = self.shard.merge_validation_into_fit()
        counts = all_gather_objects(len(self.shard.share.fit.groups))
        self.num_images, self.num_own = sum(counts), counts[self.rank]
        self.offset = sum(counts[: self.rank])

    def _choose_calibration_method(self) -> Method:
        """Chooses the calibration method: calibration.method or, if that is auto, split if there are held-out images."""
        method = self.config.calibration.method
        if method != "auto":
            return method
        return (
            "split" if sum(all_gather_objects(len(self.shard.share.holdout))) else self._choose_method_without_holdout()
        )

    def _choose_method_without_holdout(self) -> Method:
        """Returns the calibration method that uses training images: leave_one_out if the density supports it, else cross."""
        config = self.config
        return "leave_one_out" if supports_leave_one_out(config.density, config.model.density_tile_grid) else "cross"

    def build_and_calibrate(self) -> FitResult:
        """Computes the statistics, builds the detector and calibrates it, with the trained network.

        Raises:
            DataError: there is no normal image for the calibration.
            ValueError: there are too few images for the density, the projection or leave-one-out.
            ConfigError: density.metric cannot be used.
        """
        self.net.eval()
        with use_inference_backbone(self.net, choose_compute_dtype(self.config.model.precision, self.device)):
            return self._build_and_calibrate_prepared()

    def _build_and_calibrate_prepared(self) -> FitResult:
        """Computes the result of `build_and_calibrate` with a network that is already prepared for inference."""
        folds: list[_CrossValidationFold] = []
        holdout_rows: list[int] | None = None
        self._add_validation_to_training()
        with self._measure_stage_time("statistics"):
            if self.method == "split":
                statistics = self.compute_training_statistics(for_calibration=True)
                holdout_rows = self._find_unrelated_holdout(statistics)
                if holdout_rows is None:
                    self.method = self._choose_method_without_holdout()
                    self.notes.add_warning(
                        "the threshold is set from training photographs instead, each scored without the photographs of its part",
                        self.log,
                    )
            if self.method == "cross":
                self.learn_projection()
                folds = self._compute_fold_statistics()
                statistics = _join_statistics([fold.statistics for fold in folds])
            elif self.method == "leave_one_out":
                statistics = self.compute_training_statistics(for_calibration=True)
            statistics.limit_bank_size(self.config.density.max_images)
            statistics.residual_scatter = None if self.projection is None else self.projection.scatters
        if statistics.relations is not None:
            self._record_related_images(statistics.relations)
        with self._measure_stage_time("calibration"):
            statistics_with_bank = statistics
            if not DENSITIES[self.config.density.kind].keeps_bank:
                statistics = dataclasses.replace(statistics, bank=None, thetas=None, shown=None, relations=None)
            detector = build_detector(self.config, self.net, self.reduction, statistics)
            if self.method == "cross":
                builder = self._calibrate_by_cross_validation(folds)
            elif self.method == "leave_one_out":
                builder = collect_leave_one_out_scores(
                    detector, statistics_with_bank, self.config, self.projection, self.log
                )
            else:
                batches = self._track_progress("calibration", self.shard.read_batches("holdout", holdout_rows))
                groups = self.shard.share.holdout.groups[holdout_rows]
                builder = collect_calibration_scores(detector, batches, self.config.calibration, "split", groups)
        return FitResult(detector, statistics, builder.build_calibration(), self.notes, self.seconds)

    def _compute_fold_statistics(self) -> list[_CrossValidationFold]:
        """Divides the training images into folds for cross calibration, and computes the statistics of each fold.

        Images of a named group are in one fold. With at most `_MAX_COMPARED_IMAGES` images, photographs of one physical part are
        also recognised by their content and put into one fold. If the kind of density keeps a bank, the bank of each fold is so
        small that the banks of all folds but one together have about density.max_images images.

        Raises: ValueError: the shard has no fold numbers, or an embedding has values that are not finite.
        """
        fold_of, groups = self.shard.get_fit_folds(), self.shard.share.fit.groups
        if self.num_images <= _MAX_COMPARED_IMAGES:
            groups_and_order = self._collect_groups_and_order(range(self.num_images))
            relations = _find_related_images(
                self._compute_descriptors(self.shard.read_batches("fit")), groups_and_order
            )
            if relations is not None:
                self._record_related_images(relations)
                own_images = slice(self.offset, self.offset + self.num_own)
                fold_of = assign_folds(relations.groups, NUM_CALIBRATION_FOLDS).numpy()[own_images]
                groups = relations.groups.numpy()[own_images]
        config, folds = self.config.density, []
        limit = -(-config.max_images // (NUM_CALIBRATION_FOLDS - 1))
        for number in range(NUM_CALIBRATION_FOLDS):
            rows = np.flatnonzero(fold_of == number)
            sizes = all_gather_objects(len(rows))
            first, num_images = sum(sizes[: self.rank]), sum(sizes)
            bank_images = choose_evenly_spaced(num_images, limit) if DENSITIES[config.kind].keeps_bank else None
            batches = self.shard.read_batches("fit", rows.tolist())
            statistics = compute_image_statistics(self.net, self.reduction, batches, self.device, bank_images, first)
            folds.append(_CrossValidationFold(rows, groups[rows], first, num_images, statistics))
        return folds

    def _calibrate_by_cross_validation(self, folds: Sequence[_CrossValidationFold]) -> CalibrationBuilder:
        """Scores training images of each fold with a density of the other folds, at most about `MAX_CALIBRATION_IMAGES` in all.

        The bank of such a density is not larger than the bank of the final density.
        """
        images_per_fold = -(-MAX_CALIBRATION_IMAGES // len(folds))
        builders = []
        for fold in folds:
            if not fold.num_images:
                continue
            remaining = _join_statistics([other.statistics for other in folds if other is not fold])
            remaining.limit_bank_size(self.config.density.max_images)
            detector = build_detector(self.config, self.net, self.reduction, remaining)
            chosen = choose_evenly_spaced(fold.num_images, images_per_fold)
            used = [number for number in range(len(fold.rows)) if fold.first + number in chosen]
            batches = self.shard.read_batches("fit", fold.rows[used].tolist())
            builders.append(
                collect_calibration_scores(detector, batches, self.config.calibration, "cross", fold.groups[used])
            )
        return functools.reduce(CalibrationBuilder.merge, builders)


class _CrossValidationFold(NamedTuple):
    """A fold of the training images for cross calibration.

    rows: (n,) positions in this worker's shard of the n images that belong to the fold.
    groups: (n,) group number of each of these images.
    first: position of the first of these images among all images of the fold.
    num_images: number of images of the fold, over all workers.
    statistics: statistics of all images of the fold, of all workers.
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]
    first: int
    num_images: int
    statistics: NormalStatistics


def _gather_from_workers(numbers: NDArray[np.int64]) -> Tensor:
    """Concatenates arrays (n,) of all workers, in the order of their ranks."""
    return torch.from_numpy(np.concatenate(all_gather_objects(numbers)))


def _find_related_images(descriptors: Tensor, groups_and_order: ImageGroupsAndOrder) -> ImageRelations | None:
    """Runs `find_related_images` on the worker with rank 0, and returns the result on every worker."""
    return compute_on_rank0_and_broadcast(lambda: find_related_images(descriptors, groups_and_order))


def _join_statistics(parts: Sequence[NormalStatistics]) -> NormalStatistics:
    """Joins several statistics into a new object; the arguments do not change."""
    return functools.reduce(NormalStatistics.join, parts[1:], copy.deepcopy(parts[0]))
