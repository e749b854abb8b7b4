"""What a check finds, and how checks are run: one that crashes is a finding too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from focus_ray.config import Config
from focus_ray.errors import FocusRayError

Status = Literal["ok", "warning", "FAILED"]


@dataclass(frozen=True)
class Finding:
    """check: its name.  message: what was found, in one line.  advice: what to do; empty where there is nothing to do."""

    check: str
    status: Status
    message: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.check}: {self.message}" + (f": {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Asked:
    """What the machine is to be able to do.

    config: of a run; where none is given, the defaults.  given: whether a configuration was named.  has_data: whether its
    data set is known.
    """

    config: Config
    given: bool = False
    has_data: bool = False

    @property
    def trouble(self) -> Status:
        """How bad it is that something is missing which only some configurations need."""
        return "FAILED" if self.given else "warning"


Result = tuple[Status, str, str]  # status, message, advice
Check = Callable[[Asked], Result | None]  # None: nothing to say here


def ok(message: str) -> Result:
    return "ok", message, ""


def warning(message: str, advice: str) -> Result:
    return "warning", message, advice


def failed(message: str, advice: str) -> Result:
    return "FAILED", message, advice


def examine(checks: Mapping[str, Check], asked: Asked) -> Iterator[Finding]:
    """Runs the checks in order, each on its own."""
    for name, check in checks.items():
        try:
            result = check(asked)
        except FocusRayError as error:  # its message says what to do
            result = failed(str(error), "")
        except Exception as error:  # a broken installation fails in any way; the other checks go on
            result = failed(f"the check itself failed: {type(error).__name__}: {error}", "")
        if result is not None:
            status, message, advice = result
            yield Finding(name, status, _one_line(message), _one_line(advice))


def as_json(findings: Iterable[Finding]) -> str:
    """{"healthy": ..., "findings": [{"check", "status", "message", "advice"}, ...]}."""
    listed = list(findings)
    content = {"healthy": is_healthy(listed), "findings": [asdict(finding) for finding in listed]}
    return json.dumps(content, indent=1, ensure_ascii=False)


def is_healthy(findings: Iterable[Finding]) -> bool:
    return all(finding.status != "FAILED" for finding in findings)


def _one_line(text: str) -> str:
    return " ".join(text.split())
