"""What one worker decides, all workers do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from places import free_port

from focus_ray.fitting.distributed import decided_by_first
from focus_ray.fitting.passes import aligner_pass
from focus_ray.model.alignment.congealing import AlignmentReport, CongealingAligner


def test_alone_a_decision_is_ones_own() -> None:
    assert decided_by_first(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        decided_by_first(_raise)


def _raise() -> int:
    raise ValueError("mine")


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_aligner = CongealingAligner("rotation", 0.1, 1.1, 0.0)


def _as_worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {"number": decided_by_first(lambda: rank)}
    try:
        decided_by_first(_raise)
    except ValueError as error:
        found["told"] = str(error)
    net = _Net()
    own = net.image_aligner

    def fit(prepared: torch.Tensor, seed: int) -> AlignmentReport:  # a machine on which the other decision comes out
        own.enabled.fill_(rank == 0)
        own.template.fill_(rank + 1.0)
        return AlignmentReport(rank == 0, 0.5, 1.0, 0.5, [], [], 180.0, 0.1)

    own.fit = fit
    images = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    report = aligner_pass(net, [images], torch.device("cpu"), 0)
    found.update(enabled=report.enabled, aligner=bool(own.enabled), template=float(own.template[0, 0]))
    Path(folder, str(rank)).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_the_first_worker_decides_and_fits_for_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_as_worker, (free_port(), str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert found[0] == found[1] == {"number": 0, "told": "mine", "enabled": True, "aligner": True, "template": 1.0}
