"""Attacks on the service by requests and registries: bodies, another site's page, storage that hangs, another team's images."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving_set import (
    INSPECT,
    MILL,
    PRESS,
    TwoTeams,
    bearer_header,
    create_client,
    create_open_settings,
    create_service,
    create_settings,
    replace_data_set_uri,
    run_server,
)
from waiting import wait_for

from focus_ray.bundle.registry import Registry
from focus_ray.data.commits import parse_commit
from focus_ray.data.images import encode_png
from focus_ray.data.schema import COMMIT_NAME
from focus_ray.errors import ConfigError, DataError
from focus_ray.serving.limits import MAX_DOCUMENT_BYTES
from focus_ray.serving.settings import MIB, parse_service_settings
from focus_ray.serving.source import LOOKUPS_PER_TEAM
from focus_ray.serving.tokens import create_token, revoke_token
from focus_ray.storage.files import join_path, write_bytes

LOOPBACK = "http://127.0.0.1"
ADMIN_PATHS = [("PUT", "/v1/press/gear/aliases/production"), ("POST", "/v1/press/gear/versions/v0001/thresholds")]
ROLLBACK = ("POST", "/v1/press/gear/aliases/production/rollback")
each_admin_path = pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)


@pytest.fixture(scope="module")
def url(plant: TwoTeams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a live server, whose registry may be changed."""
    own_plant = plant.copy_registry(tmp_path_factory.mktemp("own") / "registry")
    with run_server(create_service(create_settings(own_plant))) as place:
        yield place


@pytest.fixture(scope="module")
def without_tokens(plant: TwoTeams) -> Iterator[TestClient]:
    with create_client(create_open_settings(plant)) as client:
        yield client


# ---- refused requests

PNG, JSON, FORM = "image/png", "application/json", "multipart/form-data"
PROMOTE, THRESHOLDS, OTHER_TYPE = b'{"version": "v0001"}', b'{"image_threshold": 1}', "text/plain"
UNKNOWN, INVALID, NOT_FOUND = "unknown-parameter", "invalid-request", "not-found"
BAD_TOKENS = ("", "Bearer", "Bearer x", "Basic {press}", "Bearer {press}x", "bearer frs_000000000000_" + "a" * 43)
BAD_JSON = (b"{", b"", b"[]", b"\xff", b'{"version": 1}')
BAD_THRESHOLDS = (
    b"{}",
    b'{"image_threshold": -1}',
    b'{"image_threshold": 1, "other": 2}',
    b'{"pixel_threshold": "nan"}',
)
BAD_PATHS = ("?x=1", "/-bad", "/press/-bad", "/press/gear?version=-bad", "/press/gear/examples/-1?version=-bad&x=1")
(PUT, ALIAS), (POST, THRESHOLD_PATH) = ADMIN_PATHS
# status, code, token, method, path, content, media type
REFUSALS = [
    *((401, "unauthorised", "", "GET", f"/v1{path}", b"", PNG) for path in ("", "/press", "/nobody/x/versions")),
    *((401, "unauthorised", "", "GET", f"/v1{path}", b"", PNG) for path in BAD_PATHS),  # not validated before the token
    *((401, "unauthorised", token, "GET", "/v1", b"", PNG) for token in BAD_TOKENS),
    *((401, "unauthorised", "", *path, content, JSON) for path in ADMIN_PATHS for content in BAD_JSON),
    *((403, "forbidden", "{press}", *path, content, JSON) for path in ADMIN_PATHS for content in BAD_JSON),
    *((422, INVALID, "{press_admin}", *path, content, JSON) for path in ADMIN_PATHS for content in BAD_JSON),
    *((422, INVALID, "{press_admin}", POST, THRESHOLD_PATH, content, JSON) for content in BAD_THRESHOLDS),
    (403, "forbidden", "{press}", *ROLLBACK, b"", JSON),
    (403, "forbidden", "{press_inspect_only}", "GET", "/v1/press/gear", b"", PNG),
    (415, "unsupported-media-type", "{press_admin}", PUT, ALIAS, PROMOTE, OTHER_TYPE),
    (413, "too-large", "{press_admin}", PUT, ALIAS, PROMOTE.ljust(MAX_DOCUMENT_BYTES + 1), JSON),
    (404, NOT_FOUND, "{press_admin}", POST, THRESHOLD_PATH.replace("v0001", "v0099"), THRESHOLDS, JSON),
    (422, UNKNOWN, "{press}", POST, f"{INSPECT}?versoin=candidate", b"x", PNG),
    (422, UNKNOWN, "{press}", POST, f"{INSPECT}?Version=candidate", b"x", PNG),
    (422, UNKNOWN, "{press}", "GET", "/v1/press/gear/examples/0?versions=v0001", b"", PNG),
    (422, UNKNOWN, "{press}", "GET", "/v1/press?page=2", b"", PNG),
    (422, UNKNOWN, "{press}", "GET", "/v1?team=press", b"", PNG),
    (422, UNKNOWN, "{press_admin}", PUT, f"{ALIAS}?version=v0001", PROMOTE, JSON),
    (422, "repeated-parameter", "{press}", POST, f"{INSPECT}?version=v0001&version=candidate", b"x", PNG),
    *(
        (422, INVALID, "{press}", POST, f"{INSPECT}?{query}", b"x", PNG)
        for query in ("version=../..", "output=exe", "include=all")
    ),
    (404, NOT_FOUND, "{press}", POST, f"{INSPECT}?version=v9999", b"x", PNG),
    (404, NOT_FOUND, "{press}", "GET", "/nothing", b"", PNG),
    (405, "method-not-allowed", "", "DELETE", "/healthz", b"", PNG),
    (413, "too-large", "{press}", POST, INSPECT, b"x" * (2 * MIB + 1), PNG),
    (422, "image-too-large", "{press}", POST, INSPECT, encode_png(np.zeros((1000, 1001), np.uint8)), PNG),
    (422, "image-too-large", "{press}", POST, INSPECT, encode_png(np.zeros((20_000, 20_000), np.uint8)), PNG),
    (422, "no-image", "{press}", POST, INSPECT, b"", PNG),
    (422, "image-not-an-image", "{press}", POST, INSPECT, b"no image", PNG),
    (415, "unsupported-media-type", "{press}", POST, INSPECT, b"x", OTHER_TYPE),
    (400, "bad-form", "{press}", POST, INSPECT, b"x", FORM),
    (422, "no-image", "{press}", POST, INSPECT, b"--b\r\nnothing", f"{FORM}; boundary=b"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_request_gets_a_problem_document(
    http: TestClient, plant: TwoTeams, refusal: tuple[int, str, str, str, str, bytes, str]
) -> None:
    status, code, token, method, path, content, media_type = refusal
    authorization = token.format(**vars(plant))
    if token.startswith("{"):
        authorization = f"Bearer {authorization}"
    headers = {"content-type": media_type, **({"authorization": authorization} if token else {})}
    answer = http.request(method, path, content=content, headers=headers)
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (status, f"urn:focus-ray:{code}"), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (f"{INSPECT}?versoin=candidate", "did you mean 'version'?"),
        (f"{INSPECT}?zzz=1", "include, output, version"),
        ("/v1/press/gear/aliases/x/rollback?version=1", "none"),
    ],
)
def test_the_problem_of_an_unknown_parameter_names_the_known_ones(
    http: TestClient, plant: TwoTeams, path: str, word: str
) -> None:
    assert word in http.post(path, headers=bearer_header(plant.press)).json()["detail"]


def test_the_largest_json_body_is_accepted(url: str, plant: TwoTeams) -> None:
    headers = {**bearer_header(plant.press_admin), "content-type": "application/json; charset=utf-8"}
    answer = httpx.put(f"{url}{ALIAS}", content=PROMOTE.ljust(MAX_DOCUMENT_BYTES), headers=headers)
    assert answer.status_code == 200


# ---- bodies


def stream_body(url: str, method: str, path: str, token: str | None = None) -> bytes:
    """Sends the first MiB of an endless chunked body, or less if the server answers earlier. Returns the start of the answer."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token else ""
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(16):
            if select.select([connection], [], [], 0.02)[0]:
                break
            connection.sendall(chunk)
        return connection.recv(4096)


@pytest.mark.parametrize(("method", "path"), [*ADMIN_PATHS, ROLLBACK, ("POST", INSPECT), ("GET", "/v1/press/gear")])
def test_an_endless_body_without_a_token_is_refused_before_it_is_read(url: str, method: str, path: str) -> None:
    assert stream_body(url, method, path).startswith(b"HTTP/1.1 401")


@each_admin_path
def test_an_endless_body_of_an_admin_is_refused_at_its_limit(url: str, plant: TwoTeams, method: str, path: str) -> None:
    for token, status in ((plant.press_admin, b"413"), (plant.press, b"403")):
        assert stream_body(url, method, path, token).startswith(b"HTTP/1.1 " + status)


def test_a_stalled_body_is_ended(url: str, plant: TwoTeams, monkeypatch: pytest.MonkeyPatch) -> None:
    method, path = ADMIN_PATHS[0]
    monkeypatch.setattr("focus_ray.serving.limits.DOCUMENT_TIMEOUT_S", 0.5)
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {plant.press_admin}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_the_openapi_description_shows_the_json_bodies(http: TestClient) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path, method, fields in (
        ("aliases/{alias}", "put", {"version"}),
        ("versions/{version}/thresholds", "post", {"image_threshold", "pixel_threshold"}),
    ):
        body = paths[f"/v1/{{team}}/{{category}}/{path}"][method]["requestBody"]
        assert (body["required"], body["content"]["application/json"]["schema"]["properties"].keys()) == (True, fields)
    assert "requestBody" not in paths["/v1/{team}/{category}/aliases/{alias}/rollback"]["post"]


# ---- pages of other sites

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
SAME_SITE = [
    {},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
    {"origin": LOOPBACK},
    {"sec-fetch-site": "same-origin", "origin": LOOPBACK},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize("client_name", ["http", "without_tokens"])
def test_a_page_of_another_site_neither_reads_nor_scores_nor_changes(
    plant: TwoTeams, request: pytest.FixtureRequest, headers: dict[str, str], client_name: str
) -> None:
    client = request.getfixturevalue(client_name)
    sent = {**headers, **(bearer_header(plant.press_admin) if client_name == "http" else {})}
    for method, path in (("GET", "/v1"), ("GET", "/v1/press/gear"), ("POST", INSPECT), ROLLBACK, *ADMIN_PATHS):
        answer = client.request(method, path, headers=sent)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:focus-ray:cross-site"), (method, path)
    for path in ("/", "/healthz"):
        assert client.get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", SAME_SITE)
def test_without_tokens_the_own_page_and_programs_are_answered_and_nobody_is_an_admin(
    without_tokens: TestClient, plant: TwoTeams, headers: dict[str, str]
) -> None:
    assert without_tokens.get("/v1", headers=headers).json()["scopes"] == ["inspect", "read"]
    assert [without_tokens.request(*path, headers=headers).status_code for path in (*ADMIN_PATHS, ROLLBACK)] == [
        403
    ] * 3
    answer = without_tokens.post(INSPECT, content=plant.images[0], headers={**headers, "content-type": "image/png"})
    assert answer.status_code == 200


def test_the_page_works_behind_a_proxy_that_changes_the_port(http: TestClient, plant: TwoTeams) -> None:
    headers = {**bearer_header(plant.press), "host": "plant.example", "origin": "https://plant.example:8443"}
    for change in ({"sec-fetch-site": "same-origin"}, {"origin": "https://plant.example"}):
        assert http.get("/v1", headers={**headers, **change}).status_code == 200


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *((host, False) for host in ("attacker.example", "attacker.example:8000", "localhost.attacker.example", "")),
        *((host, False) for host in ("0.0.0.0", "[::2]:80", "127.0.0.1:x")),
        *((host, True) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]", "[::1]:8000")),
    ],
)
def test_without_tokens_only_loopback_names_are_answered(
    without_tokens: TestClient, http: TestClient, plant: TwoTeams, host: str, is_loopback: bool
) -> None:
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}):
        assert without_tokens.get("/v1", headers=headers).status_code == (200 if is_loopback else 421)
    assert http.get("/v1", headers={"host": host, **bearer_header(plant.press)}).status_code == 200


# ---- storage that hangs


class HangingRegistry:
    """A registry whose calls for the teams of `hanging_teams` do not return before `may_go` is set."""

    def __init__(self, root: str) -> None:
        self.registry, self.may_go, self.num_waiting = Registry(root), threading.Event(), 0
        self.hanging_teams: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.registry, name)

        def call(*arguments: Any) -> Any:
            if self.hanging_teams and (not arguments or arguments[0] in self.hanging_teams):
                self.num_waiting += 1
                self.may_go.wait(240)
                raise DataError("the storage is away")
            return method(*arguments)

        return call


@pytest.fixture
def hanging(plant: TwoTeams) -> Iterator[HangingRegistry]:
    source = HangingRegistry(plant.registry)
    yield source
    source.hanging_teams = ()
    source.may_go.set()


@pytest.fixture
def hanging_client(plant: TwoTeams, hanging: HangingRegistry) -> Iterator[TestClient]:
    with create_client(create_service(create_settings(plant, refresh_s=0.1), source=hanging)) as client:
        yield client


def inspect(client: TestClient, plant: TwoTeams, team: str, category: str = "gear") -> int:
    """Sends an image, and returns the status of the answer."""
    headers = plant.image_headers(plant.press if team == PRESS else plant.mill)
    return client.post(f"/v1/{team}/{category}/inspect", content=plant.images[0], headers=headers).status_code


@pytest.mark.parametrize("hanging_teams", [(PRESS, MILL), (PRESS,)])
def test_while_the_storage_hangs_loaded_models_and_other_teams_answer_and_look_ups_end_with_503(
    plant: TwoTeams,
    hanging: HangingRegistry,
    hanging_client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    hanging_teams: tuple[str, ...],
) -> None:
    monkeypatch.setattr("focus_ray.serving.source.LOOKUP_TIMEOUT_S", 240.0)
    loaded_teams = (PRESS, MILL) if MILL in hanging_teams else (PRESS,)
    for team in loaded_teams:
        assert inspect(hanging_client, plant, team) == 200
    hanging.hanging_teams = hanging_teams
    time.sleep(0.2)  # the cached versions must be checked again
    with ThreadPoolExecutor(80) as pool:
        unknown = [pool.submit(inspect, hanging_client, plant, PRESS, f"no{number}") for number in range(60)]
        wait_for(lambda: hanging.num_waiting >= LOOKUPS_PER_TEAM, 60, "look-ups of unknown models hang")
        assert [inspect(hanging_client, plant, team) for team in (PRESS, MILL) for _ in range(10)] == [200] * 20
        assert hanging_client.get("/readyz").status_code == 200
        assert not any(request.done() for request in unknown)
        monkeypatch.setattr("focus_ray.serving.source.LOOKUP_TIMEOUT_S", 0.2)
        assert inspect(hanging_client, plant, PRESS, "unknown") == 503
        assert hanging.num_waiting <= LOOKUPS_PER_TEAM + 8  # plus the checks in the background
        hanging.may_go.set()
        assert {request.result() for request in unknown} == {503}


def test_readiness_answers_while_the_storage_hangs(plant: TwoTeams, hanging: HangingRegistry) -> None:
    hanging.hanging_teams = (PRESS, MILL)
    with (
        create_client(create_service(create_settings(plant), source=hanging)) as client,
        ThreadPoolExecutor(30) as pool,
    ):
        probes = [pool.submit(client.get, "/readyz") for _ in range(30)]
        assert {probe.result().status_code for probe in probes} == {503}
        assert hanging.num_waiting == 1
        hanging.hanging_teams = ()
        hanging.may_go.set()
        wait_for(lambda: client.get("/readyz").status_code == 200, 60, "the service is ready once the storage answers")


def test_tokens_stay_valid_while_their_storage_never_answers(
    plant: TwoTeams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, may_go = str(shutil.copy(plant.tokens, tmp_path)), threading.Event()
    num_reads, num_ended_reads = Counter[str](), Counter[str]()
    service = create_service(create_settings(plant, tokens=tokens))

    def hang(uri: str, **options: Any) -> bytes:
        num_reads[uri] += 1
        may_go.wait(240)
        num_ended_reads[uri] += 1
        raise DataError("the storage is away")

    monkeypatch.setattr("focus_ray.serving.tokens.read_bytes", hang)
    with create_client(service) as client:
        wait_for(lambda: num_reads[tokens], 60, "the service reads the tokens")
        for _ in range(20):
            assert client.get("/v1", headers=bearer_header(plant.press)).status_code == 200
            assert client.get("/v1").status_code == 401
    assert (num_reads[tokens], num_ended_reads[tokens]) == (
        1,
        0,
    )  # the end of the service does not wait for the storage
    may_go.set()


def test_a_revoked_token_is_refused_within_the_refresh_interval_and_a_missing_file_revokes_nothing(
    plant: TwoTeams, tmp_path: Path
) -> None:
    file, moved_file = tmp_path / "tokens.yaml", tmp_path / "moved.yaml"
    token, record = create_token(str(file), PRESS, ["read"])
    with create_client(create_settings(plant, tokens=str(file), refresh_s=0.2)) as client:
        file.rename(moved_file)
        time.sleep(0.5)
        assert client.get("/v1", headers=bearer_header(token)).status_code == 200
        moved_file.rename(file)
        revoke_token(str(file), record.id)
        revoked = lambda: client.get("/v1", headers=bearer_header(token)).status_code == 401  # noqa: E731
        wait_for(revoked, 60, "the revoked token is refused")


# ---- another team's images and models


def read_example_status(plant: TwoTeams, folder: Path, uri: Any, examples: Any) -> int:
    """Status of an example image of a copied registry whose press/gear names the data set `uri`; the answer shows no path."""
    own_plant = plant.copy_registry(folder / "registry")
    replace_data_set_uri(own_plant.registry, PRESS, uri)
    with create_client(create_settings(own_plant, examples=examples)) as client:
        answer = client.get("/v1/press/gear/examples/0", headers=bearer_header(plant.press))
    shutil.rmtree(own_plant.registry)
    assert str(folder) not in answer.text
    return answer.status_code


# data set in the manifest of press/gear; location that team press may show; status; part of the logged reason
EXAMPLES = [
    *(
        (uri, "{folder}/press", 404, "not below")
        for uri in (
            *("{folder}/mill", "{folder}/mill/", "{folder}/press/../mill", "{folder}/press/link", "{folder}/press2"),
            *("file://{folder}/mill", "s3://x/y"),
        )
    ),
    *((uri, "{folder}/press", 404, "not a path") for uri in ("~nobody-of-this-name/x", "a\0b")),
    *((uri, "{folder}/press", 404, "expected a path") for uri in (None, 7, {"a": 1})),
    *((uri, "{folder}/press", 404, "") for uri in ("", "s3://", "ftp://x")),
    *(
        (f"s3://plant{key}", "s3://plant/press", 404, "")
        for key in ("/press/../mill", "/press2", "/press/./../mill", "")
    ),
    ("{folder}/press/set", "s3://plant/data", 404, "not below"),
    *(
        ("{folder}/press/set", location, 200, "")
        for location in ("{folder}/press", "{folder}/press/set", "{folder}/press/")
    ),
]


@pytest.mark.parametrize(("uri", "location", "status", "reason"), EXAMPLES)
def test_only_data_sets_below_an_allowed_location_of_the_team_are_shown(
    plant: TwoTeams,
    tmp_path: Path,
    service_log: pytest.LogCaptureFixture,
    uri: Any,
    location: str,
    status: int,
    reason: str,
) -> None:
    for folder in ("press/set", "mill"):
        shutil.copytree(plant.data, tmp_path / folder)
    for link in ("press/link", "press2"):
        (tmp_path / link).symlink_to(plant.data)
    if isinstance(uri, str):
        uri = uri.format(folder=tmp_path)
    examples = {PRESS: [location.format(folder=tmp_path)], MILL: [str(tmp_path / "press"), str(tmp_path / "mill")]}
    assert read_example_status(plant, tmp_path, uri, examples) == status
    assert reason in " ".join(getattr(record, "facts", {}).get("error", "") for record in service_log.records)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "name in the commit"])
def test_a_data_set_with_files_in_the_folder_of_another_team_is_not_shown(
    plant: TwoTeams, tmp_path: Path, kind: str
) -> None:
    press, mill = (shutil.copytree(plant.data, tmp_path / team) for team in (PRESS, MILL))
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
    assert read_example_status(plant, tmp_path, str(press), {PRESS: [str(press)]}) in (404, 503)


@pytest.mark.parametrize("name", ["../part.parquet", "a/b", "/etc/passwd", "..", "a\\b", "", 7])
def test_a_commit_that_names_a_file_outside_its_folder_is_refused(plant: TwoTeams, name: Any) -> None:
    content = json.loads((Path(plant.data) / "category=gear" / COMMIT_NAME).read_text())
    for changed in (
        {**content, "files": [{**content["files"][0], "name": name}]},
        {**content, "index": {**content["index"], "name": name}},
    ):
        with pytest.raises(DataError, match="not a commit file"):
            parse_commit(json.dumps(changed).encode(), "root", "gear", "path")


def test_only_a_folder_of_bundles_may_show_all_examples(plant: TwoTeams) -> None:
    with pytest.raises(ConfigError, match=r"examples.*ftp://x"):
        create_service(create_settings(plant, examples={PRESS: ["ftp://x"]}))
    settings = parse_service_settings({"bundles": plant.bundles["gear"], "open_to_all": True, "examples": True})
    with create_client(settings) as client:
        assert client.get("/v1/local/gear/examples/0").status_code == 200


def test_an_alias_that_names_the_folder_of_another_team_is_refused(plant: TwoTeams, tmp_path: Path) -> None:
    own_plant, root = plant.copy_registry(tmp_path / "registry"), tmp_path / "registry"
    outside = root / PRESS / "mill" / "gear"  # where the record of the name would be read
    outside.mkdir(parents=True)
    shutil.copy(root / MILL / "gear" / "_published" / "v0001.json", outside / "v0001.json")
    (root / PRESS / "mill" / "_published").mkdir()
    version = "../../mill/gear/v0001"
    entry = {"version": version, "before": [version], "action": "promoted"}
    write_bytes(join_path(root, PRESS, "gear", "_aliases", "evil", "00000001.json"), json.dumps(entry).encode())
    with create_client(create_settings(own_plant)) as client:
        for method, path in (("GET", "/v1/press/gear?version=evil"), ("POST", "/v1/press/gear/aliases/evil/rollback")):
            assert client.request(method, path, headers=bearer_header(plant.press_admin)).status_code == 404


@pytest.mark.parametrize("level", ["gear", "gear/v0001", "gear/v0001/density-*"])
def test_a_link_to_a_model_of_another_team_is_refused(plant: TwoTeams, tmp_path: Path, level: str) -> None:
    own_plant = plant.copy_registry(tmp_path / "registry")
    own, other = (next((tmp_path / "registry" / team).glob(level)) for team in (PRESS, MILL))
    if own.is_dir():
        shutil.rmtree(own)
    else:
        own.unlink()
    own.symlink_to(other)
    with create_client(create_settings(own_plant)) as client:
        assert inspect(client, plant, PRESS) == 404


def test_the_folder_of_a_team_may_be_a_link(plant: TwoTeams, tmp_path: Path) -> None:
    root = Path(plant.copy_registry(tmp_path / "registry").registry)
    (root / PRESS).rename(tmp_path / "other-disk")
    os.symlink(tmp_path / "other-disk", root / PRESS)
    assert Registry(root).resolve(PRESS, "gear").name == "v0001"
