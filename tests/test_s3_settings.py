"""The S3 settings are the same for both clients, and errors contain the explanation of the server."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from focus_ray.errors import DataError, StorageError
from focus_ray.storage import files as storage
from focus_ray.storage.files import file_exists, open_filesystem
from focus_ray.storage.s3_settings import ADDRESSING_VARIABLE, load_s3_settings


@pytest.fixture(autouse=True)
def aws_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Removes all variables for S3, and returns an empty folder for the AWS files."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._make_boto_client.cache_clear()
    return tmp_path


def client_endpoint() -> str:
    return str(storage._open_boto_client("plant").meta.endpoint_url)


def test_both_clients_use_the_endpoint_of_a_profile(aws_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (aws_folder / "config").write_text(
        "[profile plant]\nregion = eu-1\nendpoint_url = http://plain:9000\nservices = own\n"
        "[services own]\ns3 =\n  endpoint_url = http://minio:9000\n"
    )
    (aws_folder / "credentials").write_text("[plant]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_PROFILE", "plant")
    settings = load_s3_settings()
    assert (settings.endpoint, settings.region, settings.keys) == ("http://minio:9000", "eu-1", None)
    filesystem, _ = open_filesystem("s3://plant/parts")
    assert "minio:9000" in str(filesystem.__reduce__())
    assert client_endpoint() == "http://minio:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:1")
    assert load_s3_settings().endpoint == client_endpoint() == "http://other:1"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert load_s3_settings().endpoint is None


def test_credentials_that_only_boto3_finds_are_passed_to_pyarrow_and_not_pickled(
    aws_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = '{"Version": 1, "AccessKeyId": "visible", "SecretAccessKey": "topsecret", "SessionToken": "passing"}'
    (aws_folder / "give.sh").write_text(f"#!/bin/sh\necho '{keys}'\n")
    (aws_folder / "give.sh").chmod(0o700)
    (aws_folder / "config").write_text(
        f"[profile plant]\nregion = eu-1\ncredential_process = {aws_folder / 'give.sh'}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "plant")
    settings = load_s3_settings()
    assert settings.keys == ("visible", "topsecret", "passing")
    assert settings.build_pyarrow_arguments()["session_token"] == "passing"
    assert "topsecret" not in repr(settings)
    filesystem, _ = open_filesystem("s3://plant/parts")
    assert "topsecret" not in str(filesystem.__reduce__())


def test_both_clients_use_certificates_and_proxies(aws_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = aws_folder / "ca.pem"
    certificates.write_text("")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.plant:9000")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
    assert load_s3_settings().ca_file == str(certificates)
    assert load_s3_settings().build_pyarrow_arguments()["tls_ca_file_path"] == str(certificates)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(aws_folder / "nowhere.pem"))
    with pytest.raises(DataError, match=r"AWS_CA_BUNDLE=.*nowhere\.pem"):
        load_s3_settings()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert load_s3_settings().build_pyarrow_arguments()["proxy_options"] == "http://proxy:3128"
    monkeypatch.setenv("NO_PROXY", ".plant")
    assert load_s3_settings().proxy is None


def test_the_bucket_may_be_part_of_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    assert not load_s3_settings().virtual
    monkeypatch.setenv(ADDRESSING_VARIABLE, "virtual")
    assert load_s3_settings().build_pyarrow_arguments()["force_virtual_addressing"] is True
    assert storage._open_boto_client("plant").meta.config.s3["addressing_style"] == "virtual"
    monkeypatch.setenv(ADDRESSING_VARIABLE, "diagonal")
    with pytest.raises(DataError, match="FOCUS_RAY_S3_ADDRESSING='diagonal'"):
        load_s3_settings()


class _RefusingHandler(BaseHTTPRequestHandler):
    """Refuses every request like S3: a HEAD without a body, and a GET with the reason."""

    reason: tuple[int, str, str] = (403, "AccessDenied", "")

    def do_GET(self) -> None:
        body = f"<Error><Code>{self.reason[1]}</Code><Message>{self.reason[2]}</Message></Error>".encode()
        body = b"" if self.command == "HEAD" else body
        self.send_response(self.reason[0])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None: ...


REASONS = {
    (403, "RequestTimeTooSkewed", "The difference is too large"): "clock",
    (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-1'"): "set AWS_REGION",
    (301, "PermanentRedirect", "use the other endpoint"): "set AWS_REGION",
    (403, "QuotaExceeded", "Bucket quota exceeded"): "quota",
    (403, "AccessDenied", "no policy allows it"): "access denied: set AWS_ACCESS_KEY_ID",
}


def test_the_error_contains_the_reason_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _RefusingHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}", "ACCESS_KEY_ID": "a"}
        for name, value in {**variables, "SECRET_ACCESS_KEY": "b", "MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        for reason, advice in REASONS.items():
            monkeypatch.setattr(_RefusingHandler, "reason", reason)
            with pytest.raises(StorageError, match=advice) as raised:
                file_exists("s3://plant/parts/data.json")
            assert "S3 bucket 'plant', key 'parts/data.json'" in str(raised.value)
            assert ("access denied: set" in str(raised.value)) == (reason[1] == "AccessDenied")
        server.shutdown()
