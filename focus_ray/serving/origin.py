"""Refuses requests from web pages of other sites; of all web pages, only the service's own page may call the service.

Browsers add `Sec-Fetch-Site` and `Origin`, and scripts cannot forge them. Other programs send neither header and pass. Without
tokens, the check of `Host` prevents DNS rebinding: the name of an attacker's page would resolve to 127.0.0.1.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers

from focus_ray.serving.problems import HttpProblem

_ALLOWED_SITES = ("same-origin", "none")  # none: the user typed the URL


def check_same_origin(headers: Headers, needs_token: bool) -> None:
    """Refuses requests from the pages of other sites and, without tokens, requests to other host names than localhost.

    Args:
        headers: headers of the request.
        needs_token: whether callers authenticate. There may be a front proxy then, so every `Host` is allowed. If the proxy
            changes `Host`, `Sec-Fetch-Site: same-origin` of the browser is sufficient.

    Raises: Problem: 421, wrong host name. 403, the request comes from another site.
    """
    hosts, sites = headers.getlist("host"), headers.getlist("sec-fetch-site")
    if not needs_token and not (hosts and all(_is_loopback_host_header(host) for host in hosts)):
        raise HttpProblem(
            421,
            "wrong-host",
            "without tokens this service answers only at localhost, 127.0.0.1 or [::1]: use one of these names, or set tokens",
        )
    is_confirmed = needs_token and sites == ["same-origin"]
    is_same_origin = is_confirmed or all(origin.partition("://")[2] in hosts for origin in headers.getlist("origin"))
    if not is_same_origin or any(site not in _ALLOWED_SITES for site in sites):
        raise HttpProblem(
            403, "cross-site", "a page of another site may not call this service: open the page of the service itself"
        )


def is_loopback_host(host: str) -> bool:
    """Returns whether a host name or address, without a port, is localhost: only this machine can reach it."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_loopback_host_header(host: str) -> bool:
    """Returns whether the value of a `Host` header is localhost, with or without a port. An IPv6 address needs brackets."""
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    is_address = name.startswith("[") and name.endswith("]")
    return (
        is_loopback_host(name[1:-1] if is_address else name)
        and (":" not in name or is_address)
        and (not port or port.isdigit())
    )
