"""Checks of what is installed: Python, packages, torch beside torchvision, Ray."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from focus_ray import __version__
from focus_ray.doctor.finding import Asked, Result, failed, ok, warning

DISTRIBUTION = "focus-ray"
SHOWN = ("torch", "torchvision", "numpy", "pyarrow", "pydantic")
EXTRAS = ("s3", "train", "ray")  # what commands need; others make something faster, or bring weights
WITHOUT_RAY = "training in one process does without it; clusters, sweeps, jobs and the service do not"


def python(asked: Asked) -> Result:
    return ok(f"{platform.python_version()} on {platform.system()} {platform.machine()}; focus_ray {__version__}")


def packages(asked: Asked) -> Result:
    """Every package that focus_ray requires, and those of its extras; Ray has a check of its own.

    An extra that is not installed is told, and fails where a configuration to train by is given and needs it.
    """
    shown = ", ".join(f"{name} {version_of(name) or 'missing'}" for name in SHOWN)
    if not required():
        return _not_installed(shown)
    found = {extra: dict(_wrong(extra)) for extra in ("", *EXTRAS)}
    left_out = [extra for extra in EXTRAS if any(version_of(need.name) is None for need in found[extra])]
    told = [f"the extra {extra} is not installed ({', '.join(found[extra].values())})" for extra in left_out]
    wrong = {need: reason for extra, one in found.items() if extra not in left_out for need, reason in one.items()}
    if asked.given and "train" in left_out:
        wrong.update(found["train"])
    if wrong:
        wanted = " ".join(f"'{need}'" for need in wrong)
        return failed(f"{shown}; {', '.join(wrong.values())}", f"pip install {wanted}")
    return ok("; ".join([shown, *(told or ["all that focus_ray requires is here"])]))


def _wrong(extra: str) -> Iterator[tuple[Requirement, str]]:
    """(requirement, reason) of what an extra requires, but Ray, that is not installed as it should be; "": without an extra."""
    return (problem for need in required(extra=extra) if need.name != "ray" for problem in problems(need))


def _not_installed(shown: str) -> Result:
    return warning(f"{shown}; what focus_ray requires is not known, since it is not installed", "pip install -e .")


def required(name: str = DISTRIBUTION, extra: str = "") -> list[Requirement]:
    """What a package requires here, or what one of its extras adds to that; empty where it is not installed."""
    try:
        listed = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    needs = map(Requirement, listed)
    return [need for need in needs if _applies(need, extra) and not (extra and _applies(need, ""))]


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problems(need: Requirement) -> Iterator[tuple[Requirement, str]]:
    """(requirement, reason) where what is installed does not satisfy it."""
    found = version_of(need.name)
    if found is None:
        yield need, f"{need.name} is missing"
    elif not need.specifier.contains(found, prereleases=True):
        yield need, f"{need.name} is {found}, not {need.specifier}"


def torch_pair(asked: Asked) -> Result:
    """torchvision holds compiled code for one torch, and says which; then whether it loads."""
    torch, vision = version_of("torch"), version_of("torchvision")
    if torch is None or vision is None:
        return failed(f"torch {torch or 'missing'}, torchvision {vision or 'missing'}", "pip install torch torchvision")
    both = f"torch {torch} with torchvision {vision}"
    advice = "install both anew, together and from the same index: pip install --force-reinstall torch torchvision"
    wrong = [need for need in required("torchvision") if need.name == "torch" and any(problems(need))]
    if wrong:
        return failed(f"{both}, which was built for torch{wrong[0].specifier}", advice)
    try:
        import torchvision.ops  # noqa: F401  fails where the compiled parts do not fit
    except (ImportError, RuntimeError, OSError) as error:
        return failed(f"{both}: torchvision does not load: {type(error).__name__}: {error}", advice)
    return ok(f"{both}: they fit")


def ray(asked: Asked) -> Result:
    if importlib.util.find_spec("ray") is None:
        return warning(f"not installed; {WITHOUT_RAY}", "pip install 'focus-ray[ray]'")
    wrong = [problem for need in required(extra="ray") if need.name == "ray" for problem in problems(need)]
    if wrong:
        return failed(wrong[0][1], f"pip install '{wrong[0][0]}'")
    from focus_ray.cluster.ray_private import check_private_parts

    check_private_parts()
    return ok(f"{version_of('ray')}; what focus_ray reads of it is in its place")
