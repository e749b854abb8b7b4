"""Checks of Ray clusters: whether the one of RAY_ADDRESS answers, and whether an old one has left its address behind."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request

from focus_ray.cluster.address import TIMEOUT_S, current_cluster, place_of, ray_folder, unreachable
from focus_ray.doctor.finding import Asked, Result, failed, ok, warning
from focus_ray.doctor.software import version_of

UNSET = "or unset RAY_ADDRESS, and a private Ray starts on this machine"


def address(asked: Asked) -> Result:
    given = os.environ.get("RAY_ADDRESS", "")
    if given in ("", "local"):
        return ok("RAY_ADDRESS is not set: a private Ray starts on this machine with each run")
    if given == "auto":
        return _automatic()
    if given.startswith(("http://", "https://")):
        return _jobs_server(given)
    host_and_port = given.removeprefix("ray://")
    if place_of(host_and_port) is None:
        return failed(
            f"RAY_ADDRESS={given}: not an address",
            f"give HOST:6379, ray://HOST:10001, http://HOST:8265 or auto, {UNSET}",
        )
    reason = unreachable(host_and_port)
    if reason:
        return failed(f"RAY_ADDRESS={given} does not answer ({reason})", f"see that the cluster runs, {UNSET}")
    return ok(f"RAY_ADDRESS={given} takes connections")


def _automatic() -> Result:
    found = current_cluster()
    if found is None or unreachable(found):
        there = "no cluster runs" if found is None else f"the cluster at {found} does not answer"
        return failed(f"RAY_ADDRESS=auto, and {there} on this machine", f"ray start --head, {UNSET}")
    return ok(f"RAY_ADDRESS=auto: the cluster at {found} takes connections")


def _jobs_server(given: str) -> Result:
    """The server of a cluster's dashboard and jobs, which tells its version."""
    try:
        with urllib.request.urlopen(f"{given.rstrip('/')}/api/version", timeout=TIMEOUT_S) as answer:
            there = json.load(answer)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return warning(
                f"RAY_ADDRESS={given} answers, and asks for a token ({error.code})",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where you submit",
            )
        return failed(
            f"RAY_ADDRESS={given} answers with {error.code}", "give the address of Ray's dashboard, HOST:8265"
        )
    except (http.client.HTTPException, ValueError, KeyError, TypeError):
        return failed(f"RAY_ADDRESS={given} is not Ray's", "give the address of Ray's dashboard, HOST:8265")
    except OSError as error:
        reason = getattr(error, "reason", error)
        return failed(f"RAY_ADDRESS={given} does not answer ({reason})", f"see that the cluster runs, {UNSET}")
    here = version_of("ray")
    if here is not None and there != here:
        return warning(f"RAY_ADDRESS={given} runs Ray {there}, this machine {here}", "install the same version on both")
    return ok(f"RAY_ADDRESS={given} runs Ray {there}")


def left_behind(asked: Asked) -> Result:
    """Ray notes the address of the cluster started last on a machine, and a killed one leaves it there."""
    file, found = ray_folder() / "ray_current_cluster", current_cluster()
    if found is None:
        return ok("no other Ray cluster of this machine is noted")
    reason = unreachable(found)
    if reason:
        return warning(
            f"{file} names {found}, which does not answer ({reason}): a cluster was killed",
            "ray stop, or delete the file; otherwise RAY_ADDRESS=auto and `ray status` look for it",
        )
    return ok(f"a cluster runs at {found}; focus-ray joins it only with RAY_ADDRESS={found}")
