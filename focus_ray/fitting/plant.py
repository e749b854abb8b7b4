"""Module that trains one network for all categories of a data set ("plant"), in one process or on every worker of a group.

Densities and congealing image aligners belong to the categories and are fitted afterwards, see `fitting.fit`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from focus_ray.density.tiles import TileGrid
from focus_ray.distributed import get_world_size
from focus_ray.errors import WeightsError
from focus_ray.features.network import FocusNet, build_network
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.settings import Config
from focus_ray.fitting.shards import (
    BlockReader,
    StreamShard,
    build_shard,
    fits_in_memory,
    read_blocks,
    read_train_batches,
)
from focus_ray.fitting.shared_metric import read_safetensors_metadata
from focus_ray.fitting.split import SplitRule
from focus_ray.fitting.state import FitNotes, IntervalCallback, TrainState
from focus_ray.fyd.batch_schedule import BatchSchedule

if TYPE_CHECKING:
    from torch import Tensor

_METADATA_KEY = "focus_ray"


@dataclasses.dataclass(frozen=True)
class PlantNetwork:
    """A network that was trained for all categories of a data set.

    net: state dict of the network, on the CPU.
    notes: metrics and warnings of the training.
    categories: names of the categories whose images trained the network.
    """

    net: dict[str, Tensor]
    notes: FitNotes
    categories: tuple[str, ...]

    def build(self, config: ModelConfig) -> FocusNet:
        """Builds a network with these weights. A congealing image aligner is new, because it is fitted later.

        Raises: WeightsError: the weights belong to another architecture.
        """
        net = build_network(config.model_copy(update={"weights": "random"}))
        try:
            net.load_state_dict({**net.state_dict(), **self.net})
        except RuntimeError as error:
            raise WeightsError(
                f"the network of all categories does not fit model.backbone={config.backbone}: {error}"
            ) from error
        return net

    def pack(self) -> bytes:
        """Returns the content of a .safetensors file with the network."""
        from safetensors.torch import save

        description = {"categories": list(self.categories), "notes": dataclasses.asdict(self.notes)}
        return save(
            {name: value.contiguous() for name, value in self.net.items()}, {_METADATA_KEY: json.dumps(description)}
        )

    @staticmethod
    def unpack(content: bytes, source: str) -> PlantNetwork:
        """Reads the content of a file that `pack` made.

        Args: source: path or URI of the file, for error messages.

        Raises: WeightsError: the content is damaged or was not made by `pack`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            net = load(content)
            description = json.loads(read_safetensors_metadata(content)[_METADATA_KEY])
            notes, categories = FitNotes(**description["notes"]), tuple(description["categories"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{source}: not a network of all categories ({error}): train it again under another name"
            ) from error
        return PlantNetwork(net, notes, categories)


def train_plant_network(
    config: Config,
    splits: Sequence[SplitRule],
    rank: int,
    device: torch.device,
    *,
    num_threads: int = 1,
    state: TrainState | None = None,
    on_interval: IntervalCallback | None = None,
    block_reader: BlockReader | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> PlantNetwork:
    """Trains one network with the images of all categories, for train.steps steps. Each batch has images of one category.

    Sets the global random seed of torch to train.seed. If the images of all categories do not fit into RAM, all are streamed.

    Args:
        splits: the rule of each category that selects its images.
        rank: number of this worker, from 0.
        device: device of the network.
        num_threads: threads that decode images.
        state: saved state from which the training resumes; None starts a new training.
        on_interval: called by every worker after every interval; see `IntervalCallback`.
        block_reader: reads streamed images; None: this process reads them.
        log: called with each message.

    Returns: the network, the same on every worker.

    Raises:
        DataError: a worker has fewer than two images of a category, no loss trains a parameter, or images cannot be read.
        WeightsError: the pretrained weights cannot be loaded.
        FloatingPointError: the loss, or a weight after an interval, is not finite.
    """
    from focus_ray.fyd.training import (
        FydTraining,
        count_batches_to_read,
        cut_one_tile_per_image,
        recompute_running_statistics,
    )

    train, model, alignment = config.train, config.model, config.model.image_alignment
    torch.manual_seed(train.seed)
    if alignment.method == "congealing":
        model = model.model_copy(update={"image_alignment": alignment.model_copy(update={"group": "none"})})
    net = build_network(model).to(device).to(memory_format=torch.channels_last)
    training, notes, first_step = FydTraining(net, device, train), FitNotes(), 0
    num_workers = get_world_size()
    in_memory = fits_in_memory(config, *splits)
    log(f"{sum(split.num_fit for split in splits)} images, {'in RAM' if in_memory else 'streamed'}")
    build = build_shard if in_memory else StreamShard
    shards = [
        build(config, s.category, s.build_plan(config).drop_holdout(), rank, num_workers, num_threads) for s in splits
    ]
    schedule = BatchSchedule.plan([split.num_fit for split in splits], num_workers, train.batch_size, train.seed)
    training.build_optimizer_and_schedule(schedule)
    if state is not None:
        training.load_network_weights(state.net)
        training.restore_optimizer(state.optimizer, state.schedule)
        notes, first_step = state.notes, state.step
    steps_to_read = range(first_step, count_batches_to_read(train, schedule))
    block_reader = block_reader or functools.partial(read_blocks, config, num_threads=num_threads)
    batches = read_train_batches(shards, schedule, steps_to_read, block_reader)
    batches = cut_one_tile_per_image(batches, TileGrid(*model.tile_layout), train.seed, first_step)
    for figures in training.run_intervals(batches, first_step):
        step = int(figures["step"])
        notes.record_interval(figures, train.steps, log)
        if on_interval is not None:

            def build_train_state(step: int = step) -> TrainState:
                return TrainState(step, *training.get_state_dicts(), copy.deepcopy(notes), None)

            on_interval(step, figures, build_train_state)
    recompute_running_statistics(net, batches, device)
    weights = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    return PlantNetwork(weights, notes, tuple(split.category for split in splits))
