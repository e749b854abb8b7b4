"""Checks of the machine: CPUs, memory, disks, shared memory, GPU, ports."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from pathlib import Path

from focus_ray.cluster.address import ray_folder
from focus_ray.doctor.finding import Asked, Result, failed, ok, warning
from focus_ray.storage import is_s3, open_filesystem

GIB, MIB = 2**30, 2**20
LITTLE_MEMORY = 2 * GIB
LITTLE_DISK, NO_DISK = 5 * GIB, GIB // 10
RAY_DISK_SHARE = 0.95  # Ray writes nothing to a fuller disk (RAY_local_fs_capacity_threshold)
RAY_STORE_SHARE = 0.3  # of the memory: Ray's object store, which lies in shared memory where it has room
PORTS = {
    8000: "focus-ray serve --port takes another",
    8265: "Ray's dashboard takes the next free one; to reach a cluster's by a tunnel, give the tunnel another",
}


def runs_elsewhere() -> bool:
    """Whether a run joins a cluster that this process did not start."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def cpus(asked: Asked) -> Result:
    count, cluster = cpu_count(), asked.config.cluster
    needed = cluster.num_workers * cluster.cpus_per_worker
    text = f"{count:g}"
    if needed > count and not runs_elsewhere():
        return failed(
            f"{text}, and cluster.num_workers={cluster.num_workers} with cluster.cpus_per_worker={cluster.cpus_per_worker:g} "
            f"need {needed:g}",
            "lower one of them, or set RAY_ADDRESS to a larger cluster",
        )
    return ok(text)


def cpu_count() -> float:
    """CPUs of this machine, or of its container, counted as Ray counts them."""
    count = float(os.cpu_count() or 1)
    quota = _text("/sys/fs/cgroup/cpu.max").split()  # microseconds of each period, or "max"
    if len(quota) == 2 and quota[0].isdigit():
        return min(count, max(1.0, int(quota[0]) // int(quota[1])))
    return count


def memory(asked: Asked) -> Result:
    total, free = memory_bytes()
    workers, budget = asked.config.cluster.num_workers, asked.config.data.memory_budget_mb * MIB
    text = f"{total / GIB:.1f} GiB, of which {free / GIB:.1f} are free"
    if free < LITTLE_MEMORY:
        return warning(text, f"training needs about {LITTLE_MEMORY / GIB:.0f} GiB a worker: end other programs")
    if asked.given and workers * budget > free and not runs_elsewhere():
        return warning(
            f"{text}; {workers} worker(s) may keep {budget / GIB:.1f} GiB of decoded images each",
            "lower data.memory_budget_mb, so that images are streamed, unless the data set is small",
        )
    return ok(text)


def memory_bytes() -> tuple[int, int]:
    """(all, free) of this machine, or of its container."""
    lines = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in lines:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _text(limit).strip(), _text(used).strip()
        if most.isdigit() and now.isdigit() and int(most) < total:
            total, free = int(most), min(free, max(0, int(most) - int(now)))
    return total, free


def _text(path: str) -> str:
    """What a file of the system says; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def disk(asked: Asked) -> Result | None:
    """Free space at a local storage."""
    if is_s3(asked.config.storage):
        return None
    place = there(asked.config.storage)
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free at storage={asked.config.storage} (on the disk of {place})"
    advice = "free space there, or set storage to another place"
    if free < NO_DISK:
        return failed(text, advice)
    return warning(text, advice) if free < LITTLE_DISK else ok(text)


def there(uri: str) -> Path:
    """The folder of a local location, or the nearest above it that exists."""
    path = Path(open_filesystem(uri)[1])
    return next(folder for folder in (path, *path.parents) if folder.exists())


def ray_disk(asked: Asked) -> Result:
    place = there(str(ray_folder()))
    usage = shutil.disk_usage(place)
    full = 1 - usage.free / usage.total
    text = f"{usage.free / GIB:.1f} GiB free for Ray's files at {ray_folder()}, {full:.0%} full"
    if full > RAY_DISK_SHARE:
        return warning(
            f"{text}; Ray writes no objects to a disk that is more than {RAY_DISK_SHARE:.0%} full",
            "free space, or set RAY_TMPDIR to a folder with a short path on another disk",
        )
    return ok(text)


def shared_memory(asked: Asked) -> Result | None:
    if not Path("/dev/shm").is_dir():
        return None
    usage = shutil.disk_usage("/dev/shm")
    wanted = RAY_STORE_SHARE * memory_bytes()[1]
    text = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    if usage.free < wanted:
        return warning(
            f"{text}; Ray's object store, {wanted / GIB:.1f} GiB, goes to disk and is slow",
            f"docker run --shm-size={wanted * 1.1 / GIB:.1f}g, in Kubernetes an emptyDir of medium Memory at /dev/shm",
        )
    return ok(text)


def gpu(asked: Asked) -> Result:
    import torch

    driver = _text("/proc/driver/nvidia/version").partition("\n")[0].strip()
    has_driver = bool(driver) or shutil.which("nvidia-smi") is not None
    with warnings.catch_warnings(record=True) as told:  # torch says here that a driver is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        torch.ones(2, device="cuda").sum().item()  # fails where this build holds no code for this GPU
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return ok(f"{names}; torch for CUDA {torch.version.cuda}; driver: {driver or 'unknown'}")
    why = "torch is a build for CPUs" if torch.version.cuda is None else f"torch is for CUDA {torch.version.cuda}"
    reason = f"torch sees none; {why}" + "".join(f"; {item.message}" for item in told)
    if asked.config.cluster.use_gpu is True and not runs_elsewhere():
        return failed(
            f"{reason}, and cluster.use_gpu is true", "set cluster.use_gpu=auto, or RAY_ADDRESS to a cluster with GPUs"
        )
    if has_driver:
        return warning(
            f"{reason}, though there is an NVIDIA driver ({driver or 'nvidia-smi'})",
            "install the torch and torchvision builds for the CUDA version that nvidia-smi shows",
        )
    return ok(f"{reason}: everything runs on CPUs")


def ports(asked: Asked) -> Result:
    busy = [port for port in PORTS if not _is_free(port)]
    if busy:
        names = " and ".join(map(str, busy))
        return warning(f"{names} of 127.0.0.1 taken by another program", "; ".join(PORTS[port] for port in busy))
    return ok(f"{' and '.join(map(str, PORTS))} of 127.0.0.1 are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just given up is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
