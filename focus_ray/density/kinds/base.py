"""The interface of a kind of density. Settings are checked without torch, so kinds import torch only inside functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from focus_ray.density.kinds.shared import SharedSettings
from focus_ray.density.registry import DENSITIES

if TYPE_CHECKING:
    from torch import Tensor

    from focus_ray.density.base import Density, LeaveOneOutScorer, Statistics

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each stored tensor, by name."""
C = TypeVar("C", bound=SharedSettings)


class DensityKind(Generic[C]):
    """A kind of density: its settings, and how it is built, stored, loaded and exported.

    The key in `DENSITIES` is the value of density.kind. A kind defines `build`, `tensors` and `load`; the other methods are
    optional. A kind with tiles that share places gets the statistics of single tiles (`density.base` handles tiles).

    Attributes:
        settings: the shared settings, plus the fields that the kind adds to the section `density`. Two kinds must not add the
            same field.
        keeps_bank: whether the density needs the embeddings of normal images, not only their moments.
        supports_leave_one_out: whether `leave_one_out_scorer` is defined. A kind without it is calibrated by cross-validation.
    """

    settings: type[SharedSettings] = SharedSettings
    keeps_bank = False
    supports_leave_one_out = False

    def inert_settings(self, config: C) -> dict[str, str]:
        """Returns the keys in the section `density` that change no score under a configuration -> the reason."""
        own_fields = self.settings.model_fields
        others = [key for name in DENSITIES for key in DENSITIES[name].settings.model_fields if key not in own_fields]
        return dict.fromkeys(others if self.keeps_bank else [*others, "max_images"], f"density.kind is {config.kind}")

    def num_coreset_channels(self, config: C) -> int:
        """Returns how many channels each embedding gets at its end for a coreset alone, at most; 0 without a coreset."""
        return 0

    def for_tiles(self, config: C, num_tiles: int) -> C:
        """Returns the settings for a density whose places are shared by `num_tiles` tiles of an image."""
        return config

    def build(self, config: C, statistics: Statistics) -> Density:
        """Fits the density to the statistics. Raises: ValueError: the statistics are of fewer than two images."""
        raise NotImplementedError

    def tensors(self, config: C, statistics: Statistics, density: Any) -> dict[str, Tensor]:
        """Returns the tensors that a bundle stores and that `load` needs.

        A kind with a bank stores it under 'bank', with the channels of the moments only. If it stores a part of the bank, it also
        stores the number of the source image of each embedding, under 'bank.images'.

        Args: density: the result of `build` for the same statistics.
        """
        raise NotImplementedError

    def load(self, config: C, tensors: Mapping[str, Tensor], height: int, width: int) -> Density:
        """Rebuilds the density, on the device of the tensors, from the result of `tensors`.

        Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
        """
        raise NotImplementedError

    def check_shapes(self, config: C, shapes: Shapes) -> None:
        """Checks the shapes of stored tensors before they are read. Raises: ValueError: a shape does not fit the settings."""

    def scoring_memory_bytes(
        self, config: C, shapes: Shapes, rows: int, columns: int, num_images: int
    ) -> dict[str, int]:
        """Estimates the memory for scoring `num_images` maps of rows x columns locations.

        Returns: description of each large temporary tensor -> its bytes; empty if there is none.
        """
        return {}

    def leave_one_out_scorer(self, config: C, statistics: Statistics, density: Any) -> LeaveOneOutScorer:
        """Builds a scorer of training images, each without its own embeddings.

        Args: density: the result of `build` for the same statistics.

        Raises: ValueError: there are too few images.
        """
        raise NotImplementedError

    def leave_one_out_refits(
        self,
        config: C,
        density: Any,
        statistics: Iterable[Statistics],
        score: Callable[[LeaveOneOutScorer, Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Yields the leave-one-out distances of all images for each of several projections of the same images.

        Args:
            density: the result of `build` for the projection of all images.
            statistics: of each projection. The channels for a coreset are the same in all of them.
            score: computes the leave-one-out distances of all images by a scorer and the channels (N, L, C) of a bank that it
                needs.
        """
        for each in statistics:
            assert each.bank is not None
            yield score(self.leave_one_out_scorer(config, each, self.build(config, each)), each.bank)

    def exportable(self, density: Any, half: bool) -> Density:
        """Returns a density that `torch.export` can trace and that computes in float32.

        Args:
            density: computes in float32.
            half: round memories to float16. False: store memories in float16 only where this changes no value.
        """
        return density  # type: ignore[no-any-return]
