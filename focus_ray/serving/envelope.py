"""Middleware for HTTP requests: adds a request id and security headers, logs one line, and hides unexpected errors."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from focus_ray.serving.logs import log_event
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.problems import HttpProblem

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class RequestMiddleware:
    """ASGI middleware around every HTTP request: adds headers, logs and measures the request, and hides unexpected errors.

    It stores the request id in `scope["state"]["request_id"]`. Health checks are measured, but not logged.
    """

    def __init__(self, app: ASGIApp, metrics: MetricsRecorder) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get("x-request-id", "")
        request_id = client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({"x-request-id": request_id, **_SECURITY_HEADERS})
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            log_event("request failed", level=logging.ERROR, error=error, request_id=request_id)
            if not status:
                detail = "the service failed on this request; its logs contain the reason"
                response = HttpProblem(500, "internal-error", detail).create_response(request_id)
                await response(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")  # the pattern bounds the number of metric series
            self.metrics.record("requests", route=route, method=scope["method"], status=str(status))
            self.metrics.record("request_seconds", seconds, route=route)
            if route not in ("/healthz", "/readyz"):
                facts = {"method": scope["method"], "route": route, "status": status, **scope["state"].get("facts", {})}
                log_event("request", request_id=request_id, milliseconds=round(1e3 * seconds, 1), **facts)
