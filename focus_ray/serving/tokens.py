"""Who may ask what: bearer tokens of a team with scopes, kept as hashes in a YAML file that is read again when it changes.

A token is `frs_<id>_<secret>`; the secret is 32 random bytes, so a plain SHA-256 of it is as good as a slow hash would be
for a password. Hashes are compared in constant time, with one that cannot match where the id is unknown.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Literal

import yaml
from pydantic import Field

from focus_ray.config import Section, parse_model
from focus_ray.errors import ConfigError, DataError
from focus_ray.serving.settings import Name
from focus_ray.storage import create_bytes, read_bytes, remove_file, write_bytes
from focus_ray.yaml_text import load_yaml

Scope = Literal["inspect", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("inspect", "read", "admin")
_TOKEN = re.compile(r"frs_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_HASH = "0" * 64


class Token(Section):
    """What is kept of a token. sha256: of its secret.  expires: UTC; null never."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    team: Name
    scopes: tuple[Scope, ...] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: datetime
    expires: datetime | None = None
    note: str = ""


class TokenFile(Section):
    tokens: tuple[Token, ...] = ()


class Caller(Section):
    """Who asks. id: the token's."""

    id: str
    team: str
    scopes: tuple[Scope, ...]


def read_tokens(uri: str) -> TokenFile:
    """Raises: ConfigError: no such file, or not a token file."""
    try:
        content = read_bytes(uri)
    except (FileNotFoundError, DataError) as error:
        raise ConfigError(f"{uri}: cannot read the tokens: {error}; `focus-ray token create` makes the file") from error
    return parse_tokens(content, uri)


def parse_tokens(content: bytes, source: str) -> TokenFile:
    """Raises: ConfigError: not a token file; no part of it is shown, for it may be a secret in the wrong place."""
    try:
        tree = load_yaml(content) or {}
    except yaml.YAMLError:
        raise ConfigError(f"{source}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping with the key 'tokens'")
    found = parse_model(TokenFile, tree, source)
    ids = [token.id for token in found.tokens]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{source}: a token id is there twice; remove one of the two")
    return found


def create_token(
    uri: str, team: str, scopes: Sequence[str], expires_in: timedelta | None = None, note: str = ""
) -> tuple[str, Token]:
    """Adds a token to the file, which is made where there is none.

    Returns: the token, which is kept nowhere and cannot be shown again, and its record.

    Raises: ConfigError: the file is not a token file, or a name or scope cannot be.
    """
    secret, token_id = secrets.token_urlsafe(32), secrets.token_hex(6)
    now = datetime.now(timezone.utc).replace(microsecond=0)
    record = parse_model(
        Token,
        {
            "id": token_id,
            "team": team,
            "scopes": list(dict.fromkeys(scopes)),
            "sha256": hash_secret(secret),
            "created": now,
            "expires": None if expires_in is None else now + expires_in,
            "note": note,
        },
        "token",
    )
    with _alone_at(uri):
        try:
            former = parse_tokens(read_bytes(uri), uri)
        except FileNotFoundError:
            former = TokenFile()
        _write(uri, TokenFile(tokens=(*former.tokens, record)))
    return f"frs_{token_id}_{secret}", record


def revoke_token(uri: str, token_id: str) -> Token:
    """Takes a token out of the file. Raises: ConfigError: it is not there."""
    with _alone_at(uri):
        former = read_tokens(uri)
        found = [token for token in former.tokens if token.id == token_id]
        if not found:
            there = ", ".join(token.id for token in former.tokens) or "none"
            raise ConfigError(f"{uri}: no token {token_id!r}; there are {there}")
        _write(uri, TokenFile(tokens=tuple(token for token in former.tokens if token.id != token_id)))
    return found[0]


@contextmanager
def _alone_at(uri: str, patience_s: float = 20.0) -> Iterator[None]:
    """Two that change the file at once do so one after the other, so that neither's change is lost.

    Raises: ConfigError: another holds it for longer than any change takes.
    """
    lock = f"{uri}.lock"
    until = time.monotonic() + patience_s
    while not create_bytes(lock, secrets.token_hex(16).encode()):
        if time.monotonic() > until:
            raise ConfigError(f"{lock}: another change of the tokens is under way; if none is, remove this file")
        time.sleep(0.1)
    try:
        yield
    finally:
        remove_file(lock)


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _write(uri: str, content: TokenFile) -> None:
    write_bytes(uri, yaml.safe_dump(content.model_dump(mode="json"), sort_keys=False).encode())


class TokenStore:
    """The tokens in force. A file that turns unreadable leaves the former ones in force, and is told to `log`."""

    def __init__(self, uri: str, refresh_s: float = 2.0, log: Callable[[str], None] = lambda message: None) -> None:
        """Raises: ConfigError: the file cannot be read at the start."""
        self.uri, self.refresh_s, self.log = uri, refresh_s, log
        self._content: bytes | None = None
        self._by_id = _index(read_tokens(uri))

    async def refresh_regularly(self) -> None:
        """Reads the file every `refresh_s`, on a thread of its own, until it is cancelled; no request waits for it."""
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
        """Reads the file again, blocking; call it in a thread."""
        try:
            content = read_bytes(self.uri, is_quick=True)
            if content == self._content:
                return
            self._by_id = _index(parse_tokens(content, self.uri))
            self._content = content
        except Exception as error:  # whatever it is, the next reading must come
            self.log(f"the tokens were not read again, the former ones stay in force: {error}")

    def authenticate(self, authorization: str | None) -> Caller | None:
        """The caller of an Authorization header; None where it is none, or of no token in force."""
        scheme, _, value = (authorization or "").partition(" ")
        match = _TOKEN.fullmatch(value.strip()) if scheme.lower() == "bearer" else None
        record = self._by_id.get(match[1]) if match else None
        right = hmac.compare_digest(hash_secret(match[2] if match else ""), record.sha256 if record else _NO_HASH)
        if record is None or not right:
            return None
        if record.expires is not None and record.expires <= datetime.now(timezone.utc):
            return None
        return Caller(id=record.id, team=record.team, scopes=record.scopes)


def _index(content: TokenFile) -> dict[str, Token]:
    return {token.id: token for token in content.tokens}
