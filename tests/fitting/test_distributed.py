"""Tests that all workers use the decisions of rank 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from places import free_port
from worker_processes import run_workers

from focus_ray.distributed import compute_on_rank0_and_broadcast
from focus_ray.features.alignment.congealing import AlignmentReport, CongealingAligner
from focus_ray.fitting.passes import fit_aligner


def _raise() -> int:
    raise ValueError("own error")


def test_without_a_group_the_decision_is_made_locally() -> None:
    assert compute_on_rank0_and_broadcast(lambda: 3) == 3
    with pytest.raises(ValueError, match="own error"):
        compute_on_rank0_and_broadcast(_raise)


def _as_worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = torch.nn.Module()
    net.image_aligner = aligner = CongealingAligner("rotation", 0.1, 1.1, 0.0)

    def fit(prepared: torch.Tensor, seed: int) -> AlignmentReport:  # the decision differs between the workers
        aligner.enabled.fill_(rank == 0)
        aligner.template.fill_(rank + 1.0)
        return AlignmentReport(rank == 0, 0.5, 1.0, 0.5, [], [], 180.0, 0.1)

    aligner.fit = fit
    with pytest.raises(ValueError, match="own error"):
        compute_on_rank0_and_broadcast(_raise)
    report = fit_aligner(net, [torch.zeros(4, 64, 64, 3, dtype=torch.uint8)], torch.device("cpu"), 0)
    number = compute_on_rank0_and_broadcast(lambda: rank)
    outcome = [number, report.enabled, bool(aligner.enabled), float(aligner.template[0, 0])]
    Path(folder, str(rank)).write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()


def test_rank_0_decides_and_fits_the_aligner_for_all_workers(tmp_path: Path) -> None:
    run_workers(_as_worker, (free_port(), str(tmp_path)), 2)
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [[0, True, True, 1.0]] * 2
