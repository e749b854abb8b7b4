"""What a client is told when a request is not answered: RFC 9457 problem documents, without anything of the inside."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"
SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "description": "urn:focus-ray:CODE; what a program should look at."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "For people: what came, what was expected, what to do."},
        "request_id": {"type": "string", "description": "Names the request in the service's logs."},
    },
}


class Problem(Exception):
    """Ends a request with a problem document.

    code: of `type`, such as "not-found".  retry_after_s: for Retry-After; the same request may then succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, detail, retry_after_s, headers)  # all in args, so that it survives pickle
        self.status, self.code, self.detail, self.retry_after_s = status, code, detail, retry_after_s
        self.headers = headers or {}

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.detail}"

    def document(self, request_id: str) -> dict[str, Any]:
        return {
            "type": f"urn:focus-ray:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }

    def all_headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return self.headers
        return {**self.headers, "retry-after": str(max(0, math.ceil(self.retry_after_s)))}


def not_found(detail: str) -> Problem:
    return Problem(404, "not-found", detail)


def no_such_category(team: str, category: str) -> Problem:
    """The one answer to a category that is not there and to one that the token does not open: they cannot be told apart."""
    return not_found(f"there is no category {category!r} of team {team!r} that this token opens")


def unauthorised(detail: str) -> Problem:
    return Problem(401, "unauthorised", detail, headers={"www-authenticate": "Bearer"})


def unavailable(detail: str, retry_after_s: float) -> Problem:
    """The same request may succeed later."""
    return Problem(503, "unavailable", detail, retry_after_s)
