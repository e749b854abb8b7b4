"""Checks of the installed software: Python, packages, torch together with torchvision, Ray."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

from packaging.requirements import Requirement

from focus_ray.doctor.diagnosis import CheckContext, CheckResult, failed, ok, warning
from focus_ray.version import __version__

SHOWN_PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "pydantic")
EXTRAS = ("s3", "train", "ray")  # commands need these extras; other extras are faster variants, or weights
WITHOUT_RAY = "training in one process works without Ray; clusters, sweeps, jobs and the service do not"


def check_python(context: CheckContext) -> CheckResult:
    """Returns the versions of Python, of the operating system and of focus_ray."""
    return ok(f"{platform.python_version()} on {platform.system()} {platform.machine()}; focus_ray {__version__}")


def check_packages(context: CheckContext) -> CheckResult:
    """Checks the version of every package that focus_ray and its extras require, except Ray.

    An extra counts as not installed if one of its packages is missing. The message then names this extra. The check fails
    only if the user named a configuration, which needs the extra "train".
    """
    versions = ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in SHOWN_PACKAGES)
    if not requirements_of():
        return warning(
            f"{versions}; focus_ray is not installed as a package, so its requirements are unknown", "pip install -e ."
        )
    problems: dict[Requirement, str] = {}
    notes = []
    for extra in ("", *EXTRAS):
        extra_problems = problems_of([need for need in requirements_of(extra=extra) if need.name != "ray"])
        is_missing = extra and any(installed_version(need.name) is None for need in extra_problems)
        if is_missing:
            notes.append(f"the extra {extra} is not installed ({', '.join(extra_problems.values())})")
        if not is_missing or (extra == "train" and context.has_config):
            problems.update(extra_problems)
    if problems:
        packages = " ".join(f"'{need}'" for need in problems)
        return failed(f"{versions}; {', '.join(problems.values())}", f"pip install {packages}")
    return ok("; ".join([versions, *(notes or ["all required packages are installed"])]))


def requirements_of(name: str = "focus-ray", extra: str = "") -> list[Requirement]:
    """Returns the requirements of an installed package on this platform.

    Args:
        name: Name of the distribution.
        extra: If given, only the requirements that this extra adds.

    Returns:
        The requirements; empty if the package is not installed.
    """
    try:
        needs = [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []
    return [need for need in needs if _applies(need, extra) and not (extra and _applies(need, ""))]


def _applies(need: Requirement, extra: str) -> bool:
    """Returns True if a requirement applies on this platform with an extra; "" stands for no extra."""
    return need.marker is None or need.marker.evaluate({"extra": extra})


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package; None if the package is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problems_of(needs: list[Requirement]) -> dict[Requirement, str]:
    """Returns the requirements that the installed versions do not satisfy, each with the reason."""
    problems = {}
    for need in needs:
        version = installed_version(need.name)
        if version is None:
            problems[need] = f"{need.name} is missing"
        elif not need.specifier.contains(version, prereleases=True):
            problems[need] = f"{need.name} is {version}, not {need.specifier}"
    return problems


def check_torch_pair(context: CheckContext) -> CheckResult:
    """Checks that torchvision was built for the installed torch, and that it can be imported."""
    torch, vision = installed_version("torch"), installed_version("torchvision")
    versions = f"torch {torch or 'missing'} with torchvision {vision or 'missing'}"
    if torch is None or vision is None:
        return failed(versions, "pip install torch torchvision")
    advice = "install both again, together and from the same index: pip install --force-reinstall torch torchvision"
    # torchvision holds compiled code for one version of torch, and requires exactly this version.
    for need in problems_of([need for need in requirements_of("torchvision") if need.name == "torch"]):
        return failed(f"{versions}, which was built for torch{need.specifier}", advice)
    try:
        import torchvision.ops  # noqa: F401  raises if the compiled parts do not fit
    except (ImportError, RuntimeError, OSError) as error:
        return failed(f"{versions}: torchvision does not load: {type(error).__name__}: {error}", advice)
    return ok(f"{versions}: they fit")


def check_ray(context: CheckContext) -> CheckResult:
    """Checks that Ray is installed in a supported version, with the private parts of Ray that focus_ray uses."""
    if importlib.util.find_spec("ray") is None:
        return warning(f"not installed; {WITHOUT_RAY}", "pip install 'focus-ray[ray]'")
    for need, reason in problems_of([need for need in requirements_of(extra="ray") if need.name == "ray"]).items():
        return failed(reason, f"pip install '{need}'")
    from focus_ray.cluster.ray_private import check_private_parts

    check_private_parts()
    return ok(f"{installed_version('ray')}; it has the internal parts that focus_ray uses")
