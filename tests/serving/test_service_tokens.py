"""Tokens: stored as hashes, read again while the service runs, created and revoked by several processes at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from serving_set import bearer_header

from focus_ray.cli.main import main
from focus_ray.errors import ConfigError
from focus_ray.serving.tokens import TokenStore, create_token, read_tokens, revoke_token


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "tokens.yaml")


def find_team_of_token(store: TokenStore, token: str) -> str | None:
    caller = store.authenticate_caller(bearer_header(token)["authorization"])
    return None if caller is None else caller.team


def test_tokens_are_stored_as_hashes_and_read_again_and_expire(
    file: str, service_log: pytest.LogCaptureFixture
) -> None:
    first, record = create_token(file, "press", ["inspect", "inspect"])
    assert record.scopes == ("inspect",)
    assert first[-20:] not in Path(file).read_text()
    store = TokenStore(file)
    expired, _ = create_token(file, "press", ["read"], timedelta(seconds=-1))
    second, _ = create_token(file, "mill", ["read"])
    tokens = (first, second, expired, f"{first[:-1]}!")
    assert [find_team_of_token(store, token) for token in tokens] == ["press", None, None, None]
    store.refresh()
    assert [find_team_of_token(store, token) for token in tokens] == ["press", "mill", None, None]
    revoke_token(file, record.id)
    store.refresh()
    assert [find_team_of_token(store, token) for token in tokens] == [None, "mill", None, None]
    Path(file).write_text("tokens: [")
    store.refresh()
    assert file in service_log.records[0].facts["error"]  # type: ignore[attr-defined]
    assert find_team_of_token(store, second) == "mill"  # the last readable file stays valid


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "focus-ray token create"),
        ("a: [secret", "YAML"),
        ("tokens: []\ntokens: []", "YAML"),
        ("secret", "'tokens'"),
        ("tokens: [{id: secret}]", r"tokens\.0\.id"),
        ("twice", "twice"),
    ],
)
def test_an_invalid_token_file_is_refused_without_showing_its_content(
    file: str, content: str | None, match: str
) -> None:
    if content == "twice":
        create_token(file, "press", ["read"])
        content = yaml.safe_dump({"tokens": yaml.safe_load(Path(file).read_text())["tokens"] * 2})
    if content is not None:
        Path(file).write_text(content)
    with pytest.raises(ConfigError, match=match) as caught:
        read_tokens(file)
    assert "tokens.yaml: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unknown_token_and_an_unknown_scope_are_refused(file: str) -> None:
    Path(file).write_text("{}")
    with pytest.raises(ConfigError, match=r"'abc'.*none"):
        revoke_token(file, "abc")
    with pytest.raises(ConfigError, match=r"scopes\.0"):
        create_token(file, "press", ["all"])


def test_the_command_creates_lists_and_revokes_tokens(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["token", "create", file, "--team", "press", "--scope", "admin", "--days", "2", "--note", "cell 7"])
    token = capsys.readouterr().out.strip()
    (record,) = read_tokens(file).tokens
    assert (record.scopes, find_team_of_token(TokenStore(file), token)) == (("admin",), "press")
    main(["token", "list", file])
    listed = capsys.readouterr().out
    assert "cell 7" in listed
    assert token not in listed
    assert main(["token", "revoke", file, record.id]) == 0
    assert find_team_of_token(TokenStore(file), token) is None


def test_tokens_created_and_revoked_simultaneously_are_all_stored(file: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda number: create_token(file, f"team{number}", ["read"])[1].id, range(12)))
        list(pool.map(lambda token_id: revoke_token(file, token_id), ids[:6]))
    assert sorted(token.id for token in read_tokens(file).tokens) == sorted(ids[6:])
    assert not Path(f"{file}.lock").exists()


def test_a_stale_lock_of_the_token_file_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{file}.lock").write_text("left")
    clock = iter([0.0, 100.0])
    # only for this module: threads of other tests read the real clock
    monkeypatch.setattr(
        "focus_ray.serving.tokens.time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep)
    )
    with pytest.raises(ConfigError, match=r"tokens\.yaml\.lock"):
        create_token(file, "press", ["read"])
