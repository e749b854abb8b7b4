"""The service without Serve: access, limits, versions, models in memory, and answers equal to those of the inspector.

The file is long, because its tests share fixtures that take seconds.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import TypeAdapter
from s3_server import S3Server
from serving_set import MILL, PRESS, Plant, make_plant
from starlette.requests import Request
from waiting import wait_for

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry, Version
from focus_ray.cli.main import main
from focus_ray.client import FoundRegion
from focus_ray.data.images import decode_batch, encode_png, read_image
from focus_ray.detect.detector import can_share_backbone_pass, score_together
from focus_ray.detect.inspection import Inspection, Region, resize_map
from focus_ray.errors import BundleError, ConfigError, DataError, RegistryError
from focus_ray.serving.api import RegionAnswer, create_api
from focus_ray.serving.batching import Batcher
from focus_ray.serving.launch import check_host
from focus_ray.serving.limits import read_body, read_content_length
from focus_ray.serving.measures import Measures
from focus_ray.serving.models import ModelCache
from focus_ray.serving.problems import Problem
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import MIB, Limits, ServiceSettings, parse_settings
from focus_ray.serving.sink import delete_old_images
from focus_ray.serving.source import FolderSource, VersionDirectory, version_key
from focus_ray.serving.tokens import TokenStore, create_token, read_tokens, revoke_token
from focus_ray.storage.files import open_filesystem


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


def settings_of(plant: Plant, **changes: Any) -> ServiceSettings:
    return parse_settings({"registry": plant.registry, "tokens": plant.tokens, "refresh_s": 0.05, **changes})


class MeasuresRecorder(Measures):
    """Records the reported metrics."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.roles: list[tuple[str, str]] = []
        self.shadows: list[bool] = []
        self.sunk: dict[str, int] = {}

    def batch(self, num_images: int, num_categories: int, num_passes: int) -> None:
        self.batches.append((num_images, num_categories, num_passes))

    def results(self, version: Version, results: Any, role: str) -> None:
        self.roles.append((role, version.name))

    def shadow_difference(self, version: Version, differs: bool, score_change: float) -> None:
        self.shadows.append(differs)

    def sink(self, outcome: str, count: int) -> None:
        self.sunk[outcome] = self.sunk.get(outcome, 0) + count


def client_of(settings: ServiceSettings, measures: Measures | None = None) -> TestClient:
    seen = measures or Measures()
    return TestClient(
        create_api(Service(settings, ImageScorer(settings.pool, "cpu", seen), seen)),
        base_url="http://127.0.0.1",  # the only host that a service without tokens answers as
        raise_server_exceptions=False,
    )


@pytest.fixture(scope="module")
def http(plant: Plant) -> Iterator[TestClient]:
    with client_of(settings_of(plant, limits={"max_body_mb": 2, "max_images": 4, "max_pixels": 1_000_000})) as client:
        yield client


# ---- answers


def test_an_answer_equals_the_inspector_and_names_its_version(http: TestClient, plant: Plant) -> None:
    expected = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]
    answer = http.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
    assert answer.status_code == 200
    body = answer.json()
    (result,) = body["results"]
    assert result["score"] == pytest.approx(expected.score, rel=1e-4)
    assert (result["anomalous"], result["threshold"]) == (expected.anomalous, expected.threshold)
    assert (result["width"], result["height"]) == (expected.width, expected.height)
    assert [region["area"] for region in result["regions"]] == [region.area for region in expected.regions]
    assert body["version"] == "v0001"
    assert body["sha256"] == read_bundle(plant.bundles["gear"]).version
    assert set(body["timings_ms"]) == {"load", "decode", "wait", "score", "judge"}


def test_a_form_with_several_images_has_a_result_or_an_error_for_each_image(http: TestClient, plant: Plant) -> None:
    files = [("images", ("a.png", plant.images[0])), ("images", ("b.png", plant.images[1][:300])), ("x", ("c", b"no"))]
    headers = {"authorization": f"Bearer {plant.press}"}
    results = http.post("/v1/press/gear/inspect", files=files, headers=headers).json()["results"]
    assert [result["name"] for result in results] == ["a.png", "b.png", "c"]
    assert [result.get("error", {}).get("reason") for result in results] == [None, "truncated", "not_an_image"]
    assert results[0]["verdict"] in ("normal", "anomalous")


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/v1/press/gear/inspect?versoin=candidate", "did you mean 'version'?"),
        ("POST", "/v1/press/gear/inspect?Version=candidate", "did you mean 'version'?"),
        ("POST", "/v1/press/gear/inspect?outputs=mask&version=v0001", "did you mean 'output'?"),
        ("POST", "/v1/press/gear/inspect?zzz=1", "this path takes include, output, version"),
        ("POST", "/v1/press/gear/inspect?version=v0001&version=candidate", "'version' occurs twice"),
        ("POST", "/v1/press/gear/inspect?versoin=", "did you mean 'version'?"),
        ("GET", "/v1/press/gear?ref=v0001", "this path takes version"),
        ("GET", "/v1/press/gear/examples/0?versions=v0001", "did you mean 'version'?"),
        ("GET", "/v1/press/gear/versions?limit=3", "this path takes none"),
        ("GET", "/v1/press?page=2", "this path takes none"),
        ("GET", "/v1?team=press", "this path takes none"),
        ("PUT", "/v1/press/gear/aliases/candidate?version=v0001", "this path takes none"),
    ],
)
def test_an_unknown_or_repeated_query_parameter_is_a_422(
    http: TestClient, plant: Plant, method: str, path: str, words: str
) -> None:
    answer = http.request(method, path, content=plant.images[0], headers=plant.headers(plant.press))
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert words in answer.json()["detail"]
    assert http.request(method, path, content=plant.images[0]).status_code == 401


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["form-data; name=images; filename*=UTF-8''Geh%C3%A4use%20%22a%22.png"], "Gehäuse _a_.png"),
        (["form-data; name=images; filename*=\"utf-8'de'a.png\""], "a.png"),
        (["form-data; name=images; filename*0=part; filename*1=.png"], "part.png"),
        (["form-data; name=images; filename*=nocharset''%ff.png"], "ÿ.png"),
        (["form-data; name=images; filename*=UTF-8''x.png; filename=y.png"], "y.png"),
        (["form-data; name=images", "Content-Type: image/png"], ""),
    ],
)
def test_a_form_part_with_an_extended_filename_or_image_type_is_a_file(
    http: TestClient, plant: Plant, lines: list[str], name: str
) -> None:
    assert len(plant.images[0]) > 4096
    head = "\r\n".join(["--b", f"Content-Disposition: {lines[0]}", *lines[1:]])
    body = head.encode() + b"\r\n\r\n" + plant.images[0] + b"\r\n--b--\r\n"
    headers = {**plant.headers(plant.press), "content-type": "multipart/form-data; boundary=b"}
    answer = http.post("/v1/press/gear/inspect", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [result["name"] for result in answer.json()["results"]] == [name]


def test_a_form_field_in_place_of_a_file_gets_advice(http: TestClient, plant: Plant) -> None:
    headers = {"authorization": f"Bearer {plant.press}"}
    files = {"images": ("a.png", plant.images[0])}
    answer = http.post("/v1/press/gear/inspect", data={"images": "x" * 5000}, files={"y": b"y"}, headers=headers)
    assert answer.status_code == 400
    assert "file name" in answer.json()["detail"]
    answer = http.post("/v1/press/gear/inspect", data={"version": "candidate"}, files=files, headers=headers)
    assert answer.status_code == 422
    assert "?version=" in answer.json()["detail"]


def test_query_and_accept_header_choose_a_picture(http: TestClient, plant: Plant) -> None:
    inspection = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]
    headers = plant.headers(plant.press)

    def ask(query: str, accept: str = "*/*") -> Any:
        return http.post(
            f"/v1/press/gear/inspect{query}", content=plant.images[0], headers={**headers, "accept": accept}
        )

    mask = ask("?output=mask")
    white = np.asarray(Image.open(io.BytesIO(mask.content)))
    assert np.array_equal(
        white > 0, resize_map(inspection.anomaly_map, inspection.height, inspection.width) > inspection.pixel_threshold
    )
    assert float(mask.headers["x-score"]) == pytest.approx(inspection.score, rel=1e-4)
    assert ask("", "image/png").content == ask("?output=heatmap").content
    assert Image.open(io.BytesIO(ask("?output=overlay").content)).size == (inspection.width, inspection.height)
    assert (ask("", "text/html").status_code, ask("", "text/html").json()["type"]) == (
        406,
        "urn:focus-ray:not-acceptable",
    )


def test_map_values_equal_the_inspector_up_to_8_bit_rounding(http: TestClient, plant: Plant) -> None:
    inspection = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]
    answer = http.post(
        "/v1/press/gear/inspect?include=map", content=plant.images[0], headers=plant.headers(plant.press)
    )
    map_values = answer.json()["results"][0]["map"]
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(map_values["png"])))) * (map_values["high"] / 255)
    assert np.abs(values - inspection.anomaly_map).max() <= map_values["high"] / 255


def test_a_model_card_shows_calibration_and_no_storage_path(http: TestClient, plant: Plant) -> None:
    answer = http.get("/v1/press/gear", headers=plant.headers(plant.press))
    card = answer.json()
    assert card["calibration"]["image_threshold"] == read_bundle(plant.bundles["gear"]).calibration.image_threshold
    assert plant.registry not in answer.text
    assert plant.data not in answer.text


def test_lists_show_teams_categories_and_versions(http: TestClient, plant: Plant) -> None:
    headers = plant.headers(plant.press)
    assert http.get("/v1", headers=headers).json() == {"teams": [PRESS], "scopes": ["inspect", "read"]}
    assert http.get("/v1/press", headers=headers).json()["categories"] == ["board", "gear"]
    body = http.get("/v1/press/gear/versions", headers=headers).json()
    assert [version["version"] for version in body["versions"]] == ["v0001"]
    assert body["aliases"] == {"latest": "v0001", "production": "v0001"}


def test_examples_are_shown_only_if_the_setting_allows_them(http: TestClient, plant: Plant) -> None:
    assert http.get("/v1/press/gear/examples/0", headers=plant.headers(plant.press)).status_code == 404
    with client_of(settings_of(plant, examples={PRESS: [plant.data]})) as client:
        shown = client.get("/v1/press/gear/examples/0", headers=plant.headers(plant.press))
        assert shown.headers["content-type"] == "image/jpeg"
        assert read_image(shown.content)[0].width == 64
        assert client.get("/v1/press/gear/examples/99", headers=plant.headers(plant.press)).status_code == 404


def test_a_folder_of_bundles_is_served_without_a_registry(plant: Plant) -> None:
    folder = str(Path(plant.bundles["gear"]).parents[1])
    settings = parse_settings({"bundles": folder, "team": "me", "open_to_all": True})
    with client_of(settings) as client:
        assert client.get("/v1").json()["teams"] == ["me"]
        assert client.get("/v1/me").json()["categories"] == ["board", "gear"]
        headers = {"content-type": "application/octet-stream"}
        body = client.post("/v1/me/board/inspect", content=plant.images[0], headers=headers).json()
        assert body["version"] == read_bundle(plant.bundles["board"]).version[:16]
    settings = parse_settings({"bundles": folder, "team": PRESS, "tokens": plant.tokens})
    with client_of(settings) as client:
        admin = {"authorization": f"Bearer {plant.press_admin}"}
        refused = client.put("/v1/press/board/aliases/x", json={"version": "latest"}, headers=admin)
        assert refused.status_code == 404
    with pytest.raises(RegistryError, match=r"'v9'.*'board'"):
        FolderSource(folder, "me").resolve("me", "board", "v9")
    with pytest.raises(RegistryError, match="a folder of bundles"):
        FolderSource(folder, "me").roll_back("me", "board", "latest")


# ---- who may ask what


def test_categories_of_other_teams_and_missing_categories_get_the_same_answer(http: TestClient, plant: Plant) -> None:
    details = []
    for team, category in ((PRESS, "gear"), (PRESS, "nothing"), ("nobody", "gear")):
        answers = [
            http.post(f"/v1/{team}/{category}/inspect", content=plant.images[0], headers=plant.headers(plant.mill)),
            http.get(f"/v1/{team}/{category}", headers=plant.headers(plant.mill)),
            http.get(f"/v1/{team}/{category}/versions", headers=plant.headers(plant.mill)),
        ]
        assert {answer.status_code for answer in answers} == {404}
        text = answers[0].json()["detail"].replace(team, "T").replace(category, "C")
        assert all(answer.json()["detail"].replace(team, "T").replace(category, "C") == text for answer in answers)
        details.append(text)
    own_detail = http.get("/v1/mill/nothing", headers=plant.headers(plant.mill)).json()["detail"]
    details.append(own_detail.replace("mill", "T").replace("nothing", "C"))
    assert len(set(details)) == 1


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer x", "Basic {press}", "Bearer {press}x", "bearer frs_000000000000_" + "a" * 43],
)
def test_without_a_valid_token_every_path_is_a_401(http: TestClient, plant: Plant, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.format(press=plant.press)}
    for path in ("/v1", "/v1/press", "/v1/press/gear", "/v1/nobody/at-all/versions"):
        answer = http.get(path, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_403_names_the_missing_scope(http: TestClient, plant: Plant) -> None:
    refused = http.get("/v1/press/gear", headers=plant.headers(plant.press_inspect_only))
    assert (refused.status_code, refused.json()["detail"]) == (
        403,
        "this token has the scopes inspect; this needs read",
    )
    assert (
        http.put(
            "/v1/press/gear/aliases/x", json={"version": "v0001"}, headers={"authorization": f"Bearer {plant.press}"}
        ).status_code
        == 403
    )


def test_tokens_are_stored_as_hashes_and_read_again_and_expire(tmp_path: Path) -> None:
    file = str(tmp_path / "tokens.yaml")
    first, record = create_token(file, "press", ["inspect", "inspect"])
    assert first.rpartition("_")[2] not in Path(file).read_text()
    store = TokenStore(file, refresh_s=0)
    assert store.authenticate(f"Bearer {first}").scopes == ("inspect",)  # type: ignore[union-attr]
    late, _ = create_token(file, "press", ["read"], timedelta(seconds=-1))
    second, _ = create_token(file, "mill", ["read"])
    assert store.authenticate(f"Bearer {second}") is None
    store.refresh()
    assert store.authenticate(f"Bearer {second}").team == "mill"  # type: ignore[union-attr]
    assert store.authenticate(f"Bearer {late}") is None
    revoke_token(file, record.id)
    store.refresh()
    assert store.authenticate(f"Bearer {first}") is None
    messages: list[str] = []
    store.log = messages.append
    Path(file).write_text("tokens: [")
    store.refresh()
    assert file in messages[0]
    assert store.authenticate(f"Bearer {second}") is not None


def test_invalid_token_files_are_refused_without_showing_their_content(tmp_path: Path) -> None:
    file = str(tmp_path / "tokens.yaml")
    with pytest.raises(ConfigError, match=r"tokens\.yaml: .*focus-ray token create"):
        read_tokens(file)
    for content, match in (
        ("a: [", "not valid YAML$"),
        ("tokens: []\ntokens: []", "not valid YAML$"),
        ("secret", "expected a mapping with the key 'tokens'"),
        ("tokens: [{id: x}]", "tokens.0.id"),
    ):
        Path(file).write_text(content)
        with pytest.raises(ConfigError, match=match):
            read_tokens(file)
    Path(file).unlink()
    _, record = create_token(file, "press", ["read"])
    tree = yaml.safe_load(Path(file).read_text())
    Path(file).write_text(yaml.safe_dump({"tokens": tree["tokens"] * 2}))
    with pytest.raises(ConfigError, match=r"tokens\.yaml: .*twice"):
        read_tokens(file)
    with pytest.raises(ConfigError, match=r"tokens\.yaml: .*twice"):
        revoke_token(file, record.id)
    Path(file).write_text("{}")
    with pytest.raises(ConfigError, match=r"'abc'.*none"):
        revoke_token(file, "abc")
    with pytest.raises(ConfigError, match=r"scopes\.0"):
        create_token(file, "press", ["all"])


def test_the_command_creates_lists_and_revokes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "tokens.yaml")
    assert (
        main(["token", "create", file, "--team", "press", "--scope", "admin", "--days", "2", "--note", "cell 7"]) == 0
    )
    token = capsys.readouterr().out.strip()
    caller = TokenStore(file).authenticate(f"Bearer {token}")
    assert caller is not None
    assert (caller.team, caller.scopes) == ("press", ("admin",))
    assert main(["token", "list", file]) == 0
    listed = capsys.readouterr().out
    assert "cell 7" in listed
    assert token not in listed
    assert main(["token", "revoke", file, caller.id]) == 0
    assert TokenStore(file).authenticate(f"Bearer {token}") is None


def test_the_command_refuses_other_hosts_without_tokens_and_missing_bundles(
    plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", plant.registry, "--host", "0.0.0.0"]) == 1
    assert "'0.0.0.0'" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert "no bundle here" in capsys.readouterr().err
    assert main(["serve", plant.bundles["gear"], "pool.memry_mb=1"]) == 1
    assert "pool.memry_mb: unknown key; did you mean 'memory_mb'?" in capsys.readouterr().err


# ---- limits


def big_png(width: int, height: int) -> bytes:
    return encode_png(np.zeros((height, width), dtype=np.uint8))


def test_requests_above_the_limits_get_a_problem_document(http: TestClient, plant: Plant) -> None:
    headers = plant.headers(plant.press)
    form = {"authorization": headers["authorization"]}

    def refused(**request: Any) -> tuple[int, str, str]:
        answer = http.post("/v1/press/gear/inspect", **request)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["request_id"] == answer.headers["x-request-id"]
        return answer.status_code, problem["type"].rpartition(":")[2], problem["detail"]

    many = [("images", (str(number), plant.images[0])) for number in range(5)]
    assert refused(files=many, headers=form)[:2] == (413, "too-many-images")
    assert refused(content=b"x" * (2 * MIB + 1), headers=headers)[:2] == (413, "too-large")
    assert refused(content=iter([b"x" * MIB] * 3), headers=headers)[:2] == (413, "too-large")
    status, code, detail = refused(content=big_png(1001, 1000), headers=headers)
    assert (status, code) == (422, "image-too-large")
    assert "1001 x 1000" in detail
    assert refused(content=big_png(20_000, 20_000), headers=headers)[:2] == (422, "image-too-large")
    assert refused(content=b"", headers=headers)[:2] == (422, "no-image")
    assert refused(content=b"no image", headers=headers)[:2] == (422, "image-not-an-image")
    assert refused(content=b"x", headers={**headers, "content-type": "text/plain"})[0] == 415
    assert refused(content=b"x", headers={**headers, "content-type": "multipart/form-data"})[:2] == (400, "bad-form")
    broken = {**headers, "content-type": "multipart/form-data; boundary=b"}
    assert refused(content=b"--b\r\nnothing", headers=broken)[:2] in ((400, "bad-form"), (422, "no-image"))
    two = [("images", (str(number), plant.images[0])) for number in range(2)]
    assert http.post("/v1/press/gear/inspect?output=mask", files=two, headers=form).status_code == 422


class Stuck(ImageScorer):
    """Scores after `may_go` is set."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(settings.pool, "cpu")
        self.may_go = threading.Event()

    async def inspect(self, *arguments: Any, **options: Any) -> Any:
        while not self.may_go.is_set():
            await asyncio.sleep(0.01)
        return await super().inspect(*arguments, **options)


@pytest.mark.parametrize(
    ("limits", "status"),
    [({"max_in_flight": 2}, 503), ({"max_in_flight_per_team": 2}, 429), ({"max_in_flight_mb": 0.02}, 503)],
)
def test_requests_above_the_limit_in_flight_get_retry_after(plant: Plant, limits: dict[str, Any], status: int) -> None:
    settings = settings_of(plant, limits={**limits, "retry_after_s": 1.5})
    stuck = Stuck(settings)
    headers = plant.headers(plant.press)
    body = plant.images[0].ljust(10_000, b"\0")  # Pillow ignores the bytes after the image
    with TestClient(create_api(Service(settings, stuck))) as client, ThreadPoolExecutor(6) as pool:
        requests = [pool.submit(client.post, "/v1/press/gear/inspect", content=body, headers=headers) for _ in range(6)]
        try:
            wait_for(
                lambda: sum(request.done() for request in requests) >= 4, 20, "four of six requests are refused", 0.01
            )
        finally:
            stuck.may_go.set()  # the pool waits for all
        statuses = sorted(request.result().status_code for request in requests)
        assert statuses[:2] == [200, 200]
        assert set(statuses[2:]) == {status}
        refused = next(request.result() for request in requests if request.result().status_code == status)
        assert refused.headers["retry-after"] == "2"
        again = client.post("/v1/press/gear/inspect", content=body, headers=headers)
        assert again.status_code == 200  # ended requests do not count any more


def test_an_answer_that_takes_too_long_is_a_504(plant: Plant) -> None:
    settings = settings_of(plant, limits={"timeout_s": 0.2})
    with TestClient(create_api(Service(settings, Stuck(settings)))) as client:
        answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
        assert (answer.status_code, answer.headers["retry-after"]) == (504, "1")


def test_a_slow_body_and_an_invalid_content_length_are_refused() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(10)
        return {}

    def request(length: bytes) -> Request:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", length)]}
        return Request(scope, receive)

    limits = Limits(body_timeout_s=0.05)
    with pytest.raises(Problem, match=r"408 body-timeout: .*0\.05 s"):
        asyncio.run(read_body(request(b"5"), limits))
    with pytest.raises(Problem, match=r"400 bad-request: .*Content-Length"):
        read_content_length(request(b"-1"), limits)
    assert read_content_length(request(b"5"), limits) == 5


def test_an_unsupported_method_is_a_405(http: TestClient) -> None:
    answer = http.delete("/healthz")
    assert (answer.status_code, answer.json()["type"]) == (405, "urn:focus-ray:method-not-allowed")
    assert answer.headers["allow"] == "GET"


MALFORMED_NAMES = (
    "..",
    "%2e%2e",
    "..%2f..",
    "a%00b",
    ".hidden",
    "-x",
    "a" * 101,
    "gear%20",
    "g\u00e9ar",
    "a%2fb",
    "%ff",
)


def test_malformed_requests_cause_no_server_error_and_reveal_no_paths(http: TestClient, plant: Plant) -> None:
    draw = random.Random(0)
    good = plant.images[0]
    headers = plant.headers(plant.press)
    counts: dict[int, int] = {}
    for number in range(1000):
        kind = number % 8
        path, content, sent = "/v1/press/gear/inspect", good, dict(headers)
        if kind == 0:  # cut short
            content = good[: draw.randrange(len(good))]
        elif kind == 1:  # changed bytes
            changed = bytearray(good)
            for _ in range(draw.randrange(1, 40)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            content = bytes(changed)
        elif kind == 2:  # no image, some with the head of one
            content = draw.choice([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"P5 900 900 255 "])
            content += draw.randbytes(draw.randrange(400))
        elif kind == 3:  # a header that claims more than there is
            content = bytearray(good)
            content[16:24] = draw.randbytes(8)
            content = bytes(content)
        elif kind == 4:  # names
            path = f"/v1/{draw.choice(MALFORMED_NAMES)}/{draw.choice(MALFORMED_NAMES)}/inspect"
        elif kind == 5:  # the wrong token
            sent["authorization"] = draw.choice(
                ["", f"Bearer {plant.mill}", f"Bearer {plant.press[:-1]}", "Bearer " + "x" * 5000]
            )
        elif kind == 6:  # headers
            sent[draw.choice(["accept", "x-request-id", "content-type", "x-a"])] = draw.choice(
                ["x" * 20_000, "\x01\x02", "multipart/form-data; boundary=" + "b" * 300, "image/png, */*;q=abc", ";;;"]
            )
        else:  # queries
            path += "?" + draw.choice(
                ["version=../..", "version=" + "v" * 200, "output=exe", "include=all", "version=v9999"]
            )
        answer = http.post(path, content=content, headers=sent)
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (number, answer.text)
        if answer.status_code == 200:
            assert kind in (0, 1, 3, 6), (number, kind)
        else:
            assert plant.registry not in answer.text
            assert "Traceback" not in answer.text
            assert answer.headers["content-type"] == "application/problem+json", answer.text
    print(counts)
    assert http.post("/v1/press/gear/inspect", content=good, headers=headers).status_code == 200


def test_every_answer_has_security_headers_and_the_request_id(http: TestClient) -> None:
    for path in ("/", "/healthz", "/nothing", "/v1"):
        answer = http.get(path, headers={"x-request-id": "line-7.42"})
        assert answer.headers["x-request-id"] == "line-7.42"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert http.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_an_unexpected_error_is_a_500_without_its_message(plant: Plant) -> None:
    class Broken(ImageScorer):
        async def inspect(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("the secret inside")

    settings = settings_of(plant)
    app = create_api(Service(settings, Broken(settings.pool, "cpu")))
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:focus-ray:internal-error")
    assert "secret" not in answer.text


def test_a_changed_bundle_is_not_served(plant: Plant, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    version = registry.publish(plant.bundles["gear"], PRESS)
    (file,) = Path(version.uri).glob("density-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    settings = settings_of(plant, registry=registry.root)
    with client_of(settings) as client:
        answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=plant.headers(plant.press))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert str(tmp_path) not in answer.text


# ---- versions


@pytest.fixture
def two_versions(plant: Plant, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    registry.publish(plant.bundles["gear"], PRESS, aliases=["candidate"])
    return registry


def test_promotion_and_rollback_change_the_version_and_fail_no_request(plant: Plant, two_versions: Registry) -> None:
    settings = settings_of(plant, registry=two_versions.root, default_ref="production")
    headers = plant.headers(plant.press)
    admin = {"authorization": f"Bearer {plant.press_admin}"}

    def ask_until(client: TestClient, version: str) -> None:
        def is_answering() -> bool:
            answer = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers)
            assert answer.status_code == 200
            return bool(answer.json()["version"] == version)

        wait_for(is_answering, 20, f"{version} answers", 0.0)

    with client_of(settings) as client:
        ask_until(client, "v0001")
        body = client.put("/v1/press/gear/aliases/production", json={"version": "candidate"}, headers=admin).json()
        assert body == {"team": PRESS, "category": "gear", "alias": "production", "version": "v0002"}
        ask_until(client, "v0002")
        assert client.post("/v1/press/gear/aliases/production/rollback", headers=admin).json()["version"] == "v0001"
        ask_until(client, "v0001")
        by_alias = client.post("/v1/press/gear/inspect?version=candidate", content=plant.images[0], headers=headers)
        assert by_alias.json()["version"] == "v0002"
        missing = client.post("/v1/press/gear/inspect?version=v0009", content=plant.images[0], headers=headers)
        assert missing.status_code == 404


def test_thresholds_of_an_admin_are_a_new_version_and_only_latest_moves(plant: Plant, two_versions: Registry) -> None:
    settings = settings_of(plant, registry=two_versions.root, default_ref="production")
    admin = {"authorization": f"Bearer {plant.press_admin}"}
    reader = {"authorization": f"Bearer {plant.press}"}
    path = "/v1/press/gear/versions/v0001/thresholds"
    with client_of(settings) as client:
        before = client.get("/v1/press/gear?version=v0001", headers=admin).json()["calibration"]
        created = client.post(path, json={"image_threshold": 2.5}, headers=admin)
        assert created.status_code == 200
        version = created.json()["version"]
        after = client.get(f"/v1/press/gear?version={version}", headers=admin).json()
        assert after["calibration"]["image_threshold"] == 2.5
        assert after["calibration"]["pixel_threshold"] == before["pixel_threshold"]
        assert any("set by hand" in line for line in after["caveats"])
        assert client.get("/v1/press/gear", headers=admin).json()["version"] == "v0001"
        for body in ({}, {"image_threshold": -1}, {"image_threshold": 1, "other": 2}, {"pixel_threshold": "nan"}):
            assert client.post(path, json=body, headers=admin).status_code == 422
        assert client.post(path, json={"image_threshold": 2}, headers=reader).status_code == 403
        gone = client.post("/v1/press/gear/versions/v0099/thresholds", json={"image_threshold": 2}, headers=admin)
        assert gone.status_code == 404
    folder = parse_settings({"bundles": plant.bundles["gear"], "team": PRESS, "tokens": plant.tokens})
    with client_of(folder) as client:
        path = "/v1/press/gear/versions/latest/thresholds"
        assert client.post(path, json={"image_threshold": 2}, headers=admin).status_code == 409


def test_a_canary_answers_its_share_and_a_shadow_never_answers(plant: Plant, two_versions: Registry) -> None:
    route = {"team": PRESS, "category": "gear", "ref": "production"}
    headers = plant.headers(plant.press)
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"canary": "candidate", "canary_share": 0.5}, {"v0001", "v0002"}),
        ({"shadow": "candidate"}, {"v0001"}),
    ]
    for change, answering in cases:
        seen = MeasuresRecorder()
        settings = settings_of(plant, registry=two_versions.root, routes=[{**route, **change}])
        with client_of(settings, seen) as client:
            answers = [
                client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).json()
                for _ in range(24)
            ]
        assert {answer["version"] for answer in answers} == answering
        assert all((answer["role"] == "canary") == (answer["version"] == "v0002") for answer in answers)
        if "shadow" in change:
            assert ("shadow", "v0002") in seen.roles
            assert seen.shadows
            assert not any(seen.shadows)  # both versions hold the same bundle


def test_while_the_storage_fails_cached_versions_answer(plant: Plant) -> None:
    class Failing:
        broken = False

        def resolve(self, team: str, category: str, ref: str = "latest") -> Version:
            if self.broken:
                raise DataError("the storage is away")
            return Registry(plant.registry).resolve(team, category, ref)

        def marks(self, team: str) -> dict[str, str]:
            return {}

    async def run() -> None:
        source, messages = Failing(), []

        async def warm(version: Version) -> None: ...

        directory = VersionDirectory(source, 0.0, warm, lambda message, **facts: messages.append(message))  # type: ignore[arg-type]
        first = await directory.resolve(PRESS, "gear", "latest")
        source.broken = True
        for _ in range(20):
            assert await directory.resolve(PRESS, "gear", "latest") == first
            await asyncio.sleep(0.005)
        assert "version not refreshed" in messages
        with pytest.raises(DataError, match="the storage is away"):
            await directory.resolve(PRESS, "board", "latest")

    asyncio.run(run())


# ---- models in memory, and passes


def test_the_model_cache_drops_the_least_recently_used_model_above_its_budget(plant: Plant, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    versions = [registry.publish(plant.bundles["gear"], f"team{number}") for number in range(5)]

    async def run() -> None:
        loads: list[str] = []
        with ThreadPoolExecutor(1) as executor:
            cache = ModelCache(10**9, "cpu", executor, on_load=lambda version, seconds: loads.append(version.team))
            model = await cache.get(versions[0])
            cache.budget_bytes = cache.num_bytes + 2 * model.num_bytes  # three, whose backbone is shared
            for number in (1, 2, 0, 3):
                await cache.get(versions[number])
            assert [key.partition("/")[0] for key in cache.loaded_keys] == ["team2", "team0", "team3"]
            assert cache.num_bytes <= cache.budget_bytes
            backbones = {id((await cache.get(versions[n])).inspector.bundle.detector.net.backbone) for n in (0, 2, 3)}
            assert len(backbones) == 1
            together = await asyncio.gather(*(cache.get(versions[4]) for _ in range(5)))
            assert len({id(model) for model in together}) == 1
            assert loads == ["team0", "team1", "team2", "team3", "team4"]

    asyncio.run(run())


def test_a_bundle_that_differs_from_the_published_one_is_refused(plant: Plant) -> None:
    version = Registry(plant.registry).resolve(PRESS, "gear")
    other = Version(PRESS, "gear", "v0001", plant.bundles["board"], version.sha256, version.published_at, 0)

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            await ModelCache(10**9, "cpu", executor).get(other)

    with pytest.raises(BundleError, match="published as v0001"):
        asyncio.run(run())


def test_two_categories_with_one_backbone_share_a_pass_with_equal_scores(plant: Plant) -> None:
    seen = MeasuresRecorder()
    scorer = ImageScorer(settings_of(plant).pool, "cpu", seen)
    versions = [Registry(plant.registry).resolve(PRESS, category) for category in ("gear", "board")]

    async def run() -> list[Any]:
        for version in versions:
            await scorer.warm(version)
        seen.batches.clear()
        hold = threading.Event()
        first = asyncio.create_task(scorer._batcher.submit(Blocker(hold), 1))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        inspections = [
            asyncio.create_task(scorer.inspect(version, plant.images[:3])) for version in versions for _ in range(2)
        ]
        await asyncio.sleep(0.5)
        hold.set()
        await asyncio.gather(first, return_exceptions=True)
        return await asyncio.gather(*inspections)

    answers = asyncio.run(run())
    assert seen.batches == [(12, 2, 1)]
    for number, version in enumerate(versions):
        expected = Inspector.load(version.uri, "cpu").inspect(plant.images[:3])
        for answer in answers[2 * number : 2 * number + 2]:
            # squares: the memory contains the training images, so their squared distances are rounding errors
            tolerance = 1e-4 * expected[0].threshold ** 2
            for result, inspection in zip(answer.results, expected, strict=True):
                assert isinstance(result, Inspection)
                assert result.score**2 == pytest.approx(inspection.score**2, rel=2e-4, abs=tolerance)


class Blocker:
    """An item that blocks the pass until `hold` is set, and then fails."""

    def __init__(self, hold: threading.Event) -> None:
        self.hold = hold

    @property
    def inspector(self) -> Any:
        self.hold.wait(20)
        raise RuntimeError("let go")


def test_detectors_with_different_backbones_share_no_pass(plant: Plant) -> None:
    gear, board = (read_bundle(plant.bundles[name]).detector for name in ("gear", "board"))
    assert not can_share_backbone_pass(gear, board)
    images = torch.from_numpy(decode_batch(plant.images, 64))
    (alone,) = score_together([(gear, images)])
    assert torch.equal(alone.score, gear(images).score)


def test_items_that_wait_are_the_next_batch_and_an_error_fails_only_its_item() -> None:
    batches: list[list[int]] = []

    def run(items: Any) -> list[int]:
        batches.append(list(items))
        time.sleep(0.02)
        if 7 in items:
            raise ValueError("seven")
        return [10 * item for item in items]

    async def ask() -> list[Any]:
        with ThreadPoolExecutor(1) as executor:
            batcher: Batcher[int, int] = Batcher(run, 8, executor)
            first = asyncio.create_task(batcher.submit(0, 1))
            await asyncio.sleep(0.005)
            next_items = [
                asyncio.create_task(batcher.submit(number, 4 if number == 9 else 1)) for number in range(1, 10)
            ]
            cancelled = asyncio.create_task(batcher.submit(99, 1))
            await asyncio.sleep(0.005)
            cancelled.cancel()
            return await asyncio.gather(first, *next_items, return_exceptions=True)

    results = asyncio.run(ask())
    assert [result for result in results if not isinstance(result, Exception)] == [0, 10, 20, 30, 40, 50, 60, 80, 90]
    assert str(results[7]) == "seven"
    assert batches[:2] == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert batches[-1] == [9]


# ---- sink


def test_the_sink_stores_a_sample_and_deletes_it_after_the_retention(plant: Plant, tmp_path: Path) -> None:
    seen = MeasuresRecorder()
    sink = {"uri": str(tmp_path), "share": 1.0, "share_anomalous": 1.0, "max_buffer_mb": 0.05}
    with client_of(settings_of(plant, sink=sink), seen) as client:
        for image in plant.images:
            client.post("/v1/press/gear/inspect", content=image, headers=plant.headers(plant.press))
    (file,) = tmp_path.glob("team=press/date=*/part-*.parquet")
    rows = pq.read_table(file, partitioning=None).to_pylist()
    assert [row["image"] for row in rows] == plant.images[: len(rows)]
    assert {(row["category"], row["version"]) for row in rows} == {("gear", "v0001")}
    assert seen.sunk == {
        "kept": len(rows),
        "written": len(rows),
        **({"dropped": 8 - len(rows)} if len(rows) < 8 else {}),
    }
    now = datetime.now(timezone.utc)
    assert delete_old_images(str(tmp_path), now - timedelta(days=1)) == []
    assert len(delete_old_images(str(tmp_path), now + timedelta(days=2))) == 1
    assert not file.exists()


def test_a_sink_that_cannot_be_written_fails_no_request(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen = MeasuresRecorder()
    with client_of(settings_of(plant, sink={"uri": str(tmp_path / "file"), "share": 1.0}), seen) as client:
        headers = plant.headers(plant.press)
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).status_code == 200
    assert seen.sunk == {"kept": 1, "delayed": 1, "failed": 1}


@pytest.mark.s3
def test_registry_tokens_and_sink_work_on_s3(s3: S3Server, plant: Plant) -> None:
    root = s3.new_uri()
    registry = Registry(f"{root}/registry")
    registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    token, _ = create_token(f"{root}/tokens.yaml", PRESS, ["inspect", "admin"])
    locations = {
        "registry": registry.root,
        "tokens": f"{root}/tokens.yaml",
        "sink": {"uri": f"{root}/sink", "share": 1.0},
    }
    headers = plant.headers(token)
    with client_of(settings_of(plant, **locations)) as client:
        body = client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).json()
        registry.publish(plant.bundles["gear"], PRESS)
        admin = {"authorization": headers["authorization"]}
        moved = client.put("/v1/press/gear/aliases/production", json={"version": "v0002"}, headers=admin)
        assert moved.json()["version"] == "v0002"
    (expected,) = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])
    slack = 1e-4 * expected.threshold**2  # near a training image, the squared distance is a rounding error
    assert body["results"][0]["score"] ** 2 == pytest.approx(expected.score**2, rel=2e-4, abs=slack)
    assert registry.aliases(PRESS, "gear")["production"] == "v0002"
    filesystem, path = open_filesystem(f"{root}/sink")
    assert pq.read_table(path, filesystem=filesystem)["image"].to_pylist() == plant.images[:1]


# ---- settings


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"registry": None}, "set either registry or bundles, and not both"),
        ({"tokens": None}, "tokens is not set"),
        ({"open_to_all": True}, "contradict each other"),
        ({"pool": {"max_batch": 1}}, r"pool\.max_batch: unknown key; did you mean 'max_batch_images'"),
        ({"pool": {"scaling": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas=3 is above max_replicas=2"),
        ({"routes": [{"team": "a", "category": "b"}] * 2}, "routes: a/b is named twice"),
        ({"pins": [{"name": "x", "team": "a", "categories": ["b", "b"]}]}, "pins: a/b is named twice"),
        ({"pins": [{"name": "x", "team": "../a", "categories": ["b"]}]}, r"pins\.0\.team"),
    ],
)
def test_contradictory_settings_are_refused(plant: Plant, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        settings_of(plant, **change)


def test_other_machines_are_served_only_with_tokens(plant: Plant) -> None:
    open_settings = parse_settings({"registry": plant.registry, "open_to_all": True})
    check_host("127.0.0.1", open_settings)
    check_host("0.0.0.0", settings_of(plant))
    for host in ("0.0.0.0", "plant.example"):
        with pytest.raises(ConfigError, match=rf"'{host}'.*tokens=FILE"):
            check_host(host, open_settings)


def test_different_artifacts_have_different_version_keys(plant: Plant) -> None:
    registry = Registry(plant.registry)
    keys = {version_key(registry.resolve(*names)) for names in ((PRESS, "gear"), (PRESS, "board"), (MILL, "gear"))}
    assert len(keys) == 3


def test_only_a_single_replica_both_receives_requests_and_scores(plant: Plant) -> None:
    pin = {"name": "boards", "team": PRESS, "categories": ["board"]}
    assert settings_of(plant).is_together
    assert not settings_of(plant, pins=[pin]).is_together
    for scaling in ({"min_replicas": 0}, {"max_replicas": 2}):
        assert not settings_of(plant, pool={"scaling": scaling}).is_together
    assert not settings_of(plant, together=False).is_together
    assert not settings_of(plant, ingress={"max_replicas": 2}).is_together
    assert parse_settings(settings_of(plant).model_dump(mode="json")).is_together  # as a replica reads them
    with pytest.raises(ConfigError, match=r"together=true.*pins"):
        settings_of(plant, together=True, pins=[pin])


def test_only_the_pass_computes_in_parallel(plant: Plant) -> None:
    previous = torch.get_num_threads()
    try:
        scorer = ImageScorer(settings_of(plant, pool={"num_threads": 2}).pool, "cpu")
        threads = [
            pool.submit(torch.get_num_threads).result()
            for pool in (scorer._batcher.executor, scorer._judging_threads, scorer.models.executor)
        ]
        assert threads == [2, 1, 1]
    finally:
        torch.set_num_threads(previous)


def test_regions_have_the_same_fields_in_package_http_and_client() -> None:
    region_fields = {field.name: field.type for field in dataclasses.fields(Region)}
    assert {field.name: field.type for field in dataclasses.fields(FoundRegion)} == region_fields
    assert {field.name: field.type for field in dataclasses.fields(RegionAnswer)} == region_fields
    document = TypeAdapter(RegionAnswer).json_schema()
    assert set(document["properties"]) == set(document["required"]) == set(region_fields)
    assert document["additionalProperties"] is False


def test_an_inspection_without_its_map_is_small_when_pickled(plant: Any) -> None:
    inspection = Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]
    pickled = pickle.dumps(inspection.without_map())
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).to_dict() == inspection.to_dict()
