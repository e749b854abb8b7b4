"""A data set on a real S3 server is the same as on disk, and each failure gives one clear error."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs
from s3_faults import faulty
from s3_server import IDENTITIES, S3Server

from focus_ray.data.commits import referenced_files
from focus_ray.data.images import encode_png
from focus_ray.data.read import data_fingerprint, list_categories, read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.errors import DataError
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import (
    check_access,
    create_bytes,
    list_names,
    open_filesystem,
    read_bytes,
    storage_errors,
    write_bytes,
)

pytestmark = pytest.mark.s3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "bolt"
    images = np.random.default_rng(0).integers(0, 256, (7, 12, 16, 3), dtype=np.uint8)
    names = [*(f"train/good/{number:03}.png" for number in range(4)), "test/good/000.png", "test/crack/000.png"]
    for name, image in zip(names, images, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_png(image))
    (root / "ground_truth/crack").mkdir(parents=True)
    (root / "ground_truth/crack/000_mask.png").write_bytes(encode_png(images[6, :, :, 0] > 200))
    (root / "train/good/broken.png").write_bytes(b"")
    return root


def use_identity(monkeypatch: pytest.MonkeyPatch, server: S3Server, identity: str) -> None:
    for name, value in server.environment(identity).items():
        monkeypatch.setenv(name, value)


def test_a_data_set_on_s3_equals_the_one_on_disk(s3: S3Server, source: Path, tmp_path: Path) -> None:
    uri = s3.new_uri()
    remote, local = (ingest(source, root, progress=False) for root in (uri, tmp_path / "local"))
    assert (remote, remote.exit_status) == (local, 3)
    assert list_categories(uri) == ["bolt"]
    assert read_index(uri, "bolt").equals(read_index(tmp_path / "local", "bolt"))
    rows = [list(read_rows(root, "bolt", [0, 2, 5], SCHEMA.names)) for root in (uri, tmp_path / "local")]
    assert rows[0] == rows[1]
    assert data_fingerprint(uri, "bolt") == data_fingerprint(tmp_path / "local", "bolt")


def test_ingesting_again_replaces_only_a_changed_category(s3: S3Server, source: Path) -> None:
    uri = s3.new_uri()
    first = ingest(source, uri, progress=False)
    again = ingest(source, uri, progress=False)
    assert ([item.status for item in again.categories], again.rejects) == (["unchanged"], first.rejects)
    (source / "train/good/broken.png").unlink()
    (source / "train/good/003.png").unlink()
    assert ingest(source, uri, progress=False).categories[0].status == "written"
    assert read_index(uri, "bolt").num_rows == 5
    filesystem, path = open_filesystem(uri)
    files = [info for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)) if info.is_file]
    with filesystem.open_input_file(f"{path}/category=bolt/_commit.json") as stream:
        commit = json.loads(stream.read())
    dropped = {entry["name"] for entry in commit["dropped"]}
    version_files = [info.base_name for info in files if "/_commits/" in info.path or "/_claims/" in info.path]
    # a part file, an index and a manifest; the same of the old version; two commits and a claim
    assert (len(referenced_files(commit)), len(dropped), len(version_files)) == (3, 3, 3)
    assert {info.base_name for info in files} == {"_commit.json", *referenced_files(commit), *dropped, *version_files}


def test_an_identity_with_read_access_can_read_and_gets_an_error_when_it_writes(
    s3: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.new_uri()
    ingest(source, uri, progress=False)
    use_identity(monkeypatch, s3, "reader")
    assert read_index(uri, "bolt").num_rows == 6
    (source / "train/good/000.png").unlink()
    with pytest.raises(DataError, match=r"S3 bucket 'focus-ray-tests', key '\w+/_write_check-.*cannot write: access"):
        ingest(source, uri, progress=False)
    assert read_index(uri, "bolt").num_rows == 6


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "not-the-secret"), ("AWS_ACCESS_KEY_ID", "nobody")]
)
def test_the_error_for_wrong_credentials_names_the_bucket_and_the_variables(
    s3: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    uri = s3.new_uri()
    ingest(source, uri, progress=False)
    monkeypatch.setenv(name, value)
    for action in (
        list_categories,
        lambda uri: read_index(uri, "bolt"),
        lambda uri: ingest(source, uri, progress=False),
    ):
        with pytest.raises(DataError, match=r"S3 bucket 'focus-ray-tests', key .*AWS_SECRET_ACCESS_KEY") as raised:
            action(uri)
        assert "not-the-secret" not in str(raised.value)


def test_the_error_for_an_unreachable_server_names_its_address(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with pytest.raises(DataError, match=r"at http://127.0.0.1:1: .*AWS_ENDPOINT_URL"):
        list_categories(s3.new_uri())


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", "bucket does not exist"),
        ("AWS Error UNKNOWN (HTTP status 301) PermanentRedirect", "AWS_REGION"),
        ("AWS Error SLOW_DOWN during PutObject operation", "the request failed"),
    ],
)
def test_errors_that_the_test_server_never_sends_are_explained(text: str, advice: str) -> None:
    # SeaweedFS creates a missing bucket if the identity may, and has a single region.
    message = rf"S3 bucket 'b', key 'data/x' at .*: cannot write: .*{advice}.*{re.escape(text)}"
    with pytest.raises(DataError, match=message), storage_errors("write", "s3://b/data", "b/data/x"):
        raise OSError(text)


def test_a_missing_category_is_refused_with_the_available_ones(s3: S3Server, source: Path) -> None:
    uri = s3.new_uri()
    with pytest.raises(DataError, match="no data set here"):
        read_index(uri, "bolt")
    ingest(source, uri, progress=False)
    with pytest.raises(DataError, match=r"no category 'nut'.*: bolt"):
        read_index(uri, "nut")


def test_a_pickled_filesystem_contains_no_secret(s3: S3Server) -> None:
    filesystem, _ = open_filesystem(s3.new_uri())
    assert IDENTITIES["admin"][1].encode() not in pickle.dumps(filesystem)


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket/data?endpoint_override=http://other"])
def test_s3_uris_without_a_bucket_or_with_a_query_are_refused(uri: str) -> None:
    with pytest.raises(DataError, match="s3://bucket/prefix"):
        open_filesystem(uri)


def test_the_access_check_leaves_no_file_and_needs_no_folder(s3: S3Server) -> None:
    uri = s3.new_uri()
    check_access(uri)
    filesystem, path = open_filesystem(uri)
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    assert [info.path for info in entries if info.is_file] == []


def test_the_access_check_names_bucket_key_and_action(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.new_uri()
    use_identity(monkeypatch, s3, "reader")
    check_access(uri, ["list"])
    with pytest.raises(
        DataError, match=r"S3 bucket 'focus-ray-tests', key '\w+/_probe-\w+' at .*: cannot write: access"
    ):
        check_access(uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(DataError, match=r"cannot list: .*credentials"):
        check_access(uri, ["list"])


def test_the_access_check_of_an_unreachable_server_takes_seconds(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"at http://127.0.0.1:1: cannot write: no connection"):
        check_access(s3.new_uri())
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("on_s3", [True, False])
def test_an_existing_file_is_not_created_again(s3: S3Server, tmp_path: Path, on_s3: bool) -> None:
    uri = f"{s3.new_uri() if on_s3 else tmp_path}/once"
    assert create_bytes(uri, b"first")
    assert not create_bytes(uri, b"second")


def test_a_writer_recognises_its_own_object_after_a_lost_response(s3: S3Server) -> None:
    uri = f"{s3.new_uri()}/once"
    assert create_bytes(uri, b"content of this writer")
    assert create_bytes(uri, b"content of this writer")  # like a retry after a PUT whose response was lost


@pytest.mark.parametrize("value", ["0", "many"])
def test_an_invalid_number_of_attempts_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", value)
    with pytest.raises(DataError, match=f"AWS_MAX_ATTEMPTS='{value}'"):
        list_categories(s3.new_uri())


def test_both_clients_retry_throttled_requests_also_in_another_process(s3: S3Server) -> None:
    with faulty(s3.endpoint, share=0.3) as proxy:
        code = (
            "import pickle, sys; from focus_ray.storage.files import *\n"
            "filesystem, path = open_filesystem(sys.argv[1])\n"
            "filesystem = pickle.loads(pickle.dumps(filesystem))\n"
            "for n in range(20):\n"
            "    write_file(filesystem, f'{path}/{n}', b'x' * n)\n"
            "    assert read_file(filesystem, f'{path}/{n}') == b'x' * n\n"
            "    assert create_bytes(f'{sys.argv[1]}/c{n}', str(n).encode())\n"
        )
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        uri = s3.new_uri()
        process = subprocess.run(
            [sys.executable, "-c", code, uri], env=environment, capture_output=True, text=True, timeout=120
        )
    assert process.returncode == 0, process.stderr[-2000:]
    assert proxy.refused > 5
    assert len(list_names(uri)) == 40


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
