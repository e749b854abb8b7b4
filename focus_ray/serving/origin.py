"""Which web pages may ask the service: its own page alone. Programs other than browsers send neither header and pass.

A browser adds `Sec-Fetch-Site` and `Origin` by itself, and no script can forge them. Without tokens the check of `Host` refuses
DNS rebinding, where the name of an attacker's page is made to resolve to 127.0.0.1.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers

from focus_ray.serving.problems import Problem

_OWN = ("same-origin", "none")  # none: typed into the address bar


def check_origin(headers: Headers, needs_token: bool) -> None:
    """Refuses requests of other sites' pages, and without tokens all names of the host but loopback's.

    Args:
        needs_token: whether callers authenticate. A proxy may then stand in front, so `Host` is free, and the browser's word
            `same-origin` counts where the proxy changes `Host`.

    Raises: Problem: 421 another host name, 403 another site.
    """
    hosts, sites = headers.getlist("host"), headers.getlist("sec-fetch-site")
    if not needs_token and not (hosts and all(_is_loopback_name(host) for host in hosts)):
        raise Problem(
            421,
            "wrong-host",
            "without tokens this service answers only at localhost, 127.0.0.1 or [::1]: use one of these names, or set tokens",
        )
    vouched = needs_token and sites == ["same-origin"]
    is_own = vouched or all(origin.partition("://")[2] in hosts for origin in headers.getlist("origin"))
    if not is_own or any(site not in _OWN for site in sites):
        raise Problem(
            403, "cross-site", "the page of another site may not ask this service: open the service's own page"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, is this machine's alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_loopback_name(host: str) -> bool:
    """`is_loopback` of a Host header, whose IPv6 addresses stand in brackets."""
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
    is_address = name.startswith("[") and name.endswith("]")
    return (
        is_loopback(name[1:-1] if is_address else name)
        and (":" not in name or is_address)
        and (not port or port.isdigit())
    )
