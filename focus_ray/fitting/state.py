"""Module for the state of a fit that is saved after each interval of the training, for a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from focus_ray.errors import DataError
from focus_ray.features.alignment.congealing import AlignmentReport

Metrics = dict[str, float]
"""Metrics of an interval or of a validation, by name."""


@dataclass(frozen=True)
class BestNetwork:
    """The network with the best validation score so far.

    step: number of optimiser steps after which the network was copied; 0 for the untrained network.
    score: validation score of the network.
    net: state dict of the network, on the CPU.
    """

    step: int
    score: float
    net: dict[str, Tensor]


@dataclass
class FitNotes:
    """Intermediate results of a fit, for the bundle's manifest and for reports.

    alignment: report of the congealing aligner; None if the network has no such aligner or it was not fitted.
    history: training metrics of each interval, as dictionaries: name -> value.
    selection: for each validation, a dictionary with the validated choice (steps or alignment) and the validation metrics.
    warnings: logged warnings.
    parts: 'num_images' and 'num_parts' if several photographs show the same physical part; None if every image shows a
        different part.
    """

    alignment: AlignmentReport | None = None
    history: list[Metrics] = field(default_factory=list)
    selection: list[dict[str, float | str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parts: dict[str, int] | None = None

    def record_interval(self, figures: Metrics, num_steps: int, log: Callable[[str], None]) -> None:
        """Adds the metrics of an interval, logs them, and warns if they show that the features have collapsed.

        Args:
            figures: metrics of `FydTraining.run_intervals`.
            num_steps: steps of the whole training.
            log: receives the messages.
        """
        from focus_ray.fyd.training import format_collapse_warning

        self.history.append(figures)
        step = int(figures["step"])
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if key != "step")
        log(f"step {step}/{num_steps}: {shown}")
        if (warning := format_collapse_warning(figures)) is not None:
            self.add_warning(f"step {step}: {warning}", log)

    def add_warning(self, message: str, log: Callable[[str], None]) -> None:
        """Adds a warning, and logs it."""
        self.warnings.append(message)
        log(f"WARNING: {message}")


@dataclass(frozen=True)
class TrainState:
    """Everything that is needed to resume training after an interval.

    step: number of finished optimiser steps.
    net, optimizer, schedule: state dicts.
    notes: intermediate results up to this step.
    best: the network with the best validation score so far; None with selection.fraction=0.
    """

    step: int
    net: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    notes: FitNotes
    best: BestNetwork | None

    def to_dict(self) -> dict[str, Any]:
        """Converts the state to plain types and tensors, which `torch.load(weights_only=True)` can read; tensors are shared."""
        return {**vars(self), "notes": asdict(self.notes), "best": self.best and vars(self.best)}

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> TrainState:
        """Rebuilds a training state from the dictionary that `to_dict` returned.

        Raises: DataError: an earlier version, which counted epochs, wrote the state.
        """
        if "epoch" in tree:
            raise DataError(
                "the checkpoint counts epochs, because an earlier version wrote it: start a new run under another name"
            )
        notes = FitNotes(**tree["notes"])
        notes.alignment = tree["notes"]["alignment"] and AlignmentReport(**tree["notes"]["alignment"])
        best = tree["best"] and BestNetwork(**tree["best"])
        return TrainState(**{**tree, "notes": notes, "best": best})


IntervalCallback = Callable[[int, Metrics, Callable[[], TrainState]], None]
"""Called after an interval with the number of finished steps, the metrics, and a function that returns the state to save."""
