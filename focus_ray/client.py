"""A client of the inspection service, sync and async: typed answers, and retries of what may succeed later.

Needs httpx alone of what the package brings; no torch and no Ray. Scoring changes nothing, so every request may be sent
again: after a lost connection, 429, 503, 504, or a 500 without a problem document, which comes from a proxy whose replica died.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import httpx

from focus_ray.errors import FocusRayError

Output = Literal["heatmap", "overlay", "mask"]
RETRIED = (408, 429, 502, 503, 504)


class ServiceError(FocusRayError, RuntimeError):
    """The service refused a request, or could not be reached. status: 0 where there was no answer.  code: of its `type`."""

    def __init__(self, message: str, status: int = 0, code: str = "", request_id: str = "") -> None:
        super().__init__(message, status, code, request_id)
        self.status, self.code, self.request_id = status, code, request_id

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class FoundRegion:
    """Pixels of the image; peak of the map."""

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


@dataclass(frozen=True)
class Finding:
    """What was found in one image. error: why it could not be read; the figures mean nothing then."""

    name: str
    score: float = float("nan")
    p_value: float = float("nan")
    anomalous: bool = False
    threshold: float = float("nan")
    pixel_threshold: float = float("nan")
    width: int = 0
    height: int = 0
    regions: tuple[FoundRegion, ...] = ()
    map_png: bytes | None = None
    map_high: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Inspected:
    """Findings in the order of the images, and which version made them."""

    findings: tuple[Finding, ...]
    version: str
    sha256: str
    role: str
    request_id: str
    timings_ms: dict[str, float]


class _Place(TypedDict):
    method: str
    url: str


class _Request(_Place, total=False):
    """What of httpx's `request` is used."""

    params: dict[str, str]
    content: bytes
    headers: dict[str, str]
    files: list[tuple[str, tuple[str, bytes]]]


class Client:
    """Asks a service; close it, or use it as a context."""

    def __init__(self, url: str, token: str | None = None, *, retries: int = 8, timeout_s: float = 90.0) -> None:
        """
        Args:
            url: such as http://127.0.0.1:8000.  retries: of a request, with pauses from 0.1 s that double up to 5 s,
                or what Retry-After says where that is longer.
        """
        self._retries = retries
        self._http = httpx.Client(base_url=url, headers=_headers(token), timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def inspect(
        self,
        team: str,
        category: str,
        images: Sequence[bytes],
        *,
        version: str | None = None,
        include_map: bool = False,
    ) -> Inspected:
        """Scores encoded images. Raises: ServiceError: refused, or not answered within the retries."""
        return _inspected(self._send(_inspection(team, category, images, version, include_map)))

    def picture(self, team: str, category: str, image: bytes, output: Output, *, version: str | None = None) -> bytes:
        """A PNG of one image's findings. Raises: ServiceError."""
        return self._send(_picture(team, category, image, output, version)).content

    def get(self, path: str) -> Any:
        """The JSON of any path, such as /v1/press/bolt. Raises: ServiceError."""
        return self._send({"method": "GET", "url": path}).json()

    def _send(self, request: _Request) -> httpx.Response:
        async def send() -> httpx.Response:
            return self._http.request(**request)

        async def sleep(seconds: float) -> None:
            time.sleep(seconds)

        return _finish(_exchange(send, sleep, self._retries))


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(self, url: str, token: str | None = None, *, retries: int = 8, timeout_s: float = 90.0) -> None:
        self._retries = retries
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(token), timeout=timeout_s, limits=limits)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def inspect(
        self,
        team: str,
        category: str,
        images: Sequence[bytes],
        *,
        version: str | None = None,
        include_map: bool = False,
    ) -> Inspected:
        """Scores encoded images. Raises: ServiceError: refused, or not answered within the retries."""
        return _inspected(await self._send(_inspection(team, category, images, version, include_map)))

    async def picture(
        self, team: str, category: str, image: bytes, output: Output, *, version: str | None = None
    ) -> bytes:
        """A PNG of one image's findings. Raises: ServiceError."""
        return (await self._send(_picture(team, category, image, output, version))).content

    async def get(self, path: str) -> Any:
        """The JSON of any path, such as /v1/press/bolt. Raises: ServiceError."""
        return (await self._send({"method": "GET", "url": path})).json()

    async def _send(self, request: _Request) -> httpx.Response:
        return await _exchange(lambda: self._http.request(**request), asyncio.sleep, self._retries)


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _inspection(team: str, category: str, images: Sequence[bytes], version: str | None, include_map: bool) -> _Request:
    params = {**({"version": version} if version else {}), **({"include": "map"} if include_map else {})}
    request: _Request = {"method": "POST", "url": f"/v1/{team}/{category}/inspect", "params": params}
    if len(images) == 1:
        request["content"] = images[0]
        request["headers"] = {"content-type": "application/octet-stream"}
    else:
        request["files"] = [("images", (str(number), image)) for number, image in enumerate(images)]
    return request


def _picture(team: str, category: str, image: bytes, output: Output, version: str | None) -> _Request:
    request = _inspection(team, category, [image], version, False)
    request["params"]["output"] = output
    return request


async def _exchange(
    send: Callable[[], Awaitable[httpx.Response]], sleep: Callable[[float], Awaitable[None]], retries: int
) -> httpx.Response:
    """Sends until the answer is one to keep: the one loop of both clients, which only send and sleep.

    Raises: ServiceError: refused, or not answered within the retries.
    """
    attempt = 0
    while True:
        outcome: httpx.Response | httpx.TransportError
        try:
            outcome = await send()
        except httpx.TransportError as error:
            outcome = error
        pause = _pause_after(outcome, attempt) if attempt < retries else None
        if pause is None:
            return _accept(outcome)
        await sleep(pause)
        attempt += 1


def _finish(exchange: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
    """The answer of an exchange whose `send` and `sleep` block, so that it never waits for an event loop."""
    try:
        exchange.send(None)
    except StopIteration as done:
        response: httpx.Response = done.value
        return response
    raise AssertionError("an exchange that blocks has waited for an event loop")


def _pause_after(outcome: httpx.Response | httpx.TransportError, attempt: int) -> float | None:
    """Seconds to wait before a request is sent again; None where that would change nothing. attempt: from 0."""
    pause = min(5.0, 0.1 * 2.0**attempt) * random.uniform(0.5, 1.0)
    if isinstance(outcome, httpx.TransportError):
        return pause
    from_proxy = outcome.status_code == 500 and not _is_problem(outcome)
    if outcome.status_code not in RETRIED and not from_proxy:
        return None
    told = outcome.headers.get("retry-after", "")
    return max(pause, min(30.0, float(told))) if told.isdigit() else pause


def _accept(outcome: httpx.Response | httpx.TransportError) -> httpx.Response:
    if isinstance(outcome, httpx.TransportError):
        raise ServiceError(
            f"the service cannot be reached: {outcome!r}: see that it runs and that the URL is right"
        ) from (outcome)
    if outcome.is_success:
        return outcome
    if _is_problem(outcome):
        problem = outcome.json()
        code = str(problem["type"]).rpartition(":")[2]
        message = f"{problem['status']} {code}: {problem['detail']} (request {problem['request_id']})"
        raise ServiceError(message, outcome.status_code, code, str(problem["request_id"]))
    raise ServiceError(f"{outcome.status_code}: {outcome.text[:200]}", outcome.status_code)


def _is_problem(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith("application/problem+json")


def _inspected(response: httpx.Response) -> Inspected:
    answer = response.json()
    return Inspected(
        findings=tuple(_finding(result) for result in answer["results"]),
        version=answer["version"],
        sha256=answer["sha256"],
        role=answer["role"],
        request_id=answer["request_id"],
        timings_ms=answer["timings_ms"],
    )


def _finding(result: dict[str, Any]) -> Finding:
    if "error" in result:
        return Finding(result["name"], error=result["error"]["detail"])
    plain = ("name", "score", "p_value", "anomalous", "threshold", "pixel_threshold", "width", "height")
    values = {name: result[name] for name in plain}
    if "map" in result:
        values.update(map_png=base64.b64decode(result["map"]["png"]), map_high=result["map"]["high"])
    return Finding(**values, regions=tuple(FoundRegion(**region) for region in result["regions"]))
