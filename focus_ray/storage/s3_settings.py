"""Settings for the connection to S3, resolved by the rules of boto3 and used by the clients of pyarrow and boto3.

The two libraries read the environment and the AWS files differently. pyarrow ignores the endpoint_url of a profile,
AWS_CA_BUNDLE, proxies and single sign-on. So boto3 resolves the settings, and both clients get the result. pyarrow finds and
renews some credentials itself (variables, the credentials file, the role of a machine). Other credentials (single sign-on, a
credential process, an assumed role) are passed to pyarrow with their current values, and are never pickled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from focus_ray.errors import DataError

ADDRESSING_VARIABLE = "FOCUS_RAY_S3_ADDRESSING"
_ADDRESSING_STYLES = ("auto", "path", "virtual")
# boto3's names of the credential sources that pyarrow also knows
_SOURCES_OF_PYARROW = {"env", "shared-credentials-file", "config-file", "iam-role", "container-role"}
_SOURCES_OF_PYARROW |= {"assume-role-with-web-identity"}
_OTHER_VARIABLES = (ADDRESSING_VARIABLE, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # that the settings depend on
_AWS_FILES = (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))


@dataclass(frozen=True)
class S3Settings:
    """The settings of connections to an S3 server, for the clients of pyarrow and boto3.

    Attributes:
        endpoint: URL of the server; None for Amazon's.
        region: None if the region has to be looked up for each bucket.
        ca_file: PEM file of certificates; None uses the certificates of the system.
        proxy: URL of the proxy; None for a direct connection.
        virtual: whether the bucket is part of the host name.
        keys: (access key, secret key, session token), only if pyarrow cannot find the credentials itself.
    """

    endpoint: str | None
    region: str | None
    ca_file: str | None
    proxy: str | None
    virtual: bool
    keys: tuple[str, str, str | None] | None = field(default=None, repr=False)

    def build_pyarrow_arguments(self) -> dict[str, Any]:
        """Returns the settings as keyword arguments for pyarrow's S3FileSystem, without endpoint and region."""
        keys = dict(zip(("access_key", "secret_key", "session_token"), self.keys or (), strict=False))
        addressing = {"force_virtual_addressing": self.virtual}
        return {**addressing, "tls_ca_file_path": self.ca_file, "proxy_options": self.proxy, **keys}


def load_s3_settings() -> S3Settings:
    """Reads the S3 settings from the current environment and AWS files. The result is cached until a variable or file changes.

    Credentials that pyarrow cannot renew are read anew at each call.

    Raises: DataError: a variable or a file has an unusable value.
    """
    files = [Path(os.environ.get(name, default)).expanduser() for name, default in _AWS_FILES]
    mtimes_ns = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in files)
    variables = {
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in _OTHER_VARIABLES or name.lower().endswith("_proxy")
    }
    settings = _resolve_s3_settings(frozenset(variables), mtimes_ns)
    # credentials that pyarrow cannot renew are temporary: resolve them each time, without the cache
    return settings if settings.keys is None else _resolve_s3_settings.__wrapped__(frozenset(), ())


@lru_cache(maxsize=8)
def _resolve_s3_settings(variables: frozenset[tuple[str, str]], mtimes_ns: tuple[int, ...]) -> S3Settings:
    """Reads the S3 settings from the environment and the AWS files with boto3.

    Args: variables, mtimes_ns: only the cache key: the variables, and the times of change of the files, that the result depends
        on.

    Raises: DataError: a variable or a file has an unusable value.
    """
    import boto3
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError
    from botocore.utils import get_environ_proxies

    style = os.environ.get(ADDRESSING_VARIABLE) or "auto"
    if style not in _ADDRESSING_STYLES:
        raise DataError(f"{ADDRESSING_VARIABLE}={style!r}: expected one of {', '.join(_ADDRESSING_STYLES)}")
    try:
        session = boto3.Session()
        profile = session._session.get_scoped_config()  # boto3 has no public call for the entries of a profile
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not endpoint and not session._session.get_config_variable("ignore_configured_endpoint_urls"):
            config = session._session.full_config
            endpoint = ConfiguredEndpointProvider(config, profile, "s3", os.environ).provide()
        region = os.environ.get("AWS_REGION") or session.region_name
        credentials = session.get_credentials()
        keys = None
        if credentials is not None and credentials.method not in _SOURCES_OF_PYARROW:
            frozen = credentials.get_frozen_credentials()
            keys = str(frozen.access_key), str(frozen.secret_key), frozen.token
    except BotoCoreError as error:
        raise DataError(
            f"the AWS settings cannot be used: {error}: correct AWS_PROFILE or the AWS configuration files"
        ) from error
    ca_file = os.environ.get("AWS_CA_BUNDLE") or profile.get("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    ca_file = ca_file or os.environ.get("SSL_CERT_FILE") or None
    if ca_file and not Path(ca_file).is_file():
        raise DataError(f"AWS_CA_BUNDLE={ca_file}: no such file: set a PEM file of certificates, or unset the variable")
    section = profile.get("s3")
    if style == "auto" and isinstance(section, dict):
        style = section.get("addressing_style", "auto")
    url = endpoint or "https://s3.amazonaws.com"
    proxies = get_environ_proxies(url)
    proxy = proxies.get(urlsplit(url).scheme) or proxies.get("all")
    return S3Settings(endpoint, region, ca_file, proxy, style == "virtual", keys)
