"""What training goes on from after a restart."""

from __future__ import annotations

import io

import torch

from focus_ray.fitting.state import Best, Notes, TrainState
from focus_ray.model.alignment.congealing import AlignmentReport


def test_a_state_keeps_warnings_and_all_that_was_noted() -> None:
    notes = Notes(
        AlignmentReport(True, 0.5, 1.0, 0.5, [1.0], [0.5], 180.0, 0.1),
        [{"epoch": 0.0, "loss": 1.0}],
        [{"epoch": 0, "score": 0.7}],
        ["epoch 1: the features have collapsed"],
    )
    weights = {"weight": torch.ones(2)}
    state = TrainState(3, weights, {"lr": 0.1}, {"last_epoch": 3}, notes, Best(1, 0.7, weights))
    buffer = io.BytesIO()
    torch.save(state.to_dict(), buffer)
    buffer.seek(0)
    read = TrainState.from_dict(torch.load(buffer, weights_only=True))
    assert read.notes == notes
    assert (read.epoch, read.optimizer, read.schedule) == (3, state.optimizer, state.schedule)
    assert read.best is not None
    assert (read.best.epoch, read.best.score) == (1, 0.7)
