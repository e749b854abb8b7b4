"""What is refused before it costs anything: too much at once, bodies too large or too slow, too many images."""

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

from focus_ray.serving.measures import Measures
from focus_ray.serving.problems import Problem, unavailable
from focus_ray.serving.settings import MIB, Limits

_MAX_FIELD_BYTES = 4096
MAX_DOCUMENT_BYTES = 4096
DOCUMENT_LIMITS = Limits(
    max_body_mb=MAX_DOCUMENT_BYTES / MIB, body_timeout_s=5.0
)  # of the JSON bodies of admin requests
M = TypeVar("M", bound=BaseModel)
_PARAMETERS = ("version", "output", "include")  # of the URL of an inspection


class Gate:
    """Counts requests and the bytes of their bodies, and lets no more in than memory was set aside for."""

    def __init__(self, limits: Limits, measures: Measures) -> None:
        self.limits, self.measures = limits, measures
        self.num_requests, self.num_bytes = 0, 0
        self._by_team: Counter[str] = Counter()
        self._bytes_by_team: Counter[str] = Counter()
        # another team always finds room for a body, where there is room for two
        spare_mb = limits.max_in_flight_mb - limits.max_body_mb
        self._max_bytes = MIB * limits.max_in_flight_mb
        self._max_team_bytes = MIB * (spare_mb if spare_mb >= limits.max_body_mb else limits.max_in_flight_mb)

    @contextmanager
    def admit(self, team: str, num_bytes: int) -> Iterator[None]:
        """Holds a place while a request is answered. Raises: Problem: 429 the team has too many, 503 all have."""
        if self._by_team[team] >= self.limits.max_in_flight_per_team:
            raise Problem(
                429,
                "too-many-requests",
                f"team {team!r} has {self._by_team[team]} requests under way, the most it may: wait for some",
                self.limits.retry_after_s,
            )
        if self._bytes_by_team[team] and num_bytes + self._bytes_by_team[team] > self._max_team_bytes < self._max_bytes:
            raise Problem(
                429,
                "too-many-requests",
                f"team {team!r} has as many MiB of requests under way as it may: wait for some",
                self.limits.retry_after_s,
            )
        if self.num_requests >= self.limits.max_in_flight:
            raise unavailable("the service has all the requests it can take: try again", self.limits.retry_after_s)
        if self.num_bytes and self.num_bytes + num_bytes > self._max_bytes:
            raise unavailable("the service has all the images it can hold: try again", self.limits.retry_after_s)
        self._by_team[team] += 1
        self._bytes_by_team[team] += num_bytes
        self.num_requests += 1
        self.num_bytes += num_bytes
        self.measures.in_flight(self.num_requests, self.num_bytes)
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_bytes -= num_bytes
            self._by_team[team] -= 1
            self._bytes_by_team[team] -= num_bytes
            if not self._by_team[team]:
                del self._by_team[team], self._bytes_by_team[team]
            self.measures.in_flight(self.num_requests, self.num_bytes)


def announced_bytes(request: Request, limits: Limits) -> int:
    """The length that a request announces; the most allowed where it announces none.

    Raises: Problem: 413 above the limit, 400 not a length.
    """
    most = int(limits.max_body_mb * MIB)
    text = request.headers.get("content-length")
    if text is None:
        return most
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Problem(400, "bad-request", "the Content-Length header is not a number of bytes")
    if int(text) > most:
        raise _too_large(limits)
    return int(text)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Raises: Problem: 413 more bytes than allowed, 408 they take too long."""
    most = int(limits.max_body_mb * MIB)

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > most:
                raise _too_large(limits)
            body += chunk
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_timeout_s)
    except asyncio.TimeoutError:
        raise Problem(
            408, "body-timeout", f"the body did not arrive within {limits.body_timeout_s:g} s", limits.retry_after_s
        ) from None


async def read_document(request: Request, model: type[M]) -> M:
    """A small JSON body. Call it after the caller was authenticated: FastAPI reads a declared body before.

    Raises: Problem: as `announced_bytes` and `read_body`; 415 another type.  RequestValidationError: not as the model says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "unsupported-media-type", f"Content-Type {kind[:100]!r}: send application/json")
    announced_bytes(request, DOCUMENT_LIMITS)
    try:
        return model.model_validate_json(await read_body(request, DOCUMENT_LIMITS))
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None


async def split_images(request: Request, body: bytes, limits: Limits) -> list[tuple[str, bytes]]:
    """Names and bytes of the images of a body: one as it is, or one or more files of a multipart form.

    Raises: Problem: 415 neither, 400 a form that cannot be read, 422 no image, 413 too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _read_form(request, body, limits)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images = [("", body)] if body else []
    else:
        raise Problem(
            415,
            "unsupported-media-type",
            f"Content-Type {kind[:100]!r}: send image/* or application/octet-stream with the bytes of one image, or "
            "multipart/form-data with a file for each",
        )
    if not images:
        raise Problem(422, "no-image", "there is no image in the request: send the bytes of one, or a form with files")
    return images


class _FormParser(MultiPartParser):
    """Starlette's parser, which takes only parts with `filename` as files; images without it are files here too."""

    def on_headers_finished(self) -> None:
        """Gives a part a `filename` if only `filename*` (RFC 5987) or its type shows that it is a file."""
        part = self._current_part
        disposition = part.content_disposition or b""
        if b"filename" not in parse_options_header(disposition)[1]:
            header = Message()
            header["content-disposition"] = disposition.decode("latin-1")
            types = [value.strip().lower() for field, value in part.item_headers if field == b"content-type"]
            is_image = any(value.startswith((b"image/", b"application/octet-stream")) for value in types)
            name = header.get_filename("" if is_image else None)  # also of `filename*` and `filename*0*`
            if name is not None:
                safe = "".join(letter if letter.isprintable() and letter not in '"\\' else "_" for letter in name)
                part.content_disposition = disposition + b'; filename="' + safe.encode(errors="replace") + b'"'
        super().on_headers_finished()


async def _read_form(request: Request, body: bytes, limits: Limits) -> list[tuple[str, bytes]]:
    async def whole() -> AsyncIterator[bytes]:
        yield body

    parser = _FormParser(
        request.headers,
        whole(),  # type: ignore[arg-type]
        max_files=limits.max_images + 1,
        max_fields=8,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = len(body) + 1  # in memory already: never to a file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "files" in error.message.lower():
            raise _too_many(limits) from None
        if "exceeded maximum size" in error.message:
            raise Problem(
                400,
                "bad-form",
                f"a field of the form is larger than {_MAX_FIELD_BYTES} bytes and no file: give each image a file name, as "
                'in Content-Disposition: form-data; name="images"; filename="a.png"',
            ) from None
        raise Problem(400, "bad-form", f"the multipart form cannot be read: {error.message[:200]}") from None
    except (KeyError, ValueError, UnicodeError):  # what the parser lets through of odd headers
        raise Problem(400, "bad-form", "the multipart form cannot be read") from None
    images: list[tuple[str, bytes]] = []
    for name, value in form.multi_items():
        if isinstance(value, str):
            if name in _PARAMETERS:
                raise Problem(
                    422, "parameter-in-form", f"{name!r} is a field of the form: put it into the URL, as ?{name}=..."
                )
            continue
        images.append(((value.filename or "")[:200], await value.read()))
    if len(images) > limits.max_images:
        raise _too_many(limits)
    return images


def _too_many(limits: Limits) -> Problem:
    return Problem(
        413, "too-many-images", f"more than {limits.max_images} images in one request: send several requests"
    )


def _too_large(limits: Limits) -> Problem:
    num_bytes = int(limits.max_body_mb * MIB)
    size = f"{limits.max_body_mb:g} MiB" if num_bytes >= MIB else f"{num_bytes} bytes"
    return Problem(413, "too-large", f"the body is larger than {size}: send less in a request")
