"""Module for the interface of a kind of density.

Settings are checked without torch, so a kind imports torch only inside functions. The bank of statistics contains the stored
embeddings of normal images. Leave-one-out scores a training image as if the density had not seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from focus_ray.density.kinds.shared import SharedDensitySettings
from focus_ray.density.registry import DENSITIES
from focus_ray.settings.sections import select_user_fields

if TYPE_CHECKING:
    from torch import Tensor

    from focus_ray.density.base import Density, LeaveOneOutScorer, NormalStatistics

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each stored tensor, by name."""
C = TypeVar("C", bound=SharedDensitySettings)


class DensityKind(Generic[C]):
    """A kind of density: its settings, and how it is built, stored, loaded and exported.

    The name of a kind in `DENSITIES` is the value of density.kind. A kind defines `build`, `collect_tensors` and `restore`; the
    other methods are optional. If the tiles of an image share one density, each tile is an image in the statistics of the kind.

    Attributes:
        settings: model of the shared settings, plus the fields that the kind adds to the section `density`. Two kinds must not
            add the same field.
        keeps_bank: whether the density needs the stored embeddings of normal images (the bank), not only their moments.
        supports_leave_one_out: whether `build_leave_one_out_scorer` is defined. A kind without it is calibrated by
            cross-validation.
    """

    settings: type[SharedDensitySettings] = SharedDensitySettings
    keeps_bank = False
    supports_leave_one_out = False

    def find_unused_settings(self, config: C) -> dict[str, str]:
        """Returns key -> reason, for the settings of the section `density` that have no effect on scores.

        The default names the settings of other kinds and, for a kind without a bank, max_images.
        """
        own_fields = select_user_fields(self.settings)
        foreign_keys = [
            key for name in DENSITIES for key in select_user_fields(DENSITIES[name].settings) if key not in own_fields
        ]
        return dict.fromkeys(
            foreign_keys if self.keeps_bank else [*foreign_keys, "max_images"], f"density.kind is {config.kind}"
        )

    def count_coreset_channels(self, config: C) -> int:
        """Returns the largest number of channels that are added to each embedding for a coreset; 0 without a coreset.

        A coreset is a representative set of patches of all normal images.
        """
        return 0

    def adapt_settings_to_tiles(self, config: C, num_tiles: int) -> C:
        """Returns the settings for one density that all `num_tiles` tiles of an image share.

        The default returns `config` unchanged.
        """
        return config

    def build(self, config: C, statistics: NormalStatistics) -> Density:
        """Fits the density to statistics of normal images. Every kind implements this method.

        Raises: ValueError: the statistics are of too few images.
        """
        raise NotImplementedError

    def collect_tensors(self, config: C, statistics: NormalStatistics, density: Any) -> dict[str, Tensor]:
        """Returns name -> tensor, for the tensors that a bundle stores and from which `restore` rebuilds the density.

        Every kind implements this method.
        A kind with a bank stores it under 'bank', without the channels for a coreset. If only some embeddings of each location
        are stored, 'bank.images' (M, L) contains the position in the bank of the image of each embedding.

        Args: density: the result of `build` for the same statistics.
        """
        raise NotImplementedError

    def restore(self, config: C, tensors: Mapping[str, Tensor], height: int, width: int) -> Density:
        """Rebuilds the density, on the device of the tensors, from the result of `collect_tensors`. Every kind implements it.
        Raises: KeyError: a tensor is missing. ValueError: the shapes do not fit together.
        """
        raise NotImplementedError

    def check_tensor_shapes(self, config: C, shapes: Shapes) -> None:
        """Checks the shapes of stored tensors before their values are read.

        Raises: ValueError: a shape does not fit the settings. The default checks nothing.
        """

    def estimate_scoring_memory_bytes(
        self, config: C, shapes: Shapes, rows: int, columns: int, num_images: int
    ) -> dict[str, int]:
        """Estimates the RAM or GPU memory that scoring `num_images` maps of rows x columns locations needs.

        Returns: description of a large temporary tensor -> its size in bytes; empty if there is no large tensor.
        """
        return {}

    def build_leave_one_out_scorer(self, config: C, statistics: NormalStatistics, density: Any) -> LeaveOneOutScorer:
        """Builds a scorer that scores each training image as if the density had not seen it.

        Args: density: the result of `build` for the same statistics.

        Raises: NotImplementedError: `supports_leave_one_out` is False. ValueError: there are too few images.
        """
        raise NotImplementedError

    def compute_leave_one_out_distances_per_projection(
        self,
        config: C,
        density: Any,
        statistics: Iterable[NormalStatistics],
        score: Callable[[LeaveOneOutScorer, Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Generator: for each of several projections, builds the density again and yields leave-one-out distances of all images.

        A projection maps all channels of an embedding to fewer channels.

        Args:
            density: the result of `build` for the projection that was learnt from all images.
            statistics: one object for each projection, with a bank. The channels for a coreset are the same in all objects.
            score: called as score(scorer, channels), with the channels (N, L, C) of the bank that the scorer compares; returns
                the leave-one-out distances of all N images.

        Raises: ValueError: there are too few images.
        """
        for each in statistics:
            assert each.bank is not None
            yield score(self.build_leave_one_out_scorer(config, each, self.build(config, each)), each.bank)

    def make_exportable(self, density: Any, half: bool) -> Density:
        """Returns a density that `torch.export` can trace and that computes in float32.

        Args:
            density: computes in float32.
            half: True: store tensors in float16 unless a value overflows. False: only where this changes no value.
        """
        return density  # type: ignore[no-any-return]
