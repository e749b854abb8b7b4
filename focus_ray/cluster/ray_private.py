"""What is read of Ray's private parts, each behind one function."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

KINDS = ("CPU", "GPU", "memory")


def autoscaler_limits() -> dict[str, float]:
    """What the autoscaler has told Ray that it can bring; empty where there is none."""
    from ray._private.state import state  # no public call tells (Ray 2.60)

    told = state.get_max_resources_from_cluster_config()
    return {kind: float(amount) for kind, amount in (told or {}).items() if kind in KINDS}


def remove_working_folders(experiment: str) -> None:
    """On the node that runs it."""
    import ray

    node = ray._private.worker._global_node
    for folder in (Path(node.get_session_dir_path()) / "artifacts").glob(f"*/{experiment}*"):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another experiment's may be there
            folder.parent.rmdir()
