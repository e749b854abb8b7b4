"""The result of a check, and the loop that runs checks: a check that crashes gives a failed diagnosis too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from focus_ray.errors import FocusRayError
from focus_ray.fitting.settings import Config

Status = Literal["ok", "warning", "FAILED"]


@dataclass(frozen=True)
class Diagnosis:
    """The printable result of one check.

    Attributes:
        check: Name of the check.
        status: "ok", "warning" or "FAILED".
        message: One line that describes the state of the machine.
        advice: One line that says what to do; empty if nothing needs to be done.
    """

    check: str
    status: Status
    message: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.check}: {self.message}" + (f": {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class CheckContext:
    """The configuration that this machine should be able to run.

    Attributes:
        config: Configuration of a run. It holds the defaults if the user named none.
        has_config: True if the user named a configuration or set a key.
        has_data: True if the user named the data set.
    """

    config: Config
    has_config: bool = False
    has_data: bool = False


CheckResult = tuple[Status, str, str]  # status, message, advice
Check = Callable[[CheckContext], CheckResult | None]  # None: the check does not apply, and nothing is printed


def report_ok(message: str) -> CheckResult:
    """Returns the result of a check that passed."""
    return "ok", message, ""


def report_warning(message: str, advice: str) -> CheckResult:
    """Returns the result of a check that found a problem that does not stop a run."""
    return "warning", message, advice


def report_failure(message: str, advice: str = "") -> CheckResult:
    """Returns the result of a check that found a problem that stops a run."""
    return "FAILED", message, advice


def run_checks(checks: Mapping[str, Check], context: CheckContext) -> Iterator[Diagnosis]:
    """Runs the checks in order and yields one diagnosis for each check that applies.

    An exception in one check becomes a failed diagnosis, and the next checks still run.
    """
    for name, check in checks.items():
        try:
            result = check(context)
        except FocusRayError as error:  # its message says what to do
            result = report_failure(str(error))
        except Exception as error:  # a broken installation can raise any type; the other checks must still run
            result = report_failure(f"the check itself failed: {type(error).__name__}: {error}")
        if result is not None:
            status, *texts = result
            yield Diagnosis(name, status, *(" ".join(text.split()) for text in texts))  # each text in one line
