"""The list of all checks, in the order in which they are printed."""

from __future__ import annotations

from focus_ray.doctor import cluster, machine, resources, software
from focus_ray.doctor.diagnosis import Check

CHECKS: dict[str, Check] = {
    "Python": software.check_python_version,
    "packages": software.check_package_versions,
    "torch and torchvision": software.check_torch_and_torchvision,
    "GPU": machine.check_gpu,
    "CPUs": machine.check_cpus,
    "memory": machine.check_free_memory,
    "disk": machine.check_storage_disk_space,
    "Ray's disk": machine.check_ray_disk_space,
    "/dev/shm": machine.check_shared_memory,
    "Ray": software.check_ray_package,
    "Ray cluster": cluster.check_ray_address,
    "Ray left behind": cluster.check_stale_cluster_file,
    "ports": machine.check_ports,
    "storage": resources.check_storage_access,
    "data set": resources.check_data_set,
    "weights": resources.check_backbone_weights,
    "trackers": resources.check_trackers,
}
