"""Tests that the state of a training can be saved and loaded."""

from __future__ import annotations

import io

import torch

from focus_ray.features.alignment.congealing import AlignmentReport
from focus_ray.fitting.state import BestNetwork, FitNotes, TrainState


def test_saving_and_loading_preserves_the_state_with_all_notes() -> None:
    report = AlignmentReport(True, 0.5, 1.0, 0.5, [1.0], [0.5], 180.0, 0.1)
    notes = FitNotes(report, [{"step": 0.0, "loss": 1.0}], [{"step": 0, "score": 0.7}], ["a warning"])
    net = {"weight": torch.ones(2)}
    state = TrainState(3, net, {"lr": 0.1}, {"last_epoch": 3}, notes, BestNetwork(1, 0.7, net))
    buffer = io.BytesIO()
    torch.save(state.to_dict(), buffer)
    buffer.seek(0)
    read = TrainState.from_dict(torch.load(buffer, weights_only=True))
    assert (read.step, read.optimizer, read.schedule, read.notes) == (3, state.optimizer, state.schedule, notes)
    assert (read.best.step, read.best.score) == (1, 0.7)
