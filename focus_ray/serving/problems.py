"""Problem documents (RFC 9457) for requests that fail. They contain no paths or other internal information."""

from __future__ import annotations

from http import HTTPStatus

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1  # a client that meets a limit waits this long before a retry: about the time of a batch
STORAGE_RETRY_AFTER_S = 5  # the same while the storage fails, which rarely ends within a second


class ProblemDocument(BaseModel):
    """The JSON answer to a request that fails (RFC 9457)."""

    type: str = Field(description="urn:focus-ray:CODE; programs should use this field.")
    title: str
    status: int
    detail: str = Field(description="Text for people: the value, the expected value, and what to do.")
    request_id: str = Field(description="Identifies the request in the logs of the service.")


class HttpProblem(Exception):
    """An error that ends a request. The answer to the client is a problem document (RFC 9457).

    Attributes:
        status: HTTP status.
        code: last part of the field `type`, for instance "not-found".
        detail: text for people.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Stores the problem.

        Args: retry_after_s: seconds after which the same request may succeed, for the header Retry-After; None: no header.
        """
        super().__init__(status, code, detail, retry_after_s, headers)  # all in args, so that it survives pickle
        self.status, self.code, self.detail = status, code, detail
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)

    def __str__(self) -> str:
        """Returns status, code and detail as text."""
        return f"{self.status} {self.code}: {self.detail}"

    def create_response(self, request_id: str) -> JSONResponse:
        """Returns the problem document as an HTTP response."""
        document = ProblemDocument(
            type=f"urn:focus-ray:{self.code}",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            request_id=request_id,
        )
        return JSONResponse(document.model_dump(), self.status, self.headers, MEDIA_TYPE)


def create_not_found_problem(detail: str) -> HttpProblem:
    """Returns a problem with status 404: the requested resource does not exist."""
    return HttpProblem(404, "not-found", detail)


def create_missing_category_problem(team: str, category: str) -> HttpProblem:
    """Returns a problem with status 404 for a category that does not exist or that the token may not use.

    Both cases have the same answer, so that a caller cannot find out the categories of other teams.
    """
    return create_not_found_problem(f"there is no category {category!r} of team {team!r} that this token opens")


def create_unavailable_problem(detail: str, retry_after_s: int = RETRY_AFTER_S) -> HttpProblem:
    """Returns a problem with status 503: the service cannot answer now, but the same request may succeed later."""
    return HttpProblem(503, "unavailable", detail, retry_after_s)
