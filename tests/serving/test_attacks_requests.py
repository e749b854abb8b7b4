"""Attacks on the service by requests and registries: bodies, another site's page, storage that hangs, another team's images."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from serving_set import MILL, PRESS, Plant, make_plant, name_data_set
from waiting import wait_for

from focus_ray.bundle.registry import Registry, Version
from focus_ray.cli.main import main
from focus_ray.data.commits import parse_commit
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.errors import ConfigError, DataError
from focus_ray.serving.api import create_api
from focus_ray.serving.limits import DOCUMENT_LIMITS, MAX_DOCUMENT_BYTES
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import ServiceSettings, parse_settings
from focus_ray.serving.source import LOOKUP_TIMEOUT_S, LOOKUPS_PER_TEAM
from focus_ray.serving.tokens import create_token, revoke_token
from focus_ray.storage.files import join, write_bytes

LOOPBACK = "http://127.0.0.1"
ADMIN_PATHS = [
    ("PUT", "/v1/press/gear/aliases/production"),
    ("POST", "/v1/press/gear/versions/v0001/thresholds"),
]
BODILESS_PATHS = [
    ("POST", "/v1/press/gear/aliases/production/rollback"),
    ("GET", "/v1"),
    ("GET", "/v1/press/gear"),
    ("GET", "/v1/press/gear/versions"),
]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


def settings_of(plant: Plant, **changes: Any) -> ServiceSettings:
    return parse_settings({"registry": plant.registry, "tokens": plant.tokens, "refresh_s": 0.1, **changes})


def service_of(settings: ServiceSettings, source: Any = None) -> Service:
    return Service(settings, ImageScorer(settings.pool, "cpu"), source=source)


def client_of(settings: ServiceSettings, source: Any = None) -> TestClient:
    return TestClient(create_api(service_of(settings, source)), base_url=LOOPBACK, raise_server_exceptions=False)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@contextmanager
def served(service: Service) -> Iterator[int]:
    """The port of a live server on 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_api(service), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started, 10, "the server listens", 0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(plant: Plant) -> Iterator[int]:
    with served(service_of(settings_of(plant))) as number:
        yield number


# ---- bodies


def stream_body(port: int, method: str, path: str, token: str | None = None, size: int = 8 << 20) -> tuple[bytes, int]:
    """Sends an endless chunked body until the server answers. Returns: the start of the answer, and the bytes sent."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token else ""
    chunk, num_bytes_sent, answer_start = b"10000\r\n" + b" " * 65536 + b"\r\n", 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while num_bytes_sent < size:
                connection.settimeout(0.02)
                try:
                    answer_start += connection.recv(4096)
                    break
                except TimeoutError:
                    connection.settimeout(10)
                    connection.sendall(chunk)
                    num_bytes_sent += 65536
            if not answer_start:
                answer_start = connection.recv(4096)
        except ConnectionError:
            pass
    return answer_start, num_bytes_sent


@pytest.mark.parametrize(("method", "path"), [*ADMIN_PATHS, *BODILESS_PATHS])
def test_an_endless_body_without_a_token_is_refused_before_it_is_read(port: int, method: str, path: str) -> None:
    answer_start, num_bytes_sent = stream_body(port, method, path)
    assert answer_start.startswith(b"HTTP/1.1 401")
    assert num_bytes_sent < 1 << 20


@pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)
def test_an_endless_body_of_an_admin_is_refused_at_its_limit(port: int, plant: Plant, method: str, path: str) -> None:
    answer_start, num_bytes_sent = stream_body(port, method, path, plant.press_admin)
    assert answer_start.startswith(b"HTTP/1.1 413")
    assert num_bytes_sent < 1 << 20
    answer_start, _ = stream_body(port, method, path, plant.press)
    assert answer_start.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)
def test_a_stalled_body_is_ended(port: int, plant: Plant, method: str, path: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {plant.press_admin}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{{".encode())
        started = time.monotonic()
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < DOCUMENT_LIMITS.body_timeout_s + 2


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"\xff", b'{"version": 1}'])
@pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)
def test_malformed_json_is_a_401_without_a_token_a_403_without_the_scope_and_a_422_with_it(
    port: int, plant: Plant, method: str, path: str, body: bytes
) -> None:
    def status(headers: dict[str, str]) -> int:
        answer = httpx.request(
            method,
            f"{LOOPBACK}:{port}{path}",
            content=body,
            headers={"content-type": "application/json", **headers},
        )
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code

    assert [status({}), status(bearer(plant.press)), status(bearer(plant.press_admin))] == [401, 403, 422]


def test_a_json_body_needs_the_right_type_and_size(port: int, plant: Plant) -> None:
    method, path = ADMIN_PATHS[0]
    url, admin = f"{LOOPBACK}:{port}{path}", bearer(plant.press_admin)
    text = httpx.request(method, url, content=b'{"version": "v0001"}', headers={**admin, "content-type": "text/plain"})
    assert (text.status_code, "application/json" in text.json()["detail"]) == (415, True)
    padded = json.dumps({"version": "v0001"}).encode().ljust(MAX_DOCUMENT_BYTES)
    json_type = {**admin, "content-type": "application/json; charset=utf-8"}
    assert httpx.request(method, url, content=padded, headers=json_type).status_code == 200
    large = httpx.request(method, url, content=padded + b" ", headers=json_type)
    assert (large.status_code, str(MAX_DOCUMENT_BYTES) in large.json()["detail"]) == (413, True)


@pytest.mark.parametrize(
    "path",
    [
        "/v1?x=1",
        "/v1/-bad",
        "/v1/press/-bad",
        "/v1/press/gear?version=-bad",
        "/v1/press/gear/examples/notanumber",
        "/v1/press/gear/examples/-1?version=-bad&x=1",
    ],
)
def test_no_path_is_validated_before_the_token(port: int, path: str) -> None:
    assert httpx.get(f"{LOOPBACK}:{port}{path}").status_code == 401


def test_the_openapi_description_shows_the_json_bodies(plant: Plant) -> None:
    with client_of(settings_of(plant)) as client:
        paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/{team}/{category}/aliases/{alias}"]["put"]["requestBody"]
    assert body["required"] is True
    assert body["content"]["application/json"]["schema"]["required"] == ["version"]
    body = paths["/v1/{team}/{category}/versions/{version}/thresholds"]["post"]["requestBody"]
    assert set(body["content"]["application/json"]["schema"]["properties"]) == {"image_threshold", "pixel_threshold"}
    assert "requestBody" not in paths["/v1/{team}/{category}/aliases/{alias}/rollback"]["post"]


# ---- pages of other sites


def open_settings(plant: Plant) -> ServiceSettings:
    return parse_settings({"registry": plant.registry, "open_to_all": True})


def test_without_tokens_nobody_is_an_admin(plant: Plant) -> None:
    with client_of(open_settings(plant)) as client:
        assert client.get("/v1").json()["scopes"] == ["inspect", "read"]
        rollback = client.post("/v1/press/gear/aliases/production/rollback")
        promoted = client.put("/v1/press/gear/aliases/production", json={"version": "v0001"})
        thresholds = client.post("/v1/press/gear/versions/v0001/thresholds", json={"image_threshold": 1})
        assert {rollback.status_code, promoted.status_code, thresholds.status_code} == {403}


CROSS_SITE = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    {"sec-fetch-site": "anything"},
    {"sec-fetch-site": ""},
    {"origin": "https://attacker.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1:3000"},
    {"origin": "http://127.0.0.1.attacker.example"},
    {"origin": "http://localhost"},
    {"origin": "https://attacker.example", "sec-fetch-site": "none"},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_page_of_another_site_neither_reads_nor_scores_nor_changes(
    plant: Plant, headers: dict[str, str], with_tokens: bool
) -> None:
    sent_headers = {**headers, **(bearer(plant.press_admin) if with_tokens else {})}
    with client_of(settings_of(plant) if with_tokens else open_settings(plant)) as client:
        for method, path in (
            ("GET", "/v1"),
            ("GET", "/v1/press/gear"),
            ("POST", "/v1/press/gear/inspect"),
            ("POST", "/v1/press/gear/aliases/production/rollback"),
            *ADMIN_PATHS,
        ):
            answer = client.request(method, path, headers=sent_headers)
            assert (answer.status_code, answer.json()["type"]) == (403, "urn:focus-ray:cross-site"), (method, path)
        assert (
            client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200
        )
        assert client.get("/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": LOOPBACK},
        {"sec-fetch-site": "same-origin", "origin": LOOPBACK},
    ],
)
def test_the_own_page_and_programs_are_answered(plant: Plant, headers: dict[str, str]) -> None:
    with client_of(open_settings(plant)) as client:
        assert client.get("/v1", headers=headers).status_code == 200
        image = {**headers, "content-type": "image/png"}
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=image).status_code == 200


def test_the_page_works_behind_a_proxy_that_changes_the_port(plant: Plant) -> None:
    headers = {**bearer(plant.press), "host": "plant.example", "origin": "https://plant.example:8443"}
    with client_of(settings_of(plant)) as client:
        assert client.get("/v1", headers={**headers, "sec-fetch-site": "same-origin"}).status_code == 200
        assert client.get("/v1", headers={**headers, "origin": "https://plant.example"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8000", "localhost.attacker.example", "0.0.0.0", ""]
)
def test_without_tokens_another_host_name_is_refused(plant: Plant, host: str) -> None:
    with client_of(open_settings(plant)) as client:
        rebound = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        for headers in ({"host": host}, rebound):
            answer = client.get("/v1", headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (421, "urn:focus-ray:wrong-host")
    with client_of(settings_of(plant)) as client:
        assert client.get("/v1", headers={"host": host, **bearer(plant.press)}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]", "[::1]:8000"])
def test_without_tokens_loopback_names_are_accepted(plant: Plant, host: str) -> None:
    with client_of(open_settings(plant)) as client:
        assert client.get("/v1", headers={"host": host}).status_code == 200


# ---- storage that hangs


class Hanging:
    """A registry whose calls never return while `hangs`."""

    def __init__(self, root: str) -> None:
        self.registry, self.hangs, self.let_go = Registry(root), False, threading.Event()
        self.num_waiting = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.registry, name)

        def call(*arguments: Any) -> Any:
            if self.hangs:
                self.num_waiting += 1
                self.let_go.wait(60)
                raise DataError("the storage is away")
            return method(*arguments)

        return call


@pytest.fixture
def hanging(plant: Plant, tmp_path: Path) -> Iterator[Hanging]:
    root = tmp_path / "registry"
    shutil.copytree(plant.registry, root)
    source = Hanging(str(root))
    yield source
    source.hangs = False
    source.let_go.set()


def test_while_the_storage_hangs_loaded_models_answer_and_others_are_a_503(
    plant: Plant, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.serving.source.LOOKUP_TIMEOUT_S", 1.0)
    press, mill = plant.headers(plant.press), plant.headers(plant.mill)
    with client_of(settings_of(plant), hanging) as client, ThreadPoolExecutor(80) as pool:

        def inspect(path: str, headers: dict[str, str]) -> tuple[int, float]:
            started = time.monotonic()
            status = client.post(path, content=plant.images[0], headers=headers).status_code
            return status, time.monotonic() - started

        assert inspect("/v1/press/gear/inspect", press)[0] == inspect("/v1/mill/gear/inspect", mill)[0] == 200
        hanging.hangs = True
        time.sleep(0.2)  # the cached versions must be checked again
        requests = [pool.submit(inspect, f"/v1/press/no{number}/inspect", press) for number in range(60)]
        time.sleep(0.2)
        answers = [inspect("/v1/mill/gear/inspect", mill) for _ in range(10)]
        answers += [inspect("/v1/press/gear/inspect", press) for _ in range(10)]
        assert [status for status, _ in answers] == [200] * 20
        assert max(seconds for _, seconds in answers) < 1.0
        assert client.get("/readyz").status_code == 200
        refusals = [request.result() for request in requests]
        assert {status for status, _ in refusals} == {503}
        assert max(seconds for _, seconds in refusals) < 5.0
        assert hanging.num_waiting <= LOOKUPS_PER_TEAM + 8  # plus the checks in the background


def test_hanging_look_ups_of_one_team_do_not_block_another_team(
    plant: Plant, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.serving.source.LOOKUP_TIMEOUT_S", 3.0)
    look_up = hanging.registry.resolve

    def hang_for_press(team: str, category: str, ref: str = "latest") -> Version:
        if team == PRESS:
            hanging.let_go.wait(20)
        return look_up(team, category, ref)

    monkeypatch.setattr(hanging.registry, "resolve", hang_for_press)
    with client_of(settings_of(plant), hanging) as client, ThreadPoolExecutor(80) as pool:
        hanging_requests = [pool.submit(client.get, f"/v1/press/no{n}", headers=bearer(plant.press)) for n in range(70)]
        time.sleep(0.3)
        started = time.monotonic()
        assert client.get("/v1/mill/gear", headers=bearer(plant.mill)).status_code == 200
        assert time.monotonic() - started < 1.0
        assert {request.result().status_code for request in hanging_requests} == {503}


def test_readiness_answers_in_bounded_time_while_the_storage_hangs(plant: Plant, hanging: Hanging) -> None:
    hanging.hangs = True
    with client_of(settings_of(plant), hanging) as client, ThreadPoolExecutor(30) as pool:
        started = time.monotonic()
        probes = [pool.submit(client.get, "/readyz") for _ in range(30)]
        assert {probe.result().status_code for probe in probes} == {503}
        assert time.monotonic() - started < LOOKUP_TIMEOUT_S
        assert hanging.num_waiting == 1
        hanging.hangs = False
        hanging.let_go.set()
        wait_for(lambda: client.get("/readyz").status_code == 200, 5, "it is ready once the storage answers")


def test_ready_stays_true_once_a_model_has_answered(plant: Plant, hanging: Hanging) -> None:
    with client_of(settings_of(plant), hanging) as client:
        client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
        hanging.hangs = True
        time.sleep(0.2)
        started = time.monotonic()
        assert [client.get("/readyz").status_code for _ in range(3)] == [200] * 3
        assert time.monotonic() - started < 0.5


@contextmanager
def black_hole() -> Iterator[tuple[str, list[socket.socket]]]:
    """The URL of a server that takes connections and never answers."""
    connections: list[socket.socket] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.settimeout(0.1)
        ended = threading.Event()

        def take() -> None:
            while not ended.is_set():
                try:
                    connections.append(listener.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        finally:
            ended.set()
            thread.join()
            for connection in connections:
                connection.close()


def test_tokens_stay_valid_while_their_storage_never_answers(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(settings_of(plant))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with black_hole() as (url, connections):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert service.tokens is not None
        service.tokens.uri = "s3://plant/tokens.yaml"
        with TestClient(create_api(service), base_url=LOOPBACK) as client:
            wait_for(lambda: connections, 5, "the service reads the tokens")
            started = time.monotonic()
            for _ in range(20):
                assert client.get("/v1", headers=bearer(plant.press)).status_code == 200
                assert client.get("/v1").status_code == 401
            assert time.monotonic() - started < 2.0
            assert len(connections) <= 3  # one reading at a time
        assert time.monotonic() - started < 5.0  # nor does closing wait


def test_a_revoked_token_is_refused_within_the_refresh_interval_under_load(plant: Plant, tmp_path: Path) -> None:
    file = str(tmp_path / "tokens.yaml")
    token, record = create_token(file, PRESS, ["read"])
    with client_of(settings_of(plant, tokens=file, refresh_s=0.5)) as client:
        assert client.get("/v1", headers=bearer(token)).status_code == 200
        Path(file).rename(tmp_path / "away.yaml")
        time.sleep(1.0)
        assert client.get("/v1", headers=bearer(token)).status_code == 200
        (tmp_path / "away.yaml").rename(file)
        revoke_token(file, record.id)
        time.sleep(0.8)  # no request comes meanwhile
        assert client.get("/v1", headers=bearer(token)).status_code == 401


# ---- another team's images and models


def publish_naming(plant: Plant, root: Path, place: Any) -> str:
    """A registry whose press/gear names a data set. Returns: its root."""
    shutil.copytree(plant.registry, root)
    name_data_set(root, PRESS, place)
    return str(root)


def example_of(plant: Plant, registry: str, examples: Any, team: str = PRESS) -> httpx.Response:
    token = plant.press if team == PRESS else plant.mill
    with client_of(settings_of(plant, registry=registry, examples=examples)) as client:
        return client.get(f"/v1/{team}/gear/examples/0", headers=bearer(token))


@pytest.mark.parametrize(
    "form",
    [
        "{data}",
        "{data}/",
        "{data}/../{name}",
        "file://{data}",
        "{press}/../{name}",
        "{press}/link",
        "{press}2",
        "s3://x/y",
    ],
)
def test_a_manifest_that_names_a_data_set_of_another_team_shows_nothing(
    plant: Plant, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    press = tmp_path / "data-press"
    press.mkdir()
    (press / "link").symlink_to(plant.data)
    shutil.copytree(plant.data, tmp_path / "data-mill")
    (tmp_path / "data-press2").symlink_to(plant.data)
    place = form.format(data=tmp_path / "data-mill", press=press, name="data-mill")
    registry = publish_naming(plant, tmp_path / "registry", place)
    caplog.set_level("INFO", logger="focus_ray.serving")
    answer = example_of(plant, registry, {PRESS: [str(press)], MILL: [str(tmp_path / "data-mill")]})
    assert answer.status_code == 404
    assert str(tmp_path) not in answer.text
    logged_errors = [getattr(record, "facts", {}).get("error", "") for record in caplog.records]
    assert any("not below" in error for error in logged_errors)


def test_data_sets_below_an_allowed_location_are_shown(plant: Plant, tmp_path: Path) -> None:
    shutil.copytree(plant.data, tmp_path / "press" / "set")
    registry = publish_naming(plant, tmp_path / "registry", str(tmp_path / "press" / "set"))
    for allowed in (tmp_path / "press", tmp_path / "press" / "set", f"{tmp_path}/press/"):
        assert example_of(plant, registry, {PRESS: [str(allowed)]}).status_code == 200
    assert example_of(plant, registry, {MILL: [str(tmp_path / "press")]}).status_code == 404
    assert example_of(plant, registry, {PRESS: ["s3://plant/data"]}).status_code == 404


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "name in the commit"])
def test_a_data_set_with_files_in_the_folder_of_another_team_is_not_shown(
    plant: Plant, tmp_path: Path, kind: str
) -> None:
    press, mill = tmp_path / "press", tmp_path / "mill"
    shutil.copytree(plant.data, mill)
    shutil.copytree(plant.data, press)
    folder = press / "category=gear"
    if kind == "link to a folder":
        shutil.rmtree(folder)
        folder.symlink_to(mill / "category=gear")
    elif kind == "link to a file":
        part = next(folder.glob("part-*"))
        part.unlink()
        part.symlink_to(mill / "category=gear" / part.name)
    else:
        for file in (folder / COMMIT_NAME, *folder.glob("_commits/*.json")):
            commit = json.loads(file.read_text())
            for entry in (*commit["files"], commit["index"]):
                entry["name"] = f"../../mill/category=gear/{entry['name']}"
            file.write_text(json.dumps(commit))
    registry = publish_naming(plant, tmp_path / "registry", str(press))
    assert example_of(plant, registry, {PRESS: [str(press)]}).status_code in (404, 503)


@pytest.mark.parametrize("name", ["../part.parquet", "a/b", "/etc/passwd", "..", "a\\b", "", 7])
def test_a_commit_that_names_a_file_outside_its_folder_is_refused(plant: Plant, name: Any) -> None:
    content = json.loads((Path(plant.data) / "category=gear" / COMMIT_NAME).read_text())
    for changed in (
        {**content, "files": [{**content["files"][0], "name": name}]},
        {**content, "index": {**content["index"], "name": name}},
    ):
        with pytest.raises(DataError, match="not a commit file"):
            parse_commit(json.dumps(changed).encode(), "root", "gear", "path")


@pytest.mark.parametrize("uri", [None, 7, "", "~nobody-of-this-name/x", "a\0b", "s3://", "ftp://x", {"a": 1}])
def test_a_manifest_without_a_valid_data_location_shows_nothing(plant: Plant, tmp_path: Path, uri: Any) -> None:
    registry = publish_naming(plant, tmp_path / "registry", uri)
    assert example_of(plant, registry, {PRESS: [str(tmp_path)]}).status_code == 404


@pytest.mark.parametrize(
    "uri", ["s3://plant/press/../mill", "s3://plant/press2", "s3://plant/press/./../mill", "s3://plant"]
)
def test_no_s3_key_leaves_its_prefix(plant: Plant, tmp_path: Path, uri: str) -> None:
    registry = publish_naming(plant, tmp_path / "registry", uri)
    assert example_of(plant, registry, {PRESS: ["s3://plant/press"]}).status_code == 404


def test_a_registry_shows_no_examples_without_an_allow_list(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"examples: \{press: \[s3://plant/data/press\]\}"):
        settings_of(plant, examples=True)
    assert main(["serve", plant.registry, "examples=true"]) == 1
    assert "examples: {press:" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"examples.*ftp://x"):
        service_of(settings_of(plant, examples={PRESS: ["ftp://x"]}))
    folder = parse_settings({"bundles": plant.bundles["gear"], "open_to_all": True, "examples": True})
    with client_of(folder) as client:
        assert client.get("/v1/local/gear/examples/0").status_code == 200


def add_alias_entry(root: Path, version: str) -> None:
    entry = {"version": version, "before": [version], "action": "promoted"}
    write_bytes(join(root, PRESS, "gear", "_aliases", "evil", "00000001.json"), json.dumps(entry).encode())


def test_an_alias_that_names_the_folder_of_another_team_is_refused(plant: Plant, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    shutil.copytree(plant.registry, root)
    outside = root / PRESS / "mill" / "gear"  # where the record of the name would be read
    outside.mkdir(parents=True)
    shutil.copy(root / MILL / "gear" / "_published" / "v0001.json", outside / "v0001.json")
    (root / PRESS / "mill" / "_published").mkdir()
    add_alias_entry(root, "../../mill/gear/v0001")
    with client_of(settings_of(plant, registry=str(root))) as client:
        for path in ("/v1/press/gear?version=evil", "/v1/press/gear/aliases/evil/rollback"):
            method = "POST" if path.endswith("rollback") else "GET"
            answer = client.request(method, path, headers=bearer(plant.press_admin))
            assert answer.status_code == 404


@pytest.mark.parametrize("level", ["version", "category", "file"])
def test_a_link_to_a_model_of_another_team_is_refused(plant: Plant, tmp_path: Path, level: str) -> None:
    root = tmp_path / "registry"
    shutil.copytree(plant.registry, root)
    own_folder, other_folder = root / PRESS / "gear", root / MILL / "gear"
    if level == "category":
        shutil.rmtree(own_folder)
        own_folder.symlink_to(other_folder)
    elif level == "version":
        shutil.rmtree(own_folder / "v0001")
        (own_folder / "v0001").symlink_to(other_folder / "v0001")
    else:
        file = next((own_folder / "v0001").glob("density-*"))
        file.unlink()
        file.symlink_to(next((other_folder / "v0001").glob("density-*")))
    with client_of(settings_of(plant, registry=str(root))) as client:
        headers = plant.headers(plant.press)
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).status_code == 404


def test_the_folder_of_a_team_may_be_a_link(plant: Plant, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    shutil.copytree(plant.registry, root)
    (root / PRESS).rename(tmp_path / "other-disk")
    os.symlink(tmp_path / "other-disk", root / PRESS)
    version = Registry(root).resolve(PRESS, "gear")
    assert version == replace(version, name="v0001")
