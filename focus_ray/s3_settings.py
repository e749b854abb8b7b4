"""How S3 is reached: settled once, by boto3's rules, for pyarrow's client and for boto3's alike.

The two read the environment and the AWS files differently: pyarrow knows neither a profile's endpoint_url, nor AWS_CA_BUNDLE,
nor proxies, nor single sign-on. So what boto3 finds is what both are given. Credentials that pyarrow finds and renews by itself
(variables, the credentials file, a machine's role) are left to it; others, of single sign-on, a process or an assumed role, are
handed over as they are at the moment, and never pickled.
"""

from __future__ import annotations

import os
import urllib.request
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from focus_ray.errors import DataError

ADDRESSING = "FOCUS_RAY_S3_ADDRESSING"
_STYLES = ("auto", "path", "virtual")
# what boto3 calls the sources that pyarrow knows too
_PYARROW_FINDS = (
    "env",
    "shared-credentials-file",
    "config-file",
    "iam-role",
    "container-role",
    "assume-role-with-web-identity",
)
_READ = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *(
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    ),
    *(
        "AWS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        ADDRESSING,
    ),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
)


@dataclass(frozen=True)
class S3Settings:
    """endpoint: None for Amazon's.  region: None where only the bucket tells.  ca_file: PEM, None for the system's.

    proxy: its URL, None for none.  virtual: whether the bucket stands in the host's name.  keys: (access, secret, session token)
    where pyarrow cannot find them itself.
    """

    endpoint: str | None
    region: str | None
    ca_file: str | None
    proxy: str | None
    virtual: bool
    keys: tuple[str, str, str | None] | None = field(default=None, repr=False)

    def for_pyarrow(self) -> dict[str, Any]:
        """Arguments of pyarrow's S3FileSystem, but for endpoint and region."""
        found: dict[str, Any] = {"force_virtual_addressing": self.virtual}
        if self.ca_file:
            found["tls_ca_file_path"] = self.ca_file
        if self.proxy:
            found["proxy_options"] = self.proxy
        if self.keys is not None:
            found.update(zip(("access_key", "secret_key", "session_token"), self.keys, strict=True))
        return found


def s3_settings() -> S3Settings:
    """As the environment and the AWS files are now. Raises: DataError: a variable that cannot be used."""
    files = [Path(os.environ.get(name, default)).expanduser() for name, default in _FILES]
    changed = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in files)
    found = _settle(tuple(os.environ.get(name) for name in _READ), changed)
    return found if found.keys is None else _settle.__wrapped__((), ())  # temporary ones are looked up every time


_FILES = (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))


@lru_cache(maxsize=8)
def _settle(environment: tuple[str | None, ...], files: tuple[int, ...]) -> S3Settings:
    import boto3
    from botocore.exceptions import BotoCoreError

    style = os.environ.get(ADDRESSING) or "auto"
    if style not in _STYLES:
        raise DataError(f"{ADDRESSING}={style!r}: expected one of {', '.join(_STYLES)}")
    try:
        session = boto3.Session()
        profile = session._session.get_scoped_config()  # no public call tells a profile's own keys
        endpoint = (
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or _of_profile(session, profile)
        )
        region = os.environ.get("AWS_REGION") or session.region_name
        credentials = session.get_credentials()
        keys = None
        if credentials is not None and credentials.method not in _PYARROW_FINDS:
            frozen = credentials.get_frozen_credentials()
            keys = str(frozen.access_key), str(frozen.secret_key), frozen.token
    except BotoCoreError as error:
        raise DataError(
            f"the AWS settings cannot be used: {error}: mend AWS_PROFILE or the AWS configuration files"
        ) from error
    ca_file = os.environ.get("AWS_CA_BUNDLE") or profile.get("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    ca_file = ca_file or os.environ.get("SSL_CERT_FILE") or None
    if ca_file and not Path(ca_file).is_file():
        raise DataError(f"AWS_CA_BUNDLE={ca_file}: no such file: give a PEM file of certificates, or leave it out")
    if style == "auto":
        style = (
            str((profile.get("s3") or {}).get("addressing_style", "auto"))
            if isinstance(profile.get("s3"), dict)
            else "auto"
        )
    return S3Settings(endpoint, region, ca_file, _proxy(endpoint), style == "virtual", keys)


def _of_profile(session: Any, profile: dict[str, Any]) -> str | None:
    """A profile's endpoint for S3, its own or that of its services section, which comes first."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    services = (session._session.full_config.get("services") or {}).get(profile.get("services"), {})
    of_s3 = services.get("s3") if isinstance(services, dict) else None
    found = of_s3.get("endpoint_url") if isinstance(of_s3, dict) else None
    return found or profile.get("endpoint_url")


def _proxy(endpoint: str | None) -> str | None:
    """What the environment sends requests to this server through."""
    target = urlsplit(endpoint or "https://s3.amazonaws.com")
    proxies = urllib.request.getproxies_environment()
    bypassed = urllib.request.proxy_bypass_environment(target.netloc, proxies)  # type: ignore[attr-defined]
    if bypassed:
        return None
    return proxies.get(target.scheme) or proxies.get("all")
