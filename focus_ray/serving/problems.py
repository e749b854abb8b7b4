"""Problem documents (RFC 9457) for requests that fail. They contain no paths or other internal information."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"
SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "description": "urn:focus-ray:CODE; programs should use this field."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "Text for people: the value, the expected value, and what to do."},
        "request_id": {"type": "string", "description": "Identifies the request in the logs of the service."},
    },
}


class Problem(Exception):
    """Ends a request with a problem document.

    Attributes:
        status: HTTP status.
        code: last part of the field `type`, for instance "not-found".
        detail: text for people.
        retry_after_s: value of the header Retry-After, after which the same request may succeed; None: no such header.
        headers: further headers of the answer.
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
        """Returns the fields of the problem document."""
        return {
            "type": f"urn:focus-ray:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }

    def all_headers(self) -> dict[str, str]:
        """Returns the headers of the answer; Retry-After is rounded up to seconds."""
        if self.retry_after_s is None:
            return self.headers
        return {**self.headers, "retry-after": str(max(0, math.ceil(self.retry_after_s)))}


def not_found(detail: str) -> Problem:
    """Returns a problem with status 404."""
    return Problem(404, "not-found", detail)


def no_such_category(team: str, category: str) -> Problem:
    """Returns the problem for a category that does not exist or that the token may not use.

    Both have the same answer, so that a caller cannot find out the categories of other teams.
    """
    return not_found(f"there is no category {category!r} of team {team!r} that this token opens")


def unauthorised(detail: str) -> Problem:
    """Returns a problem with status 401: the request has no valid token."""
    return Problem(401, "unauthorised", detail, headers={"www-authenticate": "Bearer"})


def unavailable(detail: str, retry_after_s: float) -> Problem:
    """Returns a problem with status 503: the same request may succeed later."""
    return Problem(503, "unavailable", detail, retry_after_s)
