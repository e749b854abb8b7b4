"""Authentication: bearer tokens with a team and scopes, stored as hashes in a YAML file that is read again regularly.

A token is `frs_<id>_<secret>`. The secret is 32 random bytes, so SHA-256 is sufficient; only passwords need a slow hash. Hashes
are compared in constant time. If the id is unknown, the comparison uses a hash that cannot match.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from focus_ray.errors import ConfigError, DataError
from focus_ray.serving.logs import log_event
from focus_ray.serving.settings import Name
from focus_ray.settings.sections import ConfigSection, validate_section
from focus_ray.settings.yaml_text import load_yaml
from focus_ray.storage.files import read_bytes, remove_file, write_bytes, write_bytes_if_absent

Scope = Literal["inspect", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("inspect", "read", "admin")
_TOKEN = re.compile(r"frs_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_IMPOSSIBLE_HASH = "0" * 64


class TokenRecord(ConfigSection):
    """An entry of a token file. `sha256` is the hash of the token's secret; `expires` is in UTC, null means never."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    team: Name
    scopes: tuple[Scope, ...] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime
    expires: datetime | None = None
    note: str = ""


class TokenFile(ConfigSection):
    """The content of a token file: one entry for each token that was not revoked, also if it has expired."""

    tokens: tuple[TokenRecord, ...] = ()


class Caller(ConfigSection):
    """The authenticated caller of a request, with team and scopes of the token.

    `id` is the id of the token; `team` "*" means all teams.
    """

    id: str
    team: str
    scopes: tuple[Scope, ...]


def read_tokens(uri: str) -> TokenFile:
    """Reads a token file (path or URI). Raises: ConfigError: there is no such file, it is unreadable, or not a token file."""
    try:
        content = read_bytes(uri)
    except (FileNotFoundError, DataError) as error:
        raise ConfigError(
            f"{uri}: cannot read the tokens: {error}; create the file with `focus-ray token create`"
        ) from error
    return parse_tokens(content, uri)


def parse_tokens(content: bytes, source: str) -> TokenFile:
    """Parses the content of a token file.

    Args: source: name of the file in error messages. The messages show no secret.

    Raises: ConfigError: the content is not a valid token file, or a token id occurs twice.
    """
    try:
        tree = load_yaml(content) or {}
    except yaml.YAMLError:
        raise ConfigError(f"{source}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping with the key 'tokens'")
    try:
        token_file = TokenFile.model_validate(tree)
    except ValidationError as error:
        details = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{source}: {'; '.join(details)}") from None
    ids = [token.id for token in token_file.tokens]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{source}: a token id occurs twice: remove one of the two tokens")
    return token_file


def create_token(
    uri: str, team: str, scopes: Sequence[str], expires_in: timedelta | None = None, note: str = ""
) -> tuple[str, TokenRecord]:
    """Creates a token and adds an entry with its hash to a token file; creates the file if there is none.

    Args:
        uri: path or URI of the token file.
        team: team that the token opens.
        scopes: what the token permits: inspect, read, admin.
        expires_in: time until the token expires; None: never.
        note: free text in the entry.

    Returns: the token, which is stored nowhere and cannot be shown again, and its entry.

    Raises:
        ConfigError: the file is not a token file or is locked by another process, or the team or a scope is invalid.
        DataError: the file cannot be read or written.
    """
    secret, token_id = secrets.token_urlsafe(32), secrets.token_hex(6)
    now = datetime.now(timezone.utc).replace(microsecond=0)
    expires = None if expires_in is None else now + expires_in
    fields = {"id": token_id, "team": team, "scopes": list(dict.fromkeys(scopes)), "sha256": hash_token_secret(secret)}
    record = validate_section(TokenRecord, {**fields, "created": now, "expires": expires, "note": note}, "token")
    with _lock_token_file(uri):
        try:
            tokens = parse_tokens(read_bytes(uri), uri).tokens
        except FileNotFoundError:
            tokens = ()
        _write_token_file(uri, (*tokens, record))
    return f"frs_{token_id}_{secret}", record


def revoke_token(uri: str, token_id: str) -> TokenRecord:
    """Removes a token from a token file, and returns its entry. A running service refuses the token after its next refresh.

    Raises:
        ConfigError: the file has no such token, is no token file, or is locked by another process.
        DataError: the file or its lock file cannot be written.
    """
    with _lock_token_file(uri):
        tokens = {token.id: token for token in read_tokens(uri).tokens}
        if token_id not in tokens:
            existing_ids = ", ".join(tokens) or "none"
            raise ConfigError(f"{uri}: there is no token {token_id!r}; existing tokens: {existing_ids}")
        revoked = tokens.pop(token_id)
        _write_token_file(uri, tuple(tokens.values()))
    return revoked


@contextmanager
def _lock_token_file(uri: str, timeout_s: float = 20.0) -> Iterator[None]:
    """Context manager: locks a token file with the file `<uri>.lock`, so that simultaneous changes are not lost.

    Raises:
        ConfigError: another process holds the lock for longer than `timeout_s`, which no change needs.
        DataError: the lock file cannot be written or deleted.
    """
    lock = f"{uri}.lock"
    deadline = time.monotonic() + timeout_s
    while not write_bytes_if_absent(lock, secrets.token_hex(16).encode()):
        if time.monotonic() > deadline:
            raise ConfigError(f"{lock}: another process changes the tokens; if there is none, remove this file")
        time.sleep(0.1)
    try:
        yield
    finally:
        remove_file(lock)


def hash_token_secret(secret: str) -> str:
    """Returns the SHA-256 of the secret part of a token, as hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _write_token_file(uri: str, tokens: tuple[TokenRecord, ...]) -> None:
    """Writes a token file as YAML, and replaces an existing file. Raises: DataError: the file cannot be written."""
    tree = TokenFile(tokens=tokens).model_dump(mode="json")
    write_bytes(uri, yaml.safe_dump(tree, sort_keys=False).encode())


class TokenStore:
    """The tokens of a token file in memory. If the file becomes unreadable, the last tokens stay valid, and this is logged."""

    def __init__(self, uri: str, refresh_s: float = 2.0) -> None:
        """Reads the token file.

        Args:
            uri: path or URI of the token file.
            refresh_s: seconds between two reads by `refresh_regularly`.

        Raises: ConfigError: the file cannot be read, or is not a token file.
        """
        self.uri, self.refresh_s = uri, refresh_s
        self._content: bytes | None = None
        self._by_id = {token.id: token for token in read_tokens(uri).tokens}

    async def refresh_regularly(self) -> None:
        """Reads the file every `refresh_s` seconds in a thread, so that no request waits for it, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        try:
            while True:
                started = loop.time()
                await loop.run_in_executor(thread, self.refresh)
                await asyncio.sleep(max(0.0, started + self.refresh_s - loop.time()))
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def refresh(self) -> None:
        """Reads the token file again and replaces the tokens. Logs errors. It blocks, so call it in a thread."""
        try:
            content = read_bytes(self.uri, is_quick=True)
            if content != self._content:
                self._by_id = {token.id: token for token in parse_tokens(content, self.uri).tokens}
                self._content = content
        except Exception as error:  # any error: the next read must still happen
            log_event(
                "the tokens could not be read again, the previous ones stay valid",
                level=logging.ERROR,
                error=str(error),
            )

    def authenticate_caller(self, authorization: str | None) -> Caller | None:
        """Returns the caller with the token of an Authorization header; None if the token is missing, invalid or expired."""
        scheme, _, value = (authorization or "").partition(" ")
        match = _TOKEN.fullmatch(value.strip()) if scheme.lower() == "bearer" else None
        record = self._by_id.get(match[1]) if match else None
        expected_hash = record.sha256 if record else _IMPOSSIBLE_HASH
        is_secret_right = hmac.compare_digest(hash_token_secret(match[2] if match else ""), expected_hash)
        if record is None or not is_secret_right:
            return None
        if record.expires is not None and record.expires <= datetime.now(timezone.utc):
            return None
        return Caller(id=record.id, team=record.team, scopes=record.scopes)
