"""Checks of Ray clusters: the cluster of RAY_ADDRESS must answer, and no address file of a killed cluster may remain."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request

from focus_ray.cluster.address import (
    TIMEOUT_S,
    find_connection_problem,
    find_ray_sessions_root,
    read_last_cluster_address,
)
from focus_ray.doctor.diagnosis import CheckContext, CheckResult, report_failure, report_ok, report_warning
from focus_ray.doctor.software import read_installed_version

UNSET_ADVICE = "or unset RAY_ADDRESS: then each run starts a private Ray on this machine"


def check_ray_address(context: CheckContext) -> CheckResult:
    """Checks the address in RAY_ADDRESS: it must accept connections; an http address must answer as a Ray dashboard.

    Passes if RAY_ADDRESS is not set.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return report_ok("RAY_ADDRESS is not set: each run starts a private Ray on this machine")
    if address.startswith(("http://", "https://")):
        return _check_dashboard(address)
    host_and_port = read_last_cluster_address() if address == "auto" else address.removeprefix("ray://")
    reason = "no cluster runs on this machine" if host_and_port is None else find_connection_problem(host_and_port)
    if reason:
        return report_failure(
            f"RAY_ADDRESS={address} does not answer ({reason})",
            f"set it to HOST:6379, ray://HOST:10001, http://HOST:8265 or auto of a cluster that runs, {UNSET_ADVICE}",
        )
    return report_ok(f"RAY_ADDRESS={address} accepts connections")


def _check_dashboard(address: str) -> CheckResult:
    """Checks an http address: the server of the Ray dashboard and of jobs must answer and run the same Ray version."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=TIMEOUT_S) as response:
            cluster_version = json.load(response)["ray_version"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            return report_warning(
                f"RAY_ADDRESS={address} answers, but requires a token ({error.code})",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on the machine that submits jobs",
            )
        return report_failure(
            f"RAY_ADDRESS={address} does not answer as a Ray dashboard ({type(error).__name__}: {error})",
            f"set it to the address of the dashboard of a cluster that runs, http://HOST:8265, {UNSET_ADVICE}",
        )
    local_version = read_installed_version("ray")
    if local_version is not None and cluster_version != local_version:
        return report_warning(
            f"RAY_ADDRESS={address} runs Ray {cluster_version}, this machine has Ray {local_version}",
            "install the same version on both",
        )
    return report_ok(f"RAY_ADDRESS={address} runs Ray {cluster_version}")


def check_stale_cluster_file(context: CheckContext) -> CheckResult:
    """Warns of a stale `ray_current_cluster` file.

    Ray writes the address of the cluster that was started last on a machine to this file. A killed cluster cannot delete it.
    """
    file, address = find_ray_sessions_root() / "ray_current_cluster", read_last_cluster_address()
    if address is None:
        return report_ok("no other Ray cluster is recorded on this machine")
    reason = find_connection_problem(address)
    if reason:
        return report_warning(
            f"{file} names {address}, which does not answer ({reason}): a cluster was killed",
            "run `ray stop` or delete the file; otherwise RAY_ADDRESS=auto and `ray status` try this address",
        )
    return report_ok(f"a cluster runs at {address}; focus-ray joins it only with RAY_ADDRESS={address}")
