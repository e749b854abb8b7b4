"""Clients of the inspection service, synchronous and asynchronous, with typed answers and retries.

The module needs httpx, but no torch and no Ray. Scoring has no side effects, so every request can be sent again. Clients retry
after a lost connection, after the status codes `RETRIED`, and after a 500 without a problem document, which comes from a proxy
whose replica died.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from focus_ray.errors import FocusRayError
from focus_ray.retries import compute_retry_pause_s

Output = Literal["heatmap", "overlay", "mask"]
RETRIED = (408, 429, 502, 503, 504)  # status codes of temporary failures


class ServiceError(FocusRayError, RuntimeError):
    """The service refused a request or could not be reached.

    Attributes:
        status: HTTP status code; 0 without an answer.
        code: last part of the `type` in the problem document; empty without one.
        request_id: id of the request in the logs of the service; empty without a problem document.
    """

    def __init__(self, message: str, status: int = 0, code: str = "", request_id: str = "") -> None:
        super().__init__(message, status, code, request_id)
        self.status, self.code, self.request_id = status, code, request_id

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class DefectRegion:
    """A region of an image that the model marks as defective.

    Attributes:
        x, y, width, height: bounding box in pixels of the image.
        area: number of pixels.
        peak: highest value of the anomaly map in the region.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


@dataclass(frozen=True)
class Finding:
    """The result of an image.

    Attributes:
        map_png: anomaly map as a PNG; None unless the request asked for it.
        map_high: value of the anomaly map that is white in `map_png`.
        error: why the image could not be read; the other values then have no meaning. None: no error.
    """

    name: str
    score: float = float("nan")
    p_value: float = float("nan")
    anomalous: bool = False
    threshold: float = float("nan")
    pixel_threshold: float = float("nan")
    width: int = 0
    height: int = 0
    regions: tuple[DefectRegion, ...] = ()
    map_png: bytes | None = None
    map_high: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class InspectionResult:
    """The answer to an inspection.

    Attributes:
        findings: in the order of the images.
        version, sha256: name and manifest hash of the model that scored the images.
        role: role of this model in the service.
        request_id: id of the request in the logs of the service.
        timings_ms: step -> milliseconds.
    """

    findings: tuple[Finding, ...]
    version: str
    sha256: str
    role: str
    request_id: str
    timings_ms: dict[str, float]


_Request = dict[str, Any]
"""Arguments of httpx's `request`."""


class Client:
    """A synchronous client of the service. Close it after use, or use it as a context manager."""

    def __init__(self, url: str, token: str | None = None, *, retries: int = 8, timeout_s: float = 90.0) -> None:
        """
        Args:
            url: address of the service, such as http://127.0.0.1:8000.
            token: access token; None: no authentication.
            retries: maximum number of retries of a request. The backoff starts at 0.1 s and doubles up to 5 s; a longer
                Retry-After of the service has priority.
            timeout_s: timeout of each attempt.
        """
        self._retries = retries
        self._http = httpx.Client(base_url=url, headers=_build_auth_headers(token), timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def inspect(
        self,
        team: str,
        category: str,
        images: Sequence[bytes],
        *,
        version: str | None = None,
        include_map: bool = False,
    ) -> InspectionResult:
        """Inspects encoded images.

        Args:
            version: version name or alias of the model; None: the service chooses.
            include_map: ask for the anomaly maps.

        Raises: ServiceError: the service refused the request, or did not answer within the retries.
        """
        query = {"version": version, "include": "map" if include_map else None}
        return _parse_inspection(self._send_request(_build_inspection_request(team, category, images, query)))

    def picture(self, team: str, category: str, image: bytes, output: Output, *, version: str | None = None) -> bytes:
        """Returns a PNG with the heat map, overlay or mask of an image. Raises: ServiceError: see `inspect`."""
        request = _build_inspection_request(team, category, [image], {"version": version, "output": output})
        return self._send_request(request).content

    def get(self, path: str) -> Any:
        """Returns the JSON of a path, such as /v1/press/bolt. Raises: ServiceError: see `inspect`."""
        return self._send_request({"method": "GET", "url": path}).json()

    def _send_request(self, request: _Request) -> httpx.Response:
        """Sends a request with retries, by the coroutine that the asynchronous client uses too."""

        async def send_once() -> httpx.Response:
            return self._http.request(**request)

        async def wait(seconds: float) -> None:
            time.sleep(seconds)

        try:
            _send_with_retries(send_once, wait, self._retries).send(
                None
            )  # it never suspends, so it ends at the first step
        except StopIteration as stop:
            response: httpx.Response = stop.value
        return response


class AsyncClient:
    """A client of the service for asyncio, with the arguments and methods of `Client`."""

    def __init__(self, url: str, token: str | None = None, *, retries: int = 8, timeout_s: float = 90.0) -> None:
        self._retries = retries
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(
            base_url=url, headers=_build_auth_headers(token), timeout=timeout_s, limits=limits
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def inspect(
        self,
        team: str,
        category: str,
        images: Sequence[bytes],
        *,
        version: str | None = None,
        include_map: bool = False,
    ) -> InspectionResult:
        """Inspects encoded images, as `Client.inspect` does."""
        query = {"version": version, "include": "map" if include_map else None}
        return _parse_inspection(await self._send_request(_build_inspection_request(team, category, images, query)))

    async def picture(
        self, team: str, category: str, image: bytes, output: Output, *, version: str | None = None
    ) -> bytes:
        """Returns a PNG with the heat map, overlay or mask of an image. Raises: ServiceError: see `Client.inspect`."""
        request = _build_inspection_request(team, category, [image], {"version": version, "output": output})
        return (await self._send_request(request)).content

    async def get(self, path: str) -> Any:
        """Returns the JSON of a path, such as /v1/press/bolt. Raises: ServiceError: see `Client.inspect`."""
        return (await self._send_request({"method": "GET", "url": path})).json()

    async def _send_request(self, request: _Request) -> httpx.Response:
        return await _send_with_retries(lambda: self._http.request(**request), asyncio.sleep, self._retries)


def _build_auth_headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _build_inspection_request(
    team: str, category: str, images: Sequence[bytes], query: dict[str, str | None]
) -> _Request:
    """Returns the request that inspects images: a single image as the body, several images as multipart files.

    Args: query: query parameters; those without a value are left out.
    """
    params = {name: value for name, value in query.items() if value}
    request = {"method": "POST", "url": f"/v1/{team}/{category}/inspect", "params": params}
    if len(images) == 1:
        return {**request, "content": images[0], "headers": {"content-type": "application/octet-stream"}}
    return {**request, "files": [("images", (str(number), image)) for number, image in enumerate(images)]}


async def _send_with_retries(
    send: Callable[[], Awaitable[httpx.Response]], sleep: Callable[[float], Awaitable[None]], retries: int
) -> httpx.Response:
    """Sends a request until it succeeds, is refused, or has no retries left. Both clients use this loop.

    Args:
        send: sends the request once.
        sleep: waits for some seconds.

    Raises: ServiceError: the service refused the request, or did not answer within the retries.
    """
    outcome: httpx.Response | httpx.TransportError
    for attempt in itertools.count():
        try:
            outcome = await send()
        except httpx.TransportError as error:
            outcome = error
        if attempt == retries or not _is_retryable(outcome):
            break
        retry_after = "" if isinstance(outcome, httpx.TransportError) else outcome.headers.get("retry-after", "")
        await sleep(max(compute_retry_pause_s(attempt), min(30.0, float(retry_after)) if retry_after.isdigit() else 0))
    return _check_response(outcome)


def _is_retryable(outcome: httpx.Response | httpx.TransportError) -> bool:
    """Returns whether a retry can help. A 500 without a problem document comes from a proxy whose replica died."""
    if isinstance(outcome, httpx.TransportError):
        return True
    return outcome.status_code in RETRIED or (outcome.status_code == 500 and not _is_problem_document(outcome))


def _check_response(outcome: httpx.Response | httpx.TransportError) -> httpx.Response:
    """Returns a successful response. Raises: ServiceError: for any other outcome."""
    if isinstance(outcome, httpx.TransportError):
        message = f"the service cannot be reached: {outcome!r}: check that it runs and that the URL is right"
        raise ServiceError(message) from outcome
    if outcome.is_success:
        return outcome
    if _is_problem_document(outcome):
        problem = outcome.json()
        code = str(problem["type"]).rpartition(":")[2]
        message = f"{problem['status']} {code}: {problem['detail']} (request {problem['request_id']})"
        raise ServiceError(message, outcome.status_code, code, str(problem["request_id"]))
    raise ServiceError(f"{outcome.status_code}: {outcome.text[:200]}", outcome.status_code)


def _is_problem_document(response: httpx.Response) -> bool:
    """Whether the response is a problem document (RFC 9457) of the service itself."""
    return response.headers.get("content-type", "").startswith("application/problem+json")


def _parse_inspection(response: httpx.Response) -> InspectionResult:
    answer = response.json()
    findings = tuple(_parse_finding(result) for result in answer["results"])
    names = ("version", "sha256", "role", "request_id", "timings_ms")
    return InspectionResult(findings, **{name: answer[name] for name in names})


def _parse_finding(result: dict[str, Any]) -> Finding:
    if "error" in result:
        return Finding(result["name"], error=result["error"]["detail"])
    scalars = ("name", "score", "p_value", "anomalous", "threshold", "pixel_threshold", "width", "height")
    values = {name: result[name] for name in scalars}
    if "map" in result:
        values.update(map_png=base64.b64decode(result["map"]["png"]), map_high=result["map"]["high"])
    return Finding(**values, regions=tuple(DefectRegion(**region) for region in result["regions"]))
