"""The service under load: its throughput and latency beside the inspector's alone, in one run on one machine.

python -m benchmarks.serving BUNDLE IMAGES_FOLDER --clients 32
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.harness import print_json, print_table
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.importers.base import IMAGE_SUFFIXES
from focus_ray.serving.launch import run_service
from focus_ray.serving.settings import parse_service_settings


async def send_requests(
    url: str, images: Sequence[bytes], clients: int, seconds: float, token: str | None = None
) -> dict[str, Any]:
    """Clients that each send one image after another for some time.

    Returns: images_per_s, p50_ms, p99_ms, statuses.
    """
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    headers = {"content-type": "application/octet-stream", **({"authorization": f"Bearer {token}"} if token else {})}
    until = time.perf_counter() + seconds

    async def send_one_client(session: aiohttp.ClientSession, number: int) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            async with session.post(url, data=images[number % len(images)], headers=headers) as response:
                await response.read()
                statuses[response.status] = statuses.get(response.status, 0) + 1
            latencies.append(time.perf_counter() - started)
            number += clients

    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(send_one_client(session, number) for number in range(clients)))
    took = time.perf_counter() - started
    latencies.sort()
    return {
        "images_per_s": len(latencies) / took,
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        "statuses": statuses,
    }


def measure_inspector_alone(
    inspector: Inspector, images: Sequence[bytes], seconds: float, batch: int
) -> dict[str, Any]:
    """The inspector alone, on batches of so many images."""
    latencies = []
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        began = time.perf_counter()
        inspector.inspect([images[(count + place) % len(images)] for place in range(batch)])
        latencies.append(time.perf_counter() - began)
        count += batch
    took = time.perf_counter() - started
    latencies.sort()
    return {
        "images_per_s": count / took,
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
    }


def read_batch_size_metric() -> tuple[float, float]:
    """Sum and count of the batch-size metric, as Ray's exporter of this node gives them: it is behind by up to 10 s."""
    import ray

    time.sleep(12)
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    found = dict(re.findall(r"^ray_focus_ray_batch_images_(sum|count)\{[^}]*\} (\S+)", text, re.M))
    return float(found.get("sum", 0)), float(found.get("count", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in both")
    parser.add_argument(
        "--apart", action="store_true", help="score in a replica apart from the one that takes requests in"
    )
    parser.add_argument("--port", type=int, default=18530)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    paths = sorted(path for path in Path(arguments.images).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = [path.read_bytes() for path in paths[:256]]
    torch.set_num_threads(arguments.threads)
    inspector = Inspector.load(arguments.bundle, arguments.device)
    settings = parse_service_settings(
        {
            "bundles": arguments.bundle,
            "open_to_all": True,
            "device": arguments.device,
            "ingress_num_cpus": 0,
            **({"ingress": {"max_replicas": 1}} if arguments.apart else {}),
            "pool": {"num_threads": arguments.threads, "num_cpus": 1, "num_gpus": int(arguments.device == "cuda")},
        }
    )
    samples: dict[str, list[dict[str, Any]]] = {"direct 32": [], "service": [], "direct 1": [], "service, 1 client": []}
    with run_service(settings, port=arguments.port) as url:
        url = f"{url}/v1/local/{inspector.bundle.category}/inspect"
        asyncio.run(send_requests(url, images, arguments.clients, 3))  # loads the model and warms both
        measure_inspector_alone(inspector, images, 3, 32)
        for _ in range(arguments.rounds):
            samples["direct 32"].append(measure_inspector_alone(inspector, images, arguments.seconds, 32))
            samples["service"].append(asyncio.run(send_requests(url, images, arguments.clients, arguments.seconds)))
            samples["direct 1"].append(measure_inspector_alone(inspector, images, arguments.seconds / 2, 1))
            samples["service, 1 client"].append(asyncio.run(send_requests(url, images, 1, arguments.seconds / 2)))
        before = read_batch_size_metric()
        asyncio.run(send_requests(url, images, arguments.clients, arguments.seconds))
        total, count = (after - former for after, former in zip(read_batch_size_metric(), before, strict=True))
    rows = [
        [name, *(statistics.median(one[key] for one in found) for key in ("images_per_s", "p50_ms", "p99_ms"))]
        for name, found in samples.items()
    ]
    print_table(("", "images/s", "p50 ms", "p99 ms"), rows)
    ratios = [
        s["images_per_s"] / d["images_per_s"] for s, d in zip(samples["service"], samples["direct 32"], strict=True)
    ]
    added = [s["p50_ms"] - d["p50_ms"] for s, d in zip(samples["service, 1 client"], samples["direct 1"], strict=True)]
    print(f"service / direct: {statistics.median(ratios):.3f} of {[round(r, 3) for r in ratios]}")
    print(f"added p50 at one client: {statistics.median(added):.1f} ms of {[round(a, 1) for a in added]}")
    if count:
        print(f"images a batch under {arguments.clients} clients: {total / count:.1f} over {count:.0f} batches")
    print_json("serving", arguments, {**samples, "batch_images_mean": total / count if count else None})


if __name__ == "__main__":
    main()
