"""Checks of the installed software: Python, packages, torch together with torchvision, Ray."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

from packaging.requirements import Requirement

from focus_ray.doctor.diagnosis import CheckContext, CheckResult, report_failure, report_ok, report_warning
from focus_ray.version import __version__

SHOWN_PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "pydantic")
EXTRAS = ("s3", "train", "ray")  # commands need these extras; other extras are faster variants, or weights
WITHOUT_RAY = "training in one process works without Ray; clusters, sweeps, jobs and the service do not"


def check_python_version(context: CheckContext) -> CheckResult:
    """Returns the versions of Python, of the operating system and of focus_ray."""
    return report_ok(
        f"{platform.python_version()} on {platform.system()} {platform.machine()}; focus_ray {__version__}"
    )


def check_package_versions(context: CheckContext) -> CheckResult:
    """Checks the version of every package that focus_ray and its extras require, except Ray.

    An extra counts as not installed if one of its packages is missing. The message then names this extra. The check fails
    only if the user named a configuration, which needs the extra "train".
    """
    versions = ", ".join(f"{name} {read_installed_version(name) or 'missing'}" for name in SHOWN_PACKAGES)
    if not read_requirements():
        return report_warning(
            f"{versions}; focus_ray is not installed as a package, so its requirements are unknown", "pip install -e ."
        )
    problems: dict[Requirement, str] = {}
    notes = []
    for extra in ("", *EXTRAS):
        extra_problems = find_unmet_requirements(
            [need for need in read_requirements(extra=extra) if need.name != "ray"]
        )
        is_missing = extra and any(read_installed_version(need.name) is None for need in extra_problems)
        if is_missing:
            notes.append(f"the extra {extra} is not installed ({', '.join(extra_problems.values())})")
        if not is_missing or (extra == "train" and context.has_config):
            problems.update(extra_problems)
    if problems:
        packages = " ".join(f"'{need}'" for need in problems)
        return report_failure(f"{versions}; {', '.join(problems.values())}", f"pip install {packages}")
    return report_ok("; ".join([versions, *(notes or ["all required packages are installed"])]))


def read_requirements(name: str = "focus-ray", extra: str = "") -> list[Requirement]:
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
    return [
        need
        for need in needs
        if _does_requirement_apply(need, extra) and not (extra and _does_requirement_apply(need, ""))
    ]


def _does_requirement_apply(need: Requirement, extra: str) -> bool:
    """Returns True if a requirement applies on this platform with an extra; "" stands for no extra."""
    return need.marker is None or need.marker.evaluate({"extra": extra})


def read_installed_version(name: str) -> str | None:
    """Returns the version of an installed package; None if the package is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_unmet_requirements(needs: list[Requirement]) -> dict[Requirement, str]:
    """Returns the requirements that the installed versions do not satisfy, each with the reason."""
    problems = {}
    for need in needs:
        version = read_installed_version(need.name)
        if version is None:
            problems[need] = f"{need.name} is missing"
        elif not need.specifier.contains(version, prereleases=True):
            problems[need] = f"{need.name} is {version}, not {need.specifier}"
    return problems


def check_torch_and_torchvision(context: CheckContext) -> CheckResult:
    """Checks that torchvision was built for the installed torch, and that it can be imported."""
    torch, vision = read_installed_version("torch"), read_installed_version("torchvision")
    versions = f"torch {torch or 'missing'} with torchvision {vision or 'missing'}"
    if torch is None or vision is None:
        return report_failure(versions, "pip install torch torchvision")
    advice = "install both again, together and from the same index: pip install --force-reinstall torch torchvision"
    # torchvision holds compiled code for one version of torch, and requires exactly this version.
    for need in find_unmet_requirements([need for need in read_requirements("torchvision") if need.name == "torch"]):
        return report_failure(f"{versions}, which was built for torch{need.specifier}", advice)
    try:
        import torchvision.ops  # noqa: F401  raises if the compiled parts do not fit
    except (ImportError, RuntimeError, OSError) as error:
        return report_failure(f"{versions}: torchvision does not load: {type(error).__name__}: {error}", advice)
    return report_ok(f"{versions}: they fit")


def check_ray_package(context: CheckContext) -> CheckResult:
    """Checks that Ray is installed in a supported version, with the private parts of Ray that focus_ray uses."""
    if importlib.util.find_spec("ray") is None:
        return report_warning(f"not installed; {WITHOUT_RAY}", "pip install 'focus-ray[ray]'")
    for need, reason in find_unmet_requirements(
        [need for need in read_requirements(extra="ray") if need.name == "ray"]
    ).items():
        return report_failure(reason, f"pip install '{need}'")
    from focus_ray.cluster.ray_private import check_private_attributes

    check_private_attributes()
    return report_ok(f"{read_installed_version('ray')}; it has the internal parts that focus_ray uses")
