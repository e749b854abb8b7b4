"""What a fit carries from epoch to epoch, and over a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from focus_ray.model.alignment.congealing import AlignmentReport

Figures = dict[str, float]
"""Of an epoch or a validation, by name."""


@dataclass(frozen=True)
class Best:
    """The network that validates best so far. epoch: after which, -1 untrained.  net: its state, on the CPU."""

    epoch: int
    score: float
    net: dict[str, Tensor]


@dataclass
class Notes:
    """What a fit found on its way, for a bundle and for people.

    alignment: None without a congealing aligner.  history: an epoch's figures each.
    selection: what was validated, with its figures.  warnings: as logged.
    parts: num_images and num_parts, where several photographs show the same part; None: every image shows a part of its own.
    """

    alignment: AlignmentReport | None = None
    history: list[Figures] = field(default_factory=list)
    selection: list[dict[str, float | str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parts: dict[str, int] | None = None


@dataclass(frozen=True)
class TrainState:
    """Everything that training goes on from after an epoch.

    net, optimizer, schedule: their state dicts.
    """

    epoch: int
    net: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    notes: Notes
    best: Best | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types and tensors, as `torch.load(weights_only=True)` takes them; state dicts are not copied."""
        return {
            "epoch": self.epoch,
            "net": self.net,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "notes": asdict(self.notes),
            "best": None if self.best is None else dict(vars(self.best)),
        }

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> TrainState:
        """Undoes `to_dict`."""
        notes = dict(tree["notes"])
        found = notes.pop("alignment")
        alignment = None if found is None else AlignmentReport(**found)
        best = None if tree["best"] is None else Best(**tree["best"])
        return TrainState(
            tree["epoch"], tree["net"], tree["optimizer"], tree["schedule"], Notes(alignment, **notes), best
        )


OnEpoch = Callable[[int, Figures, Callable[[], TrainState]], None]
"""Told of an epoch's number and figures after it, with what gives the state to keep."""
