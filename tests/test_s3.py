"""A data set on a real S3 server is the same as on disk, and each failure gives one clear error."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made_sources import ingest_quietly, make_mvtec, save_all
from s3_faults import faulty
from s3_server import S3Server

from focus_ray.data.read import list_categories, read_index
from focus_ray.errors import DataError
from focus_ray.storage.files import (
    check_folder_access,
    explain_storage_errors,
    list_folder_entries,
    open_filesystem,
    read_bytes,
    write_bytes,
    write_bytes_if_absent,
)

pytestmark = pytest.mark.s3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_all(make_mvtec(tmp_path / "bolt"), {"train/good/broken.png": b""})


UNREACHABLE = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "2"}


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_an_identity_with_read_access_can_read_and_gets_an_error_when_it_writes(
    s3: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, new_uri = s3.new_uri(), s3.new_uri()
    ingest_quietly(source, uri)
    check_folder_access(new_uri)
    assert list_folder_entries(new_uri) == []
    set_environment(monkeypatch, s3.environment("reader"))
    check_folder_access(uri, ["list"])
    assert read_index(uri, "bolt").num_rows == 6
    (source / "train/good/000.png").unlink()
    with pytest.raises(DataError, match=r"S3 bucket 'focus-ray-tests', key '\w+/_probe-.*cannot write: access"):
        ingest_quietly(source, uri)
    assert read_index(uri, "bolt").num_rows == 6


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "not-the-secret"), ("AWS_ACCESS_KEY_ID", "nobody")]
)
def test_the_error_for_wrong_credentials_names_the_bucket_and_the_variables(
    s3: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    uri = s3.new_uri()
    ingest_quietly(source, uri)
    monkeypatch.setenv(name, value)
    for action in (
        list_categories,
        lambda uri: read_index(uri, "bolt"),
        lambda uri: ingest_quietly(source, uri),
        lambda uri: check_folder_access(uri, ["list"]),
    ):
        with pytest.raises(DataError, match=r"S3 bucket 'focus-ray-tests', key .*AWS_SECRET_ACCESS_KEY") as raised:
            action(uri)
        assert "not-the-secret" not in str(raised.value)
        assert f"(on machine {socket.gethostname()})" in str(raised.value)


def test_the_error_for_an_unreachable_server_names_its_address(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, UNREACHABLE)
    for action in (list_categories, check_folder_access):
        with pytest.raises(DataError, match=r"at http://127.0.0.1:1: .*no connection.*AWS_ENDPOINT_URL"):
            action(s3.new_uri())


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", "bucket does not exist"),
        ("AWS Error UNKNOWN (HTTP status 301) PermanentRedirect", "AWS_REGION"),
        ("AWS Error SLOW_DOWN during PutObject operation", "the request failed"),
    ],
)
def test_errors_that_the_test_server_never_sends_are_explained(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, text: str, advice: str
) -> None:
    # SeaweedFS creates a missing bucket if the identity may, and has a single region
    set_environment(monkeypatch, UNREACHABLE)
    message = rf"S3 bucket 'b', key 'data/x' at .*: cannot write: .*{advice}.*{re.escape(text)}"
    with pytest.raises(DataError, match=message), explain_storage_errors("write", "s3://b/data", "b/data/x"):
        raise OSError(text)


@pytest.mark.parametrize(
    "uri", ["s3://", "s3://bucket/data?endpoint_override=http://other", "s3://a//b", "s3://a/b//c"]
)
def test_s3_uris_without_a_bucket_with_a_query_or_an_empty_folder_name_are_refused(uri: str) -> None:
    with pytest.raises(DataError, match="s3://bucket/prefix") as raised:
        open_filesystem(uri)
    assert uri in str(raised.value)


@pytest.mark.parametrize("on_s3", [True, False])
def test_an_existing_file_is_not_created_again(s3: S3Server, tmp_path: Path, on_s3: bool) -> None:
    uri = f"{s3.new_uri() if on_s3 else tmp_path}/once"
    assert write_bytes_if_absent(uri, b"first")
    assert not write_bytes_if_absent(uri, b"second")
    if on_s3:
        assert write_bytes_if_absent(uri, b"first")  # like a retry after a PUT whose response was lost


@pytest.mark.parametrize("value", ["0", "many"])
def test_an_invalid_number_of_attempts_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", value)
    with pytest.raises(DataError, match=f"AWS_MAX_ATTEMPTS='{value}'"):
        list_categories(s3.new_uri())


REQUESTS = """
import os, pickle, sys
from focus_ray.storage.files import *
filesystem, path = open_filesystem(sys.argv[1])
sent = pickle.dumps(filesystem)
assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent
filesystem = pickle.loads(sent)
for n in range(8):
    write_file(filesystem, f"{path}/{n}", b"x" * n)
    assert read_file(filesystem, f"{path}/{n}") == b"x" * n
    assert write_bytes_if_absent(f"{sys.argv[1]}/c{n}", str(n).encode())
"""


def test_both_clients_retry_throttled_requests_also_in_another_process(s3: S3Server) -> None:
    with faulty(s3.endpoint, share=0.3) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        uri, options = s3.new_uri(), {"capture_output": True, "text": True, "timeout": 120}
        process = subprocess.run([sys.executable, "-c", REQUESTS, uri], env=environment, **options)
    assert process.returncode == 0, process.stderr[-2000:]
    assert proxy.refused > 3
    assert len(list_folder_entries(uri)) == 16


def test_a_listing_of_many_categories_takes_one_request_and_a_small_file_two(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.new_uri()
    for number in range(12):
        write_bytes(f"{uri}/category=c{number:02}/_commit.json", b"{}")
    with faulty(s3.endpoint, share=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert list_categories(uri) == [f"c{number:02}" for number in range(12)]
        assert [method for method, *_ in proxy.requests] == ["GET"]
        proxy.requests.clear()
        assert read_bytes(f"{uri}/category=c00/_commit.json") == b"{}"
        assert [method for method, *_ in proxy.requests] == ["HEAD", "GET"]
