"""Limits that refuse a request before it costs much: requests in flight, size and duration of the body, number of images.

A request is in flight from its admission until its answer is ready.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from email.message import Message
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.problems import RETRY_AFTER_S, HttpProblem, create_unavailable_problem
from focus_ray.serving.settings import MIB, RequestLimits

_MAX_FIELD_BYTES = 4096
BODY_TIMEOUT_S = 30.0  # for the body of an inspection: 32 MiB at 9 Mbit/s
MAX_DOCUMENT_BYTES, DOCUMENT_TIMEOUT_S = 4096, 5.0  # for the JSON bodies of admin requests
M = TypeVar("M", bound=BaseModel)
_URL_PARAMETERS = ("version", "output", "include")  # of an inspection; in a form they would have no effect


class RequestLimiter:
    """Counts the requests in flight (not answered yet) and their bytes for each team, and refuses requests above the limits."""

    def __init__(self, limits: RequestLimits, metrics: MetricsRecorder) -> None:
        self.limits, self.metrics = limits, metrics
        self._requests_by_team: Counter[str] = Counter()
        self._bytes_by_team: Counter[str] = Counter()
        # one team may not fill the memory: it leaves room for one body of another team, if there is room for two bodies
        spare_mb = limits.max_in_flight_mb - limits.max_body_mb
        self._max_bytes = MIB * limits.max_in_flight_mb
        self._max_team_bytes = MIB * spare_mb if spare_mb >= limits.max_body_mb else float("inf")

    @contextmanager
    def admit(self, team: str, num_bytes: int) -> Iterator[None]:
        """Context manager: admits a request with a body of `num_bytes`, and counts it as in flight while the context is open.

        Raises: HttpProblem: 429, the team has too many requests or bytes in flight. 503, all teams together have too many.
        """
        team_requests, team_bytes = self._requests_by_team[team], self._bytes_by_team[team]
        all_requests, all_bytes = self._requests_by_team.total(), self._bytes_by_team.total()
        has_team_room = not team_bytes or team_bytes + num_bytes <= self._max_team_bytes
        has_room = not all_bytes or all_bytes + num_bytes <= self._max_bytes
        if team_requests >= self.limits.max_in_flight_per_team or not has_team_room:
            detail = f"team {team!r} has {team_requests} requests of {team_bytes} bytes in flight: wait until one ends"
            raise HttpProblem(429, "too-many-requests", detail, RETRY_AFTER_S)
        if all_requests >= self.limits.max_in_flight or not has_room:
            raise create_unavailable_problem(
                f"the service has {all_requests} requests of {all_bytes} bytes in flight: try again"
            )
        self._update_counts(team, 1, num_bytes)
        try:
            yield
        finally:
            self._update_counts(team, -1, -num_bytes)

    def _update_counts(self, team: str, num_requests: int, num_bytes: int) -> None:
        """Adds to the unanswered requests of a team and to their bytes, and records the sums of all teams as metrics."""
        self._requests_by_team[team] += num_requests
        self._bytes_by_team[team] += num_bytes
        if not self._requests_by_team[team]:
            del self._requests_by_team[team], self._bytes_by_team[team]
        self.metrics.record("in_flight_requests", self._requests_by_team.total())
        self.metrics.record("in_flight_bytes", self._bytes_by_team.total())


def read_content_length(request: Request, max_bytes: int) -> int:
    """Returns the number of bytes in the header Content-Length; `max_bytes` if the header is absent.

    Raises: HttpProblem: 413, the length is above `max_bytes`. 400, the header is not a number of bytes.
    """
    text = request.headers.get("content-length")
    if text is None:
        return max_bytes
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise HttpProblem(400, "bad-request", "the Content-Length header is not a number of bytes")
    if int(text) > max_bytes:
        raise _create_body_size_problem(max_bytes)
    return int(text)


async def read_body(request: Request, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """Reads the body of a request.

    Raises: HttpProblem: 413, the body has more than `max_bytes`. 408, the body does not arrive within `timeout_s` seconds.
    """

    async def read() -> bytes:
        """Returns the body. Raises: HttpProblem: 413, the body has more than `max_bytes`."""
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > max_bytes:
                raise _create_body_size_problem(max_bytes)
            body += chunk
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), timeout_s)
    except asyncio.TimeoutError:
        detail = f"the body did not arrive within {timeout_s:g} s"
        raise HttpProblem(408, "body-timeout", detail, RETRY_AFTER_S) from None


async def read_json_body(request: Request, model: type[M]) -> M:
    """Reads a small JSON body, and validates it against a pydantic model.

    If FastAPI read the body, it would read it before the authentication. This function is called after the authentication, so
    that strangers cannot make the service read bodies.

    Raises:
        HttpProblem: 400 or 413, as `read_content_length`. 408 or 413, as `read_body`. 415, the Content-Type is not JSON.
        RequestValidationError: the body is not valid JSON, or does not fit the model.
    """
    if _read_media_type(request) != "application/json":
        raise _create_media_type_problem(request, "application/json")
    read_content_length(request, MAX_DOCUMENT_BYTES)
    try:
        return model.model_validate_json(await read_body(request, MAX_DOCUMENT_BYTES, DOCUMENT_TIMEOUT_S))
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None


async def extract_images(request: Request, body: bytes, limits: RequestLimits) -> list[tuple[str, bytes]]:
    """Returns (file name, bytes) of each image in a body. The body is one image, without a file name, or a multipart form.

    Raises: HttpProblem: 400, the form cannot be read. 413, the form has too many images. 415, the Content-Type is neither an
        image nor a form. 422, there is no image, or the form has a field that belongs into the URL.
    """
    media_type = _read_media_type(request)
    if media_type == "multipart/form-data":
        images = await _read_form(request, body, limits)
    elif media_type.startswith("image/") or media_type == "application/octet-stream":
        images = [("", body)] if body else []
    else:
        raise _create_media_type_problem(
            request, "image/* or application/octet-stream, or multipart/form-data with several images"
        )
    if not images:
        raise HttpProblem(422, "no-image", "the request has no image: send the bytes of an image, or a form with files")
    return images


class _ImageFormParser(MultiPartParser):
    """A parser of multipart forms that also treats parts with an image as files if they have no `filename`.

    Starlette's parser treats only parts with `filename` as files.
    """

    def on_headers_finished(self) -> None:
        """Adds a `filename` to a part of the form that has none, but is a file by its `filename*` (RFC 5987) or its media type.

        The parser calls this method after it has read the headers of a part.
        """
        part = self._current_part
        disposition = part.content_disposition or b""
        if b"filename" not in parse_options_header(disposition)[1]:
            header = Message()
            header["content-disposition"] = disposition.decode("latin-1")
            types = [value.strip().lower() for field, value in part.item_headers if field == b"content-type"]
            is_image = any(value.startswith((b"image/", b"application/octet-stream")) for value in types)
            name = header.get_filename("" if is_image else None)  # also reads `filename*` and `filename*0*`
            if name is not None:
                safe_name = "".join(letter if letter.isprintable() and letter not in '"\\' else "_" for letter in name)
                part.content_disposition = disposition + b'; filename="' + safe_name.encode(errors="replace") + b'"'
        super().on_headers_finished()


async def _read_form(request: Request, body: bytes, limits: RequestLimits) -> list[tuple[str, bytes]]:
    """Returns (file name, bytes) of each file in a multipart form; the file name may be empty.

    Raises: HttpProblem: 400, the form cannot be read. 413, it has too many images. 422, it has a field that belongs into the URL.
    """

    async def stream_body() -> AsyncIterator[bytes]:
        """Generator: yields the whole body as one chunk, because the parser reads a stream."""
        yield body

    parser = _ImageFormParser(
        request.headers,
        stream_body(),  # type: ignore[arg-type]
        max_files=limits.max_images,
        max_fields=8,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = len(body) + 1  # the body is in memory already: never write a file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "files" in error.message.lower():
            detail = f"more than {limits.max_images} images in one request: send several requests"
            raise HttpProblem(413, "too-many-images", detail) from None
        detail = f"the multipart form cannot be read: {error.message[:200]}"
        if "exceeded maximum size" in error.message:
            detail = (
                f"a field of the form is larger than {_MAX_FIELD_BYTES} bytes and is not a file: give each image a file name, as "
                'in Content-Disposition: form-data; name="images"; filename="a.png"'
            )
        raise HttpProblem(400, "bad-form", detail) from None
    except (KeyError, ValueError, UnicodeError):  # the parser does not catch these for malformed headers
        raise HttpProblem(400, "bad-form", "the multipart form cannot be read") from None
    images: list[tuple[str, bytes]] = []
    for name, value in form.multi_items():
        if not isinstance(value, str):
            images.append(((value.filename or "")[:200], await value.read()))
        elif name in _URL_PARAMETERS:
            detail = f"{name!r} is a field of the form: put it into the URL, as ?{name}=..."
            raise HttpProblem(422, "parameter-in-form", detail)
    return images


def _read_media_type(request: Request) -> str:
    """Returns the media type of a request, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _create_media_type_problem(request: Request, expected: str) -> HttpProblem:
    """Returns a problem with status 415: the Content-Type of the request is not supported.

    Args: expected: supported types, for the message.
    """
    return HttpProblem(
        415, "unsupported-media-type", f"Content-Type {_read_media_type(request)[:100]!r}: send {expected}"
    )


def _create_body_size_problem(max_bytes: int) -> HttpProblem:
    """Returns a problem with status 413: the body is larger than `max_bytes`."""
    return HttpProblem(413, "too-large", f"the body is larger than {max_bytes} bytes: send less in a request")
