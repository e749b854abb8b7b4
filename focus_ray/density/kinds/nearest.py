"""Module for the density kind `nearest`: the distance to the nearest normal embeddings. `density.nearest` has the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from focus_ray.density.kinds.base import DensityKind, Shapes
from focus_ray.density.kinds.shared import SharedDensitySettings

if TYPE_CHECKING:
    from torch import Tensor

    from focus_ray.density.base import Density, LeaveOneOutScorer, NormalStatistics

_FLOAT_BYTES = 4


class NearestSettings(SharedDensitySettings):
    """The shared settings of densities, plus the settings that only the kind `nearest` has.

    coreset_channels: largest number of channels that the coreset compares, a random projection of layers 2 and 3.
    gaussian_share: with a coreset, the distance of a patch is at most this share of its distance to a Gaussian of its place, both
        as multiples of the distances of good images. So places where good parts vary, for instance a printed number, count less
        [ours]. 0 switches it off, for tiles that share places. It is also off with fewer than 16 images, and with maps of more
        than about 3300 places.
    """

    # 128 channels find as many defects as all, and 0.9 was the best share on ten categories (benchmarks/RESULTS.md).
    STORED = frozenset({"coreset_channels", "gaussian_share"})

    per_place: int | None = Field(
        default=128,
        ge=2,
        description="nearest: largest number of embeddings that a place keeps (times the number of tiles if tiles "
        "share places). A greedy selection keeps, for every dropped embedding, a similar one [ours]. null "
        "keeps all.",
    )
    coreset: int = Field(
        default=1024,
        ge=0,
        le=65536,
        description="nearest: size of the coreset, a second memory without places: patches that are chosen greedily "
        "from all images. Its distance and the distance of the place memory are averaged [kin, "
        "PatchCore]. 0 switches it off.",
    )
    coreset_channels: int = 128
    gaussian_share: float = 0.9


class NearestKind(DensityKind[NearestSettings]):
    """See `DensityKind` for the methods.

    The density is a `LocationMemory`, one memory per location. With a coreset, a `LocationAndCoresetMemory` averages its distance
    with the distance of the coreset. If Gaussians can be fitted too, a `GaussianCappedMemory` limits this average.
    """

    settings = NearestSettings
    keeps_bank = True
    supports_leave_one_out = True

    def find_unused_settings(self, config: NearestSettings) -> dict[str, str]:
        """See `DensityKind.find_unused_settings`: returns key -> reason. Adds shrinkage if a projection is learnt."""
        reasons = super().find_unused_settings(config)
        if config.reduction == "discriminant":
            why = "density.reduction is discriminant: it learns the metric, and nothing is whitened"
            reasons["shrinkage"] = why
        return reasons

    def count_coreset_channels(self, config: NearestSettings) -> int:
        """See `DensityKind.count_coreset_channels`: returns coreset_channels; 0 if density.coreset is 0."""
        return config.coreset_channels if config.coreset else 0

    def adapt_settings_to_tiles(self, config: NearestSettings, num_tiles: int) -> NearestSettings:
        """See `DensityKind.adapt_settings_to_tiles`: returns a copy with `num_tiles` times per_place, and without Gaussians."""
        # A location of the shared tile has the embeddings of num_tiles locations. Tiled textures have no fixed locations, so no
        # Gaussian of a location can describe them.
        per_place = config.per_place and config.per_place * num_tiles
        return config.model_copy(update={"per_place": per_place, "gaussian_share": 0.0})

    def build(self, config: NearestSettings, statistics: NormalStatistics) -> Density:
        """See `DensityKind.build`: returns one of the three classes that the docstring of this class names.

        Raises: ValueError: the bank has no image, or the moments are of fewer than two images.
        """
        from focus_ray.density.coreset import choose_coreset
        from focus_ray.density.gaussian_capped_memory import can_fit_gaussians, cap_memory_by_gaussians
        from focus_ray.density.nearest import LocationAndCoresetMemory, build_location_memory, measure_typical_distances

        assert statistics.bank is not None
        memory = build_location_memory(config, statistics)
        if not config.coreset:
            return memory
        coreset_bank = statistics.bank[:, :, statistics.moments.channels :]
        coreset = choose_coreset(coreset_bank, config.coreset, memory.device, memory.bank.dtype)
        joint = LocationAndCoresetMemory(memory, coreset, measure_typical_distances(memory, coreset, statistics))
        share = config.gaussian_share
        return cap_memory_by_gaussians(joint, statistics, share) if can_fit_gaussians(statistics, share) else joint

    def build_leave_one_out_scorer(
        self, config: NearestSettings, statistics: NormalStatistics, density: Density
    ) -> LeaveOneOutScorer:
        """See `DensityKind.build_leave_one_out_scorer`: returns the density itself, or a copy with leave-one-out Gaussians."""
        from focus_ray.density.gaussian_capped_memory import GaussianCappedMemory, build_leave_one_out_gaussian

        if isinstance(density, GaussianCappedMemory):
            return GaussianCappedMemory(density.memory, build_leave_one_out_gaussian(statistics), density.scale)
        return density  # type: ignore[return-value]  # a memory can leave out images itself

    def compute_leave_one_out_distances_per_projection(
        self,
        config: NearestSettings,
        density: Density,
        statistics: Iterable[NormalStatistics],
        score: Callable[[LeaveOneOutScorer, Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Generator: see `DensityKind.compute_leave_one_out_distances_per_projection`.

        Only the memory of locations and the Gaussians are built again, because the coreset does not depend on the projection.
        """
        import torch

        from focus_ray.density import gaussian_capped_memory as capped
        from focus_ray.density import nearest

        joint = density.memory if isinstance(density, capped.GaussianCappedMemory) else density
        coreset_distances: Tensor | None = None
        for each in statistics:
            assert each.bank is not None
            bank, coreset_bank = each.bank.tensor_split([each.moments.channels], dim=2)
            memory = nearest.build_location_memory(config, each)
            distances = score(memory, bank)
            if isinstance(joint, nearest.LocationAndCoresetMemory):
                if coreset_distances is None:
                    coreset_distances = score(nearest.CoresetScorer(joint), coreset_bank)
                typical = nearest.measure_typical_distances(memory, joint.coreset, each)
                distances = (distances / typical[0] + coreset_distances / typical[1]) / 2
            if isinstance(density, capped.GaussianCappedMemory):
                gaussian = capped.build_leave_one_out_gaussian(each)
                scale = capped.measure_gaussian_scale(each, gaussian, config.gaussian_share)
                distances = torch.minimum(distances, score(gaussian, bank) * scale)
            yield distances

    def collect_tensors(
        self, config: NearestSettings, statistics: NormalStatistics, density: Density
    ) -> dict[str, Tensor]:
        """See `DensityKind.collect_tensors`: returns bank, whitening, and the tensors of a coreset and of Gaussians."""
        import torch

        from focus_ray.density.gaussian_capped_memory import GaussianCappedMemory, collect_gaussian_tensors
        from focus_ray.density.nearest import LocationAndCoresetMemory, LocationMemory

        assert statistics.bank is not None
        bank = statistics.bank[:, :, : statistics.moments.channels]
        tensors: dict[str, Tensor] = {}
        memory = density
        if isinstance(memory, GaussianCappedMemory):
            tensors.update(collect_gaussian_tensors(memory))
            memory = memory.memory
        if isinstance(memory, LocationAndCoresetMemory):
            tensors["coreset.patches"] = memory.coreset.stored_patches
            tensors["coreset.images"] = memory.coreset.image_numbers.int()
            tensors["typical"] = memory.typical_distance
            memory = memory.location_memory
        assert isinstance(memory, LocationMemory)
        if memory.image_numbers is not None:
            tensors["bank.images"] = memory.image_numbers.t().cpu()
            bank = bank[tensors["bank.images"], torch.arange(bank.shape[1])]
        return {**tensors, "bank": bank, "whitening": memory.whitening}

    def restore(self, config: NearestSettings, tensors: Mapping[str, Tensor], height: int, width: int) -> Density:
        """See `DensityKind.restore`: returns a density of the class that `build` returned.

        Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
        """
        from focus_ray.density.coreset import Coreset
        from focus_ray.density.gaussian_capped_memory import restore_gaussian_capped_memory
        from focus_ray.density.nearest import LocationAndCoresetMemory, LocationMemory, whiten_bank
        from focus_ray.precision import choose_compute_dtype

        whitening = tensors["whitening"]
        dtype = choose_compute_dtype(config.precision, whitening.device)
        images = tensors["bank.images"].t() if "bank.images" in tensors else None
        bank = whiten_bank(tensors["bank"], whitening)
        memory = LocationMemory(bank, whitening, height, width, config.window, dtype, images)
        if not config.coreset:
            return memory
        coreset = Coreset(tensors["coreset.patches"].float(), tensors["coreset.images"].long(), dtype)
        joint = LocationAndCoresetMemory(memory, coreset, tensors["typical"])
        return restore_gaussian_capped_memory(joint, tensors) if "gaussian.mean" in tensors else joint

    def check_tensor_shapes(self, config: NearestSettings, shapes: Shapes) -> None:
        """See `DensityKind.check_tensor_shapes`: checks typical distances, scale of the Gaussians, and size of the coreset.

        Raises: ValueError: a shape is wrong, or the coreset has more patches than density.coreset.
        """
        for name, expected in {"typical": (2,), "gaussian.scale": ()}.items():
            if name in shapes and shapes[name] != expected:
                raise ValueError(f"tensor {name} has the shape {shapes[name]}, expected {expected}")
        if "coreset.patches" in shapes and shapes["coreset.patches"][:1] > (config.coreset,):
            raise ValueError(f"the coreset has more patches than density.coreset={config.coreset}")

    def estimate_scoring_memory_bytes(
        self, config: NearestSettings, shapes: Shapes, rows: int, columns: int, num_images: int
    ) -> dict[str, int]:
        """See `DensityKind.estimate_scoring_memory_bytes`: returns the sizes of the distances to the coreset and to the bank."""
        patches, bank = shapes.get("coreset.patches", (0,)), shapes.get("bank", (0, 0, 0))
        row_bytes = columns * config.window**2 * (bank[0] + bank[-1]) * _FLOAT_BYTES
        return {
            "the distances to the coreset": rows * columns * patches[0] * _FLOAT_BYTES,
            "the distances to the bank for a row of locations": row_bytes * num_images,
        }

    def make_exportable(self, density: Density, half: bool) -> Any:
        """See `DensityKind.make_exportable`: returns a density whose memories `torch.export` can trace."""
        return density.make_exportable(half)  # type: ignore[attr-defined]


NEAREST = NearestKind()
