"""The service where it is hard: more models than memory, no replica at all, a node that dies under load.

    python -m benchmarks.serving_stress models BUNDLE IMAGES    # 50 models asked at random, room for 10
    python -m benchmarks.serving_stress zero BUNDLE IMAGES      # from no replica to an answer, and back
    python -m benchmarks.serving_stress grow BUNDLE IMAGES      # a second replica under load, and back
    python -m benchmarks.serving_stress node BUNDLE IMAGES      # two worker nodes, one killed under load

Each ends with an error where what it is to show does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import print_json
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry
from focus_ray.client import AsyncClient, Client, InspectionResult
from focus_ray.data.importers.base import IMAGE_SUFFIXES
from focus_ray.serving.launch import run_service
from focus_ray.serving.models import iterate_non_backbone_tensors
from focus_ray.serving.settings import MIB, parse_service_settings


def make_settings(registry: str, **pool: Any) -> Any:
    tree = {
        "registry": registry,
        "open_to_all": True,
        "ingress_num_cpus": 0.1,
        "ingress": {"max_replicas": 4},
        "pool": {"num_cpus": 0.5, **pool},
        "limits": {"timeout_s": 120},
    }
    return parse_service_settings(tree)


def list_resident_mb(title: str) -> list[float]:
    """Resident memory of this cluster's processes whose title contains a text, MiB each."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
            mine = os.environ.get("RAY_TMPDIR", "/tmp/ray").encode() in (folder / "environ").read_bytes()
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        if title in name and (mine or "RAY_TMPDIR" not in os.environ):
            found.append(pages * os.sysconf("SC_PAGE_SIZE") / MIB)
    return found


def measure_many_models(bundle: str, images: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    """2,000 requests for 50 models at random, with room for 10."""
    inspector = Inspector.load(bundle, "cpu")
    category = inspector.bundle.category
    own = sum(
        tensor.numel() * tensor.element_size() for tensor in iterate_non_backbone_tensors(inspector.bundle.detector)
    )
    backbone = sum(t.numel() * t.element_size() for t in inspector.bundle.detector.net.backbone.parameters())
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        teams = [f"team{number:02}" for number in range(arguments.models)]
        for team in teams:
            registry.publish(bundle, team)
        settings = make_settings(folder, memory_mb=(backbone + (arguments.room + 0.5) * own) / MIB)
        memory: list[float] = []
        loads: list[float] = []
        draw = random.Random(0)

        async def send_all(url: str) -> int:
            errors = 0
            left = iter(range(arguments.requests))

            async def send_one_client(client: AsyncClient) -> None:
                nonlocal errors
                for number in left:
                    answer = await client.inspect(draw.choice(teams), category, [images[number % len(images)]])
                    errors += answer.findings[0].error is not None
                    if answer.timings_ms["load"] > 5:
                        loads.append(answer.timings_ms["load"])
                    if number % (arguments.requests // 20) == 0:
                        memory.append(round(max(list_resident_mb("scorer")), 1))
                        print(f"request {number}: {memory[-1]:.0f} MiB", flush=True)

            async with AsyncClient(url, retries=8, timeout_s=150) as client:
                await asyncio.gather(*(send_one_client(client) for _ in range(4)))
            return errors

        with run_service(settings, port=arguments.port) as url:
            started = time.perf_counter()
            errors = asyncio.run(send_all(url))
            took = time.perf_counter() - started
    loads.sort()
    half = len(memory) // 2
    growth = statistics.median(memory[half:]) - statistics.median(memory[2:half])
    found = {
        "model_mb": round(own / MIB, 1),
        "requests": arguments.requests,
        "errors": errors,
        "requests_per_s": round(arguments.requests / took, 1),
        "loads": len(loads),
        "load_ms_p50": loads[len(loads) // 2],
        "load_ms_p99": loads[int(0.99 * len(loads))],
        "memory_mb": memory,
        "growth_mb": round(growth, 1),
    }
    assert errors == 0
    if arguments.room < arguments.models:
        assert growth < max(32.0, 2 * own / MIB), f"memory grew by {growth:.0f} MiB"
    else:  # it fills meanwhile
        most = memory[0] + 1.2 * arguments.models * own / MIB
        assert max(memory) < most, f"{max(memory):.0f} MiB, more than {most:.0f} for all models"
    return found


def measure_scale_to_zero(bundle: str, images: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    """The first answer of a pool without replicas, a warm one, and how long until no replica is left again."""
    inspector = Inspector.load(bundle, "cpu")
    scaling = {"min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 5}
    scaling.update(downscale_to_zero_delay_s=5)
    with tempfile.TemporaryDirectory() as folder:
        Registry(folder).publish(bundle, "press")
        colds, warms, downs = [], [], []
        with (
            run_service(make_settings(folder, scaling=scaling), port=arguments.port) as url,
            Client(url, timeout_s=150) as client,
        ):
            for _ in range(arguments.rounds):
                started = time.perf_counter()
                while list_resident_mb("scorer"):
                    assert time.perf_counter() - started < 120, "the replica stays"
                    time.sleep(0.2)
                downs.append(time.perf_counter() - started)
                started = time.perf_counter()
                client.inspect("press", inspector.bundle.category, images[:1])
                colds.append(time.perf_counter() - started)
                started = time.perf_counter()
                client.inspect("press", inspector.bundle.category, images[:1])
                warms.append(time.perf_counter() - started)
    return {"cold_s": colds, "warm_s": warms, "until_none_s": downs}


def measure_scale_up(bundle: str, images: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    """Eight clients of a pool of one replica that may have two: seconds until the second is there, and until it has gone."""
    inspector = Inspector.load(bundle, "cpu")
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    scaling.update(downscale_delay_s=5)
    answers: list[InspectionResult] = []

    def count_replicas(wanted: int, since: float) -> float:
        while len(list_resident_mb("scorer")) != wanted:
            assert time.perf_counter() - since < 120, f"{len(list_resident_mb('scorer'))} replicas, {wanted} awaited"
            time.sleep(0.2)
        return time.perf_counter() - since

    async def send_requests(url: str) -> float:
        stop = False

        async def send_one_client(client: AsyncClient) -> None:
            while not stop:
                answers.append(await client.inspect("press", inspector.bundle.category, images[:1]))

        async with AsyncClient(url, retries=4) as client:
            asked = [asyncio.create_task(send_one_client(client)) for _ in range(8)]
            took = await asyncio.to_thread(count_replicas, 2, time.perf_counter())
            await asyncio.sleep(10)
            stop = True
            await asyncio.gather(*asked)
        return took

    with tempfile.TemporaryDirectory() as folder:
        Registry(folder).publish(bundle, "press")
        with run_service(make_settings(folder, scaling=scaling), port=arguments.port) as url:
            count_replicas(1, time.perf_counter())
            up = asyncio.run(send_requests(url))
            down = count_replicas(1, time.perf_counter())
    return {"until_two_s": round(up, 1), "until_one_s": round(down, 1), "answers": len(answers), "failed": 0}


def measure_lost_node(bundle: str, images: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    """Clients of a service on three nodes, one of which is killed."""
    import ray
    from ray.cluster_utils import Cluster

    inspector = Inspector.load(bundle, "cpu")
    category, expected = inspector.bundle.category, inspector.inspect(images[:1])[0]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    doomed = cluster.add_node(num_cpus=2)
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    answers: list[InspectionResult] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            Registry(folder).publish(bundle, "press")
            scaling = {"min_replicas": 3, "max_replicas": 3}
            settings = make_settings(folder, scaling=scaling)

            async def send_requests(url: str) -> float:
                stop = False
                longest = 0.0

                async def one(client: AsyncClient) -> None:
                    nonlocal longest
                    while not stop:
                        started = time.perf_counter()
                        answers.append(await client.inspect("press", category, images[:1]))
                        longest = max(longest, time.perf_counter() - started)

                async with AsyncClient(url, retries=12, timeout_s=150) as client:
                    asked = [asyncio.create_task(one(client)) for _ in range(6)]
                    while len(answers) < 50:
                        await asyncio.sleep(0.1)
                    before = len(answers)
                    await asyncio.to_thread(cluster.remove_node, doomed, allow_graceful=False)
                    await asyncio.sleep(25)
                    print(f"{before} answers before the node died, {len(answers) - before} after")
                    assert len(answers) > before
                    stop = True
                    await asyncio.gather(*asked)
                return longest

            with run_service(settings, port=arguments.port) as url:
                longest = asyncio.run(send_requests(url))
    finally:
        ray.shutdown()
        cluster.shutdown()
    # squares: near a training image what is left of a squared distance is rounding
    slack = 1e-4 * expected.threshold**2
    wrong = sum(abs(one.findings[0].score ** 2 - expected.score**2) > slack for one in answers)
    assert wrong == 0
    return {"answers": len(answers), "wrong": wrong, "failed": 0, "longest_s": round(longest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "zero", "grow", "node"))
    parser.add_argument("bundle")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--room", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18540)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in Path(arguments.images).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = [path.read_bytes() for path in paths[:64]]
    found = {
        "models": measure_many_models,
        "zero": measure_scale_to_zero,
        "grow": measure_scale_up,
        "node": measure_lost_node,
    }[arguments.what](arguments.bundle, images, arguments)
    print(found)
    print_json(f"serving_stress {arguments.what}", arguments, found)


if __name__ == "__main__":
    main()
