"""Checks of the machine: CPUs, memory, disks, shared memory, GPU, ports."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from pathlib import Path

from focus_ray.cluster.address import find_ray_sessions_root
from focus_ray.doctor.diagnosis import CheckContext, CheckResult, report_failure, report_ok, report_warning
from focus_ray.storage.files import is_s3_uri, open_filesystem

GIB, MIB = 2**30, 2**20
LOW_MEMORY_BYTES = 2 * GIB
LOW_DISK_BYTES, FULL_DISK_BYTES = 5 * GIB, GIB // 10
RAY_DISK_SHARE = 0.95  # Ray writes nothing to a fuller disk (RAY_local_fs_capacity_threshold)
RAY_STORE_SHARE = 0.3  # share of the memory that Ray takes for its object store, in shared memory if it fits there
PORTS = {
    8000: "`focus-ray serve --port` can use another port",
    8265: "the Ray dashboard takes the next free port; a tunnel to the dashboard of a cluster needs another local port",
}


def is_run_on_other_cluster() -> bool:
    """Returns True if runs join a cluster that this process did not start (RAY_ADDRESS is set)."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def check_cpus(context: CheckContext) -> CheckResult:
    """Checks that this machine has enough CPUs for all workers, unless another cluster runs them."""
    count, cluster = count_cpus(), context.config.cluster
    num_required = cluster.num_workers * cluster.cpus_per_worker
    if num_required > count and not is_run_on_other_cluster():
        return report_failure(
            f"{count:g}, but cluster.num_workers={cluster.num_workers} with cluster.cpus_per_worker={cluster.cpus_per_worker:g} "
            f"need {num_required:g}",
            "lower one of these settings, or set RAY_ADDRESS to a larger cluster",
        )
    return report_ok(f"{count:g}")


def count_cpus() -> float:
    """Returns the number of CPUs of this machine or of its container, counted as Ray counts them."""
    count = float(os.cpu_count() or 1)
    quota = _read_system_file("/sys/fs/cgroup/cpu.max").split()  # microseconds of each period, or "max"
    if len(quota) == 2 and quota[0].isdigit():
        return min(count, max(1.0, int(quota[0]) // int(quota[1])))
    return count


def check_free_memory(context: CheckContext) -> CheckResult:
    """Warns if the free memory is below LOW_MEMORY_BYTES or below the workers' total budget for decoded images.

    Checks the budget only if the user named a configuration and its workers run on this machine.
    """
    total, free = read_memory_bytes()
    workers, budget = context.config.cluster.num_workers, context.config.data.memory_budget_mb * MIB
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if free < LOW_MEMORY_BYTES:
        return report_warning(
            text, f"training needs about {LOW_MEMORY_BYTES / GIB:.0f} GiB per worker: stop other programs"
        )
    if context.has_config and workers * budget > free and not is_run_on_other_cluster():
        return report_warning(
            f"{text}; {workers} worker(s) may each keep {budget / GIB:.1f} GiB of decoded images",
            "lower data.memory_budget_mb so that images are streamed, unless the data set is small",
        )
    return report_ok(text)


def read_memory_bytes() -> tuple[int, int]:
    """Returns (total bytes, free bytes) of the memory of this machine or of its container.

    Outside Linux, free memory is unknown: then all memory counts as free.
    """
    lines = dict(line.split(":", 1) for line in _read_system_file("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in lines:  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    # A container may have a lower limit: control groups of version 2, then of version 1.
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_system_file(limit_file).strip(), _read_system_file(usage_file).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < total:
            total, free = int(limit), min(free, max(0, int(limit) - int(usage)))
    return total, free


def _read_system_file(path: str) -> str:
    """Returns the text of a file of the operating system; empty if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def check_storage_disk_space(context: CheckContext) -> CheckResult | None:
    """Checks the free disk space at a local storage. Does not apply to S3."""
    if is_s3_uri(context.config.storage):
        return None
    folder = find_nearest_existing_folder(context.config.storage)
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free at storage={context.config.storage} (on the disk of {folder})"
    advice = "free some space on this disk, or set storage to a folder on another disk"
    if free < FULL_DISK_BYTES:
        return report_failure(text, advice)
    return report_warning(text, advice) if free < LOW_DISK_BYTES else report_ok(text)


def find_nearest_existing_folder(uri: str) -> Path:
    """Returns the local path if it exists, otherwise the nearest parent folder that exists."""
    path = Path(open_filesystem(uri)[1])
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_ray_disk_space(context: CheckContext) -> CheckResult:
    """Warns if the disk of Ray's session folder is so full that Ray writes no objects to it."""
    folder = find_nearest_existing_folder(str(find_ray_sessions_root()))
    usage = shutil.disk_usage(folder)
    full = 1 - usage.free / usage.total
    text = f"{usage.free / GIB:.1f} GiB free for Ray's files at {find_ray_sessions_root()}, the disk is {full:.0%} full"
    if full > RAY_DISK_SHARE:
        return report_warning(
            f"{text}; Ray writes no objects to a disk that is more than {RAY_DISK_SHARE:.0%} full",
            "free some space, or set RAY_TMPDIR to a folder with a short path on another disk",
        )
    return report_ok(text)


def check_shared_memory(context: CheckContext) -> CheckResult | None:
    """Warns if /dev/shm is too small for Ray's object store. Does not apply where /dev/shm does not exist."""
    if not Path("/dev/shm").is_dir():
        return None
    usage = shutil.disk_usage("/dev/shm")
    store_bytes = RAY_STORE_SHARE * read_memory_bytes()[1]
    text = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    if usage.free < store_bytes:
        return report_warning(
            f"{text}; Ray's object store needs {store_bytes / GIB:.1f} GiB, so Ray puts it on a disk, which is slow",
            f"docker run --shm-size={store_bytes * 1.1 / GIB:.1f}g, in Kubernetes an emptyDir of medium Memory at /dev/shm",
        )
    return report_ok(text)


def check_gpu(context: CheckContext) -> CheckResult:
    """Checks that torch can compute on the GPUs; fails without a GPU only if cluster.use_gpu is true."""
    import torch

    driver = _read_system_file("/proc/driver/nvidia/version").partition("\n")[0].strip()
    has_driver = bool(driver) or shutil.which("nvidia-smi") is not None
    with warnings.catch_warnings(record=True) as torch_warnings:  # torch warns here if the driver is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        torch.ones(2, device="cuda").sum().item()  # raises if this build of torch has no code for this GPU
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return report_ok(f"{names}; torch for CUDA {torch.version.cuda}; driver: {driver or 'unknown'}")
    build = "CPUs" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    problems = [f"torch finds no GPU; this torch is built for {build}", *(str(item.message) for item in torch_warnings)]
    reason = "; ".join(problems)
    if context.config.cluster.use_gpu is True and not is_run_on_other_cluster():
        return report_failure(
            f"{reason}, but cluster.use_gpu is true", "set cluster.use_gpu=auto, or RAY_ADDRESS to a cluster with GPUs"
        )
    if has_driver:
        return report_warning(
            f"{reason}, but this machine has an NVIDIA driver ({driver or 'nvidia-smi'})",
            "install the builds of torch and torchvision for the CUDA version that nvidia-smi shows",
        )
    return report_ok(f"{reason}: everything runs on CPUs")


def check_ports(context: CheckContext) -> CheckResult:
    """Warns if another program uses one of the ports in PORTS of 127.0.0.1."""
    busy = {port: advice for port, advice in PORTS.items() if not _is_port_free(port)}
    if busy:
        return report_warning(
            f"another program uses {' and '.join(map(str, busy))} of 127.0.0.1", "; ".join(busy.values())
        )
    return report_ok(f"{' and '.join(map(str, PORTS))} of 127.0.0.1 are free")


def _is_port_free(port: int) -> bool:
    """Returns True if a port of 127.0.0.1 can be bound: no other program uses it."""
    try:
        socket.create_server(("127.0.0.1", port)).close()  # also binds a port that was released a moment ago
    except OSError:
        return False
    return True
