"""The service without Serve: answers equal to those of the inspector, access, limits, versions, and models in memory."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from s3_server import S3Server
from serving_set import (
    INSPECT,
    MILL,
    PRESS,
    RecordedMetrics,
    TwoTeams,
    bearer_header,
    check_score,
    create_client,
    create_service,
    create_settings,
)
from starlette.requests import Request
from waiting import wait_for

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Registry, Version
from focus_ray.cli.main import main
from focus_ray.client import DefectRegion
from focus_ray.data.images import decode_image_with_info
from focus_ray.detect.detector import can_share_backbone_pass
from focus_ray.detect.inspection import Inspection, Region, resize_anomaly_map
from focus_ray.errors import BundleError, ConfigError, RegistryError
from focus_ray.serving.batching import DynamicBatcher
from focus_ray.serving.launch import check_host_security, share_gpu
from focus_ray.serving.limits import read_body, read_content_length
from focus_ray.serving.models import ModelCache
from focus_ray.serving.problems import HttpProblem
from focus_ray.serving.scorer import ImageScorer, ScoringRequest
from focus_ray.serving.service import InspectionService
from focus_ray.serving.settings import MIB, ServiceSettings, make_service_paths_absolute, parse_service_settings
from focus_ray.serving.source import FolderModelSource
from focus_ray.serving.tokens import create_token
from focus_ray.storage.files import open_filesystem


@pytest.fixture(scope="module")
def expected(plant: TwoTeams) -> Inspection:
    """The inspector's result of the first image."""
    return Inspector.load(plant.bundles["gear"], "cpu").inspect(plant.images[:1])[0]


# ---- answers


def test_an_answer_equals_the_inspector_and_names_its_version(
    http: TestClient, plant: TwoTeams, expected: Inspection
) -> None:
    answer = http.post(f"{INSPECT}?include=map", content=plant.images[0], headers=plant.image_headers(plant.press))
    body = answer.json()
    (result,) = body["results"]
    assert result["score"] == pytest.approx(expected.score, rel=1e-4)
    names = ("anomalous", "threshold", "width", "height")
    assert [result[name] for name in names] == [getattr(expected, name) for name in names]
    assert [region["area"] for region in result["regions"]] == [region.area for region in expected.regions]
    assert (body["version"], body["sha256"]) == ("v0001", read_bundle(plant.bundles["gear"]).version)
    assert set(body["timings_ms"]) == {"load", "decode", "wait", "score", "judge"}
    step = result["map"]["high"] / 255  # of the 8-bit map
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(result["map"]["png"])))) * step
    assert np.abs(values - expected.anomaly_map).max() <= step


def test_query_and_accept_header_choose_a_picture(http: TestClient, plant: TwoTeams, expected: Inspection) -> None:
    def ask(query: str, accept: str = "*/*") -> Any:
        headers = {**plant.image_headers(plant.press), "accept": accept}
        return http.post(f"{INSPECT}{query}", content=plant.images[0], headers=headers)

    mask = ask("?output=mask")
    white = np.asarray(Image.open(io.BytesIO(mask.content))) > 0
    full_map = resize_anomaly_map(expected.anomaly_map, expected.height, expected.width)
    assert np.array_equal(white, full_map > expected.pixel_threshold)
    assert float(mask.headers["x-score"]) == pytest.approx(expected.score, rel=1e-4)
    assert ask("", "image/png").content == ask("?output=heatmap").content
    assert Image.open(io.BytesIO(ask("?output=overlay").content)).size == (expected.width, expected.height)
    refused = ask("", "text/html")
    assert (refused.status_code, refused.json()["type"]) == (406, "urn:focus-ray:not-acceptable")


def test_a_form_has_a_result_or_an_error_for_each_image(http: TestClient, plant: TwoTeams) -> None:
    files = [("images", ("a.png", plant.images[0])), ("images", ("b.png", plant.images[1][:300])), ("x", ("c", b"no"))]
    results = http.post(INSPECT, files=files, headers=bearer_header(plant.press)).json()["results"]
    assert [result["name"] for result in results] == ["a.png", "b.png", "c"]
    assert [result.get("error", {}).get("reason") for result in results] == [None, "truncated", "not_an_image"]
    assert results[0]["verdict"] in ("normal", "anomalous")


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("filename*=UTF-8''Geh%C3%A4use%20%22a%22.png", "Gehäuse _a_.png"),
        ("filename*=\"utf-8'de'a.png\"", "a.png"),
        ("filename*0=part; filename*1=.png", "part.png"),
        ("filename*=nocharset''%ff.png", "ÿ.png"),
        ("filename*=UTF-8''x.png; filename=y.png", "y.png"),
        ("x=1\r\nContent-Type: image/png", ""),
    ],
)
def test_a_form_part_with_an_extended_filename_or_image_type_is_a_file(
    http: TestClient, plant: TwoTeams, disposition: str, name: str
) -> None:
    head = f"--b\r\nContent-Disposition: form-data; name=images; {disposition}\r\n\r\n"
    headers = {**bearer_header(plant.press), "content-type": "multipart/form-data; boundary=b"}
    assert len(plant.images[0]) > 4096  # above the limit of a field that is not a file
    answer = http.post(INSPECT, content=head.encode() + plant.images[0] + b"\r\n--b--\r\n", headers=headers)
    assert [result["name"] for result in answer.json()["results"]] == [name]


def test_a_form_field_in_place_of_a_file_gets_advice(http: TestClient, plant: TwoTeams) -> None:
    for fields, status, advice in (({"images": "x" * 5000}, 400, "file name"), ({"version": "x"}, 422, "?version=")):
        files = {"images": ("a.png", plant.images[0])}
        answer = http.post(INSPECT, data=fields, files=files, headers=bearer_header(plant.press))
        assert (answer.status_code, advice in answer.json()["detail"]) == (status, True)


def test_a_model_card_shows_calibration_and_no_storage_path(http: TestClient, plant: TwoTeams) -> None:
    answer = http.get("/v1/press/gear", headers=bearer_header(plant.press))
    threshold = read_bundle(plant.bundles["gear"]).calibration.image_threshold
    assert answer.json()["calibration"]["image_threshold"] == threshold
    assert plant.registry not in answer.text
    assert plant.data not in answer.text


def test_lists_show_teams_categories_and_versions(http: TestClient, plant: TwoTeams) -> None:
    headers = bearer_header(plant.press)
    assert http.get("/v1", headers=headers).json() == {"teams": [PRESS], "scopes": ["inspect", "read"]}
    assert http.get("/v1/press", headers=headers).json()["categories"] == ["board", "gear"]
    body = http.get("/v1/press/gear/versions", headers=headers).json()
    assert [version["version"] for version in body["versions"]] == ["v0001"]
    assert body["aliases"] == {"latest": "v0001", "production": "v0001"}


def test_examples_are_shown_only_if_the_setting_allows_them(http: TestClient, plant: TwoTeams) -> None:
    path, headers = "/v1/press/gear/examples", bearer_header(plant.press)
    assert http.get(f"{path}/0", headers=headers).status_code == 404
    with create_client(create_settings(plant, examples={PRESS: [plant.data]})) as client:
        shown = client.get(f"{path}/0", headers=headers)
        assert (shown.headers["content-type"], decode_image_with_info(shown.content)[0].width) == ("image/jpeg", 64)
        assert client.get(f"{path}/99", headers=headers).status_code == 404


def test_a_folder_of_bundles_is_served_without_a_registry_and_cannot_be_changed(plant: TwoTeams) -> None:
    folder = str(Path(plant.bundles["gear"]).parents[1])
    with create_client(parse_service_settings({"bundles": folder, "team": "me", "open_to_all": True})) as client:
        assert client.get("/v1").json()["teams"] == ["me"]
        assert client.get("/v1/me").json()["categories"] == ["board", "gear"]
        headers = {"content-type": "application/octet-stream"}
        body = client.post("/v1/me/board/inspect", content=plant.images[0], headers=headers).json()
        assert body["version"] == read_bundle(plant.bundles["board"]).version[:16]
    with create_client(parse_service_settings({"bundles": folder, "team": PRESS, "tokens": plant.tokens})) as client:
        for method, path, change in (
            ("PUT", "aliases/x", {"version": "latest"}),
            ("POST", "aliases/latest/rollback", None),
            ("POST", "versions/latest/thresholds", {"image_threshold": 2}),
        ):
            headers = bearer_header(plant.press_admin)
            answer = client.request(method, f"/v1/press/board/{path}", json=change, headers=headers)
            assert (answer.status_code, answer.json()["type"]) == (409, "urn:focus-ray:not-a-registry")
    with pytest.raises(RegistryError, match=r"'v9'.*'board'"):
        FolderModelSource(folder, "me").resolve("me", "board", "v9")


# ---- access


def test_categories_of_other_teams_and_missing_categories_get_the_same_answer(
    http: TestClient, plant: TwoTeams
) -> None:
    details = set()
    for team, category in ((PRESS, "gear"), (PRESS, "nothing"), ("nobody", "gear"), (MILL, "nothing")):
        path = f"/v1/{team}/{category}"
        for method, url in (("POST", f"{path}/inspect"), ("GET", path), ("GET", f"{path}/versions")):
            answer = http.request(method, url, content=plant.images[0], headers=plant.image_headers(plant.mill))
            assert answer.status_code == 404
            details.add(answer.json()["detail"].replace(team, "T").replace(category, "C"))
    assert len(details) == 1


def test_every_answer_has_security_headers_and_the_request_id(http: TestClient) -> None:
    for path in ("/", "/page.js", "/healthz", "/nothing", "/v1"):
        answer = http.get(path, headers={"x-request-id": "line-7.42"})
        assert answer.headers["x-request-id"] == "line-7.42"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert http.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_the_command_refuses_unsafe_and_wrong_settings(
    plant: TwoTeams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(Path(plant.bundles["gear"]).parents[2])
    for words, message in (
        ([plant.registry, "--host", "0.0.0.0"], "'0.0.0.0'"),
        ([str(tmp_path)], "no bundle here"),
        ([runs], "a folder of runs"),
        ([plant.bundles["gear"], "pool.memry_mb=1"], "'memory_mb'"),
        ([plant.registry, "examples=true"], "examples: {press:"),
    ):
        assert main(["serve", *words]) == 1
        assert message in capsys.readouterr().err


# ---- limits


def test_forms_and_streams_above_the_limits_are_refused(http: TestClient, plant: TwoTeams) -> None:
    files = [("images", (str(number), plant.images[0])) for number in range(5)]
    stream = iter([b"x" * MIB] * 3)
    for status, code, url, request in (
        (413, "too-many-images", INSPECT, {"files": files, "headers": bearer_header(plant.press)}),
        (
            422,
            "one-image-a-picture",
            f"{INSPECT}?output=mask",
            {"files": files[:2], "headers": bearer_header(plant.press)},
        ),
        (413, "too-large", INSPECT, {"content": stream, "headers": plant.image_headers(plant.press)}),
    ):
        answer = http.post(url, **request)
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:focus-ray:{code}")


class StuckScorer(ImageScorer):
    """Scores after `may_go` is set."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__(settings.pool, "cpu")
        self.may_go = threading.Event()

    async def inspect_images(self, request: ScoringRequest) -> Any:
        while not self.may_go.is_set():
            await asyncio.sleep(0.01)
        return await super().inspect_images(request)


@pytest.mark.parametrize(
    ("limits", "status"),
    [({"max_in_flight": 2}, 503), ({"max_in_flight_per_team": 2}, 429), ({"max_in_flight_mb": 0.02}, 503)],
)
def test_requests_above_the_limit_in_flight_get_retry_after(
    plant: TwoTeams, limits: dict[str, Any], status: int
) -> None:
    settings = create_settings(plant, limits=limits)
    stuck, headers = StuckScorer(settings), plant.image_headers(plant.press)
    body = plant.images[0].ljust(10_000, b"\0")  # Pillow ignores the bytes after the image
    with create_client(InspectionService(settings, stuck)) as client, ThreadPoolExecutor(6) as pool:
        requests = [pool.submit(client.post, INSPECT, content=body, headers=headers) for _ in range(6)]
        try:
            wait_for(lambda: sum(request.done() for request in requests) >= 4, 60, "four of six are refused", 0.01)
        finally:
            stuck.may_go.set()  # the pool waits for all
        answers = sorted((request.result() for request in requests), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [200, 200, *[status] * 4]
        assert answers[-1].headers["retry-after"] == "1"
        assert client.post(INSPECT, content=body, headers=headers).status_code == 200  # ended requests do not count


def test_an_answer_that_takes_too_long_is_a_504(plant: TwoTeams) -> None:
    settings = create_settings(plant, limits={"timeout_s": 0.2})
    with create_client(InspectionService(settings, StuckScorer(settings))) as client:
        answer = client.post(INSPECT, content=plant.images[0], headers=plant.image_headers(plant.press))
        assert (answer.status_code, answer.headers["retry-after"]) == (504, "1")


def test_a_slow_body_and_an_invalid_content_length_are_refused() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(10)
        return {}

    def request(length: bytes) -> Request:
        return Request({"type": "http", "method": "POST", "headers": [(b"content-length", length)]}, receive)

    with pytest.raises(HttpProblem, match=r"408 body-timeout: .*0\.05 s"):
        asyncio.run(read_body(request(b"5"), 100, 0.05))
    with pytest.raises(HttpProblem, match=r"400 bad-request: .*Content-Length"):
        read_content_length(request(b"-1"), 100)
    assert read_content_length(request(b"5"), 100) == 5


MALFORMED_NAMES = ("..", "%2e%2e", "..%2f..", "a%00b", ".x", "-x", "a" * 101, "gear%20", "g\u00e9ar", "a%2fb", "%ff")
IMAGE_HEADS = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"P5 900 900 255 ")
HEADER_VALUES = ("x" * 20_000, "\x01\x02", "multipart/form-data; boundary=" + "b" * 300, "image/png, */*;q=abc", ";;;")


def test_malformed_requests_cause_no_server_error_and_reveal_no_paths(http: TestClient, plant: TwoTeams) -> None:
    draw, good, headers = random.Random(0), plant.images[0], plant.image_headers(plant.press)
    for number in range(300):
        kind, path, content, sent = number % 6, INSPECT, bytearray(good), dict(headers)
        if kind == 0:  # cut short
            del content[draw.randrange(len(good)) :]
        elif kind == 1:  # changed bytes
            for _ in range(draw.randrange(1, 40)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == 2:  # no image, some with the head of one
            content[:] = draw.choice(IMAGE_HEADS) + draw.randbytes(draw.randrange(400))
        elif kind == 3:  # a header that claims more than there is
            content[16:24] = draw.randbytes(8)
        elif kind == 4:
            path = f"/v1/{draw.choice(MALFORMED_NAMES)}/{draw.choice(MALFORMED_NAMES)}/inspect"
        else:
            name = draw.choice(["accept", "authorization", "x-request-id", "content-type", "x-a"])
            sent[name] = draw.choice(HEADER_VALUES)
        answer = http.post(path, content=bytes(content), headers=sent)
        assert answer.status_code < 500, (number, answer.text)
        if answer.status_code == 200:
            assert kind in (0, 1, 3, 5), (number, kind)
        else:
            assert not any(word in answer.text for word in (plant.registry, "Traceback"))
            assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert http.post(INSPECT, content=good, headers=headers).status_code == 200


def test_an_unexpected_error_is_a_500_without_its_message(plant: TwoTeams) -> None:
    class BrokenScorer(ImageScorer):
        async def inspect_images(self, request: ScoringRequest) -> Any:
            raise RuntimeError("the secret inside")

    settings = create_settings(plant)
    with create_client(InspectionService(settings, BrokenScorer(settings.pool, "cpu"))) as client:
        answer = client.post(INSPECT, content=plant.images[0], headers=plant.image_headers(plant.press))
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:focus-ray:internal-error")
    assert "secret" not in answer.text


# ---- versions


@pytest.fixture
def two_versions(plant: TwoTeams, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    registry.publish(plant.bundles["gear"], PRESS, aliases=["candidate"])
    return registry


def test_promotion_and_rollback_change_the_version_and_fail_no_request(plant: TwoTeams, two_versions: Registry) -> None:
    headers, admin = plant.image_headers(plant.press), bearer_header(plant.press_admin)
    alias = "/v1/press/gear/aliases/production"
    with create_client(create_settings(plant, registry=two_versions.root, default_ref="production")) as client:

        def answers(version: str) -> bool:
            answer = client.post(INSPECT, content=plant.images[0], headers=headers)
            assert answer.status_code == 200
            return bool(answer.json()["version"] == version)

        wait_for(lambda: answers("v0001"), 60, "v0001 answers", 0.0)
        body = client.put(alias, json={"version": "candidate"}, headers=admin).json()
        assert body == {"team": PRESS, "category": "gear", "alias": "production", "version": "v0002"}
        wait_for(lambda: answers("v0002"), 60, "v0002 answers", 0.0)
        assert client.post(f"{alias}/rollback", headers=admin).json()["version"] == "v0001"
        wait_for(lambda: answers("v0001"), 60, "v0001 answers again", 0.0)
        by_alias = client.post(f"{INSPECT}?version=candidate", content=plant.images[0], headers=headers)
        assert by_alias.json()["version"] == "v0002"


def test_thresholds_of_an_admin_are_a_new_version_and_only_latest_moves(
    plant: TwoTeams, two_versions: Registry
) -> None:
    card, path, admin = "/v1/press/gear", "/v1/press/gear/versions/v0001/thresholds", bearer_header(plant.press_admin)
    with create_client(create_settings(plant, registry=two_versions.root, default_ref="production")) as client:
        before = client.get(f"{card}?version=v0001", headers=admin).json()["calibration"]
        version = client.post(path, json={"image_threshold": 2.5}, headers=admin).json()["version"]
        after = client.get(f"{card}?version={version}", headers=admin).json()
        assert after["calibration"]["image_threshold"] == 2.5
        assert after["calibration"]["pixel_threshold"] == before["pixel_threshold"]
        assert any("set by hand" in line for line in after["caveats"])
        assert client.get(card, headers=admin).json()["version"] == "v0001"


@pytest.mark.parametrize(
    ("change", "versions"),
    [({"canary": "candidate", "canary_share": 0.5}, {"v0001", "v0002"}), ({"shadow": "candidate"}, {"v0001"})],
)
def test_a_canary_answers_its_share_and_a_shadow_never_answers(
    plant: TwoTeams, two_versions: Registry, change: dict[str, Any], versions: set[str]
) -> None:
    recorder = RecordedMetrics()
    routes = [{"team": PRESS, "category": "gear", "ref": "production", **change}]
    with create_client(
        create_service(create_settings(plant, registry=two_versions.root, routes=routes), recorder)
    ) as client:
        headers = plant.image_headers(plant.press)
        answers = [client.post(INSPECT, content=plant.images[0], headers=headers).json() for _ in range(24)]
    assert {answer["version"] for answer in answers} == versions
    assert all((answer["role"] == "canary") == (answer["version"] == "v0002") for answer in answers)
    if "shadow" in change:
        assert recorder.sum_by_tag("images", "role")["shadow"] > 0
        assert recorder.sum_by_tag("shadow_images", "differs").keys() == {"false"}  # both versions have the same bundle


# ---- models in memory, and passes


def test_the_model_cache_drops_the_least_recently_used_model_above_its_budget(plant: TwoTeams, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    versions = [registry.publish(plant.bundles["gear"], f"team{number}") for number in range(5)]

    async def run() -> None:
        recorder = RecordedMetrics()
        cache = ModelCache(10**9, "cpu", recorder)
        model = await cache.get_or_load(versions[0])
        cache.budget_bytes = cache.num_bytes + 2 * model.num_bytes  # three, whose backbone is shared
        for number in (1, 2, 0, 3):
            await cache.get_or_load(versions[number])
        assert [key.partition("/")[0] for key in cache.loaded_keys] == ["team2", "team0", "team3"]
        assert cache.num_bytes <= cache.budget_bytes
        backbones = {
            id((await cache.get_or_load(versions[n])).inspector.bundle.detector.net.backbone) for n in (0, 2, 3)
        }
        assert len(backbones) == 1
        together = await asyncio.gather(*(cache.get_or_load(versions[4]) for _ in range(5)))
        assert len({id(model) for model in together}) == 1
        loads = [tags["team"] for name, _, tags in recorder.records if name == "load_seconds"]
        assert loads == ["team0", "team1", "team2", "team3", "team4"]

    asyncio.run(run())


def test_a_bundle_that_differs_from_the_published_one_is_refused(plant: TwoTeams) -> None:
    version = Registry(plant.registry).resolve(PRESS, "gear")
    other = Version(PRESS, "gear", "v0001", plant.bundles["board"], version.sha256, version.published_at, 0)
    with pytest.raises(BundleError, match="published as v0001"):
        asyncio.run(ModelCache(10**9, "cpu", RecordedMetrics()).get_or_load(other))


class Blocker:
    """An item that blocks the pass until `may_go` is set, and then fails."""

    def __init__(self) -> None:
        self.has_started, self.may_go = threading.Event(), threading.Event()

    @property
    def inspector(self) -> Any:
        self.has_started.set()
        self.may_go.wait(120)
        raise RuntimeError("the blocker has ended")


def test_two_categories_with_one_backbone_share_a_pass_with_equal_scores(plant: TwoTeams) -> None:
    recorder = RecordedMetrics()
    scorer = ImageScorer(create_settings(plant).pool, "cpu", recorder)
    versions = [Registry(plant.registry).resolve(PRESS, category) for category in ("gear", "board")]

    async def run() -> list[Any]:
        for version in versions:
            await scorer.warm_up_model(version)
        recorder.records.clear()
        blocker = Blocker()
        first = asyncio.create_task(scorer._batcher.submit(blocker, 1))  # type: ignore[arg-type]
        assert await asyncio.to_thread(blocker.has_started.wait, 60)
        requests = [ScoringRequest(version, plant.images[:3]) for version in versions for _ in range(2)]
        inspections = [asyncio.create_task(scorer.inspect_images(request)) for request in requests]
        await asyncio.to_thread(
            wait_for, lambda: len(scorer._batcher._waiting) == 4, 60, "all requests are decoded", 0.01
        )
        blocker.may_go.set()
        await asyncio.gather(first, return_exceptions=True)
        return await asyncio.gather(*inspections)

    answers = asyncio.run(run())
    assert [recorder.get_values(name) for name in ("batch_images", "batch_categories", "passes")] == [[12], [2], [1]]
    for number, version in enumerate(versions):
        inspections = Inspector.load(version.uri, "cpu").inspect(plant.images[:3])
        for answer in answers[2 * number : 2 * number + 2]:
            for result, inspection in zip(answer.results, inspections, strict=True):
                check_score(result.score, inspection)


def test_detectors_with_different_backbones_share_no_pass(plant: TwoTeams) -> None:
    gear, board = (read_bundle(plant.bundles[name]).detector for name in ("gear", "board"))
    assert not can_share_backbone_pass(gear, board)


def test_items_that_wait_are_the_next_batch_and_an_error_fails_only_its_item() -> None:
    batches: list[list[int]] = []
    may_go = threading.Event()

    def run(items: Any) -> list[int]:
        batches.append(list(items))
        may_go.wait(60)
        if 7 in items:
            raise ValueError("seven")
        return [10 * item for item in items]

    async def ask() -> list[Any]:
        with ThreadPoolExecutor(1) as executor:
            batcher: DynamicBatcher[int, int] = DynamicBatcher(run, 8, executor)
            first = asyncio.create_task(batcher.submit(0, 1))
            await asyncio.to_thread(wait_for, lambda: batches, 60, "the first batch is computed", 0.01)
            next_items = [asyncio.create_task(batcher.submit(item, 4 if item == 9 else 1)) for item in range(1, 10)]
            cancelled = asyncio.create_task(batcher.submit(99, 1))
            await asyncio.sleep(0)  # all items wait now
            cancelled.cancel()
            may_go.set()
            return await asyncio.gather(first, *next_items, return_exceptions=True)

    results = asyncio.run(ask())
    assert [result for result in results if not isinstance(result, Exception)] == [0, 10, 20, 30, 40, 50, 60, 80, 90]
    assert str(results[7]) == "seven"
    assert batches[:2] == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert batches[-1] == [9]


def test_only_the_pass_computes_in_parallel(plant: TwoTeams) -> None:
    previous = torch.get_num_threads()
    try:
        scorer = ImageScorer(create_settings(plant, pool={"num_threads": 2}).pool, "cpu")
        pools = (scorer._batcher.executor, scorer._judging_threads, scorer.models.executor)
        assert [pool.submit(torch.get_num_threads).result() for pool in pools] == [2, 1, 1]
    finally:
        torch.set_num_threads(previous)


# ---- storage on S3


@pytest.mark.s3
def test_registry_tokens_and_sink_work_on_s3(s3: S3Server, plant: TwoTeams, expected: Inspection) -> None:
    root = s3.new_uri()
    registry = Registry(f"{root}/registry")
    registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    token, _ = create_token(f"{root}/tokens.yaml", PRESS, ["inspect", "admin"])
    places = {"registry": registry.root, "tokens": f"{root}/tokens.yaml", "sink": {"uri": f"{root}/sink", "share": 1.0}}
    with create_client(create_settings(plant, **places)) as client:
        body = client.post(INSPECT, content=plant.images[0], headers=plant.image_headers(token)).json()
        registry.publish(plant.bundles["gear"], PRESS)
        alias = "/v1/press/gear/aliases/production"
        assert client.put(alias, json={"version": "v0002"}, headers=bearer_header(token)).json()["version"] == "v0002"
    check_score(body["results"][0]["score"], expected)
    assert registry.list_aliases(PRESS, "gear")["production"] == "v0002"
    filesystem, path = open_filesystem(f"{root}/sink")
    assert pq.read_table(path, filesystem=filesystem)["image"].to_pylist() == plant.images[:1]


# ---- settings


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"registry": None}, "registry or bundles"),
        ({"tokens": None}, "tokens=None"),
        ({"open_to_all": True}, "open_to_all=True"),
        ({"pool": {"max_batch": 1}}, r"pool\.max_batch: .*'max_batch_images'"),
        ({"pool": {"scaling": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas=3.*max_replicas=2"),
        ({"routes": [{"team": "a", "category": "b"}] * 2}, "routes: a/b"),
        ({"pins": [{"name": "x", "team": "a", "categories": ["b", "b"]}]}, "pins: a/b"),
        ({"pins": [{"name": "x", "team": "../a", "categories": ["b"]}]}, r"pins\.0\.team"),
        ({"examples": True}, r"examples: \{press: \["),
        ({"limits": {"retry_after_s": 2.0}}, r"retry_after_s is always 1\.0"),
    ],
)
def test_contradictory_settings_are_refused(plant: TwoTeams, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        create_settings(plant, **change)


def test_other_machines_are_served_only_with_tokens(plant: TwoTeams) -> None:
    without_tokens = parse_service_settings({"registry": plant.registry, "open_to_all": True})
    check_host_security("127.0.0.1", without_tokens)
    check_host_security("0.0.0.0", create_settings(plant))
    for host in ("0.0.0.0", "plant.example"):
        with pytest.raises(ConfigError, match=rf"'{host}'.*tokens=FILE"):
            check_host_security(host, without_tokens)


def test_only_a_single_replica_both_receives_requests_and_scores(plant: TwoTeams) -> None:
    assert create_settings(plant, together="auto").has_single_replica  # a setting of earlier versions
    for change in (
        {"pins": [{"name": "boards", "team": PRESS, "categories": ["board"]}]},
        {"pool": {"scaling": {"min_replicas": 0}}},
        {"pool": {"scaling": {"max_replicas": 2}}},
        {"ingress": {"max_replicas": 2}},
    ):
        assert not create_settings(plant, **change).has_single_replica


def test_regions_have_the_same_fields_in_package_and_client() -> None:
    fields = [{field.name: field.type for field in dataclasses.fields(kind)} for kind in (Region, DefectRegion)]
    assert fields[0] == fields[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine works")
def test_a_scorer_whose_gpu_cannot_compute_is_unhealthy(plant: TwoTeams) -> None:
    scorer = ImageScorer(create_settings(plant).pool, "cuda")
    with pytest.raises((RuntimeError, AssertionError)):  # AssertionError: a torch without CUDA
        asyncio.run(scorer.check_device())


def test_a_scorer_whose_device_hangs_is_unhealthy(plant: TwoTeams, monkeypatch: pytest.MonkeyPatch) -> None:
    hang, computed = threading.Event(), []
    monkeypatch.setattr("focus_ray.serving.scorer.DEVICE_CHECK_TIMEOUT_S", 0.05)
    monkeypatch.setattr("focus_ray.serving.scorer._compute_on_device", lambda device: computed.append(hang.wait(60)))
    scorer = ImageScorer(create_settings(plant).pool, "cuda")

    async def check_until_it_computes() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError, match="cuda"):
                await scorer.check_device()
        hang.set()
        monkeypatch.setattr("focus_ray.serving.scorer.DEVICE_CHECK_TIMEOUT_S", 60.0)
        await scorer.check_device()

    asyncio.run(check_until_it_computes())
    assert computed == [True]  # further checks waited for the first one


def test_local_paths_of_the_settings_become_absolute_where_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {
        "registry": "r",
        "tokens": "t.yaml",
        "sink": {"uri": "sink"},
        "examples": {"press": ["data", "s3://plant/data"]},
    }
    settings = make_service_paths_absolute(parse_service_settings(tree))
    assert [settings.registry, settings.tokens] == [str(tmp_path / "r"), str(tmp_path / "t.yaml")]
    assert settings.sink is not None
    assert settings.sink.uri == str(tmp_path / "sink")
    assert settings.examples == {"press": (str(tmp_path / "data"), "s3://plant/data")}


@pytest.mark.parametrize(("device", "shares"), [("auto", [0.5, True]), ("cpu", [0.5, False])])
def test_every_pool_without_a_gpu_gets_a_share_of_the_gpu_of_this_machine(
    plant: TwoTeams, device: str, shares: list[object]
) -> None:
    pins = [{"name": "boards", "team": PRESS, "categories": ["board"]}]
    settings = share_gpu(create_settings(plant, device=device, pool={"num_gpus": 0.5}, pins=pins))
    assert [settings.pool.num_gpus, settings.pins[0].pool.num_gpus > 0] == shares
