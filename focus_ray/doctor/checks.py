"""The list of all checks, in the order in which they are printed."""

from __future__ import annotations

from focus_ray.doctor import cluster, machine, resources, software
from focus_ray.doctor.diagnosis import Check

CHECKS: dict[str, Check] = {
    "Python": software.check_python,
    "packages": software.check_packages,
    "torch and torchvision": software.check_torch_pair,
    "GPU": machine.check_gpu,
    "CPUs": machine.check_cpus,
    "memory": machine.check_memory,
    "disk": machine.check_disk,
    "Ray's disk": machine.check_ray_disk,
    "/dev/shm": machine.check_shared_memory,
    "Ray": software.check_ray,
    "Ray cluster": cluster.check_address,
    "Ray left behind": cluster.check_stale_cluster_file,
    "ports": machine.check_ports,
    "storage": resources.check_storage,
    "data set": resources.check_data,
    "weights": resources.check_weights,
    "trackers": resources.check_trackers,
}
