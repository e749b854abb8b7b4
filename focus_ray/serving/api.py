"""The HTTP interface: routes, what they take and give, and its OpenAPI description. Thin: `service` does the work."""

from __future__ import annotations

import base64
import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

import pydantic.dataclasses
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from focus_ray import __version__
from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.evaluation.inspection import Inspection, Region
from focus_ray.names import NAME_PATTERN
from focus_ray.serving.envelope import Envelope, problem_response
from focus_ray.serving.limits import announced_bytes, read_body, read_document, split_images
from focus_ray.serving.origin import check_origin
from focus_ray.serving.problems import MEDIA_TYPE, SCHEMA, Problem
from focus_ray.serving.rendering import MapValues, Output
from focus_ray.serving.service import Inspected, Service
from focus_ray.serving.settings import Name
from focus_ray.serving.tokens import Caller

PNG = "image/png"
_PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css"}

TeamPath = Annotated[str, Path(pattern=NAME_PATTERN)]
CategoryPath = Annotated[str, Path(pattern=NAME_PATTERN)]
AliasPath = Annotated[str, Path(pattern=NAME_PATTERN)]
Ref = Annotated[
    str | None, Query(alias="version", pattern=NAME_PATTERN, description="A version or an alias; none: as configured.")
]


async def caller_of(request: Request) -> Caller:
    """The dependency that authenticates. Raises: Problem: 401, 403 the page of another site, 421 another host name."""
    service: Service = request.app.state.service
    check_origin(request.headers, service.tokens is not None)
    caller = service.authenticate(request.headers.get("authorization"))
    request.state.facts = {"token": caller.id, "team": caller.team}
    return caller


Who = Annotated[Caller, Depends(caller_of)]


async def check_query(request: Request, caller: Who) -> None:
    """The dependency that refuses query parameters that a path does not take; a token is asked for first.

    Raises: Problem: 422, a parameter is unknown or given twice.
    """
    known = sorted(field.alias for field in request.scope["route"].dependant.query_params)
    names = [name for name, _ in request.query_params.multi_items()]
    for name in dict.fromkeys(names):
        if name not in known:
            shown = repr(name[:100])
            if not known:
                raise Problem(422, "unknown-parameter", f"query parameter {shown}: this path takes none: leave it out")
            close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise Problem(
                422, "unknown-parameter", f"query parameter {shown}: unknown; {hint}this path takes {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise Problem(422, "repeated-parameter", f"query parameter {name!r} is given twice: give one value")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WhoAmI(_Answer):
    teams: list[str]
    scopes: list[str]


class CategoryList(_Answer):
    team: str
    categories: list[str]


class VersionAnswer(_Answer):
    version: str
    sha256: str
    published_at: str
    num_bytes: int


class VersionList(_Answer):
    team: str
    category: str
    versions: list[VersionAnswer]
    aliases: dict[str, str]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RegionAnswer(Region):
    """`Region`, as a document: bounding box and area in pixels of the image; peak of the map."""


class MapAnswer(_Answer):
    """An 8-bit grey PNG in base64, a square stretched over the image; a pixel v stands for high * v / 255."""

    png: str
    high: float


class ImageProblem(_Answer):
    reason: str
    detail: str


class ResultAnswer(_Answer):
    """What was found in one image, or why it could not be read: then `error` and nothing else."""

    name: str
    score: float | None = None
    p_value: float | None = None
    anomalous: bool | None = None
    verdict: Literal["normal", "anomalous"] | None = None
    threshold: float | None = None
    pixel_threshold: float | None = None
    width: int | None = None
    height: int | None = None
    regions: list[RegionAnswer] | None = None
    map: MapAnswer | None = None
    error: ImageProblem | None = None


class InspectAnswer(_Answer):
    request_id: str
    team: str
    category: str
    version: str
    sha256: str
    role: Literal["answer", "canary"]
    results: list[ResultAnswer]
    timings_ms: dict[str, float]


class PromoteBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    version: Name


class ThresholdsBody(BaseModel):
    """Thresholds that a person chose; one that is left out stays."""

    model_config = ConfigDict(extra="forbid")
    image_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)
    pixel_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> ThresholdsBody:
        if self.image_threshold is None and self.pixel_threshold is None:
            raise ValueError("give image_threshold, pixel_threshold, or both")
        return self


class AliasAnswer(_Answer):
    team: str
    category: str
    alias: str
    version: str


class Ready(_Answer):
    status: str


def create_api(service: Service) -> FastAPI:
    """The application that answers with a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    api = FastAPI(
        title="focus_ray inspection service",
        version=__version__,
        description="Scores images of parts with models that learnt from images of good parts only.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        responses={"default": {"description": "Problem (RFC 9457)", "content": {MEDIA_TYPE: {"schema": SCHEMA}}}},
    )
    api.add_middleware(Envelope, measures=service.measures)
    _handle_errors(api)
    _add_open_routes(api, service)

    api.state.service = service
    security = [] if service.tokens is None else [Depends(HTTPBearer(auto_error=False))]
    checks = [*security, Depends(check_query)]
    api.include_router(_reading(service), dependencies=checks)
    api.include_router(_inspecting(service), dependencies=checks)
    api.include_router(_administering(service), dependencies=checks)
    return api


def _reading(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("", response_model=WhoAmI, responses=_problems(401, 422, 503), summary="Whose token this is")
    async def who_am_i(caller: Who) -> Response:
        return JSONResponse({"teams": await service.teams(caller), "scopes": list(caller.scopes)})

    @router.get("/{team}", response_model=CategoryList, responses=_problems(401, 403, 404, 422, 503))
    async def list_categories(caller: Who, team: TeamPath) -> Response:
        service.check(caller, team, "", "read")
        return JSONResponse({"team": team, "categories": await service.categories(team)})

    @router.get("/{team}/{category}", responses=_problems(401, 403, 404, 422, 503), summary="The card of a version")
    async def model_card(caller: Who, team: TeamPath, category: CategoryPath, version: Ref = None) -> dict[str, Any]:
        service.check(caller, team, category, "read")
        return await service.card(await service.resolve(team, category, version))

    @router.get("/{team}/{category}/versions", response_model=VersionList, responses=_problems(401, 403, 404, 422, 503))
    async def list_versions(caller: Who, team: TeamPath, category: CategoryPath) -> Response:
        service.check(caller, team, category, "read")
        versions, aliases = await service.versions(team, category)
        content = {"team": team, "category": category, "versions": [_tell(v) for v in versions], "aliases": aliases}
        return JSONResponse(content)

    @router.get(
        "/{team}/{category}/examples/{number}",
        responses={**_problems(401, 403, 404, 422, 503), 200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
        summary="A normal training image, to compare with",
    )
    async def example(
        caller: Who,
        team: TeamPath,
        category: CategoryPath,
        number: Annotated[int, Path(ge=0, le=10_000)],
        version: Ref = None,
    ) -> Response:
        service.check(caller, team, category, "read")
        found = await service.resolve(team, category, version)
        return Response(await service.example(found, number), media_type="image/jpeg")

    return router


def _inspecting(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    limits = service.settings.limits
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {
        "required": True,
        "description": f"One image as it is, or a form with up to {limits.max_images} files. PNG, JPEG, BMP, TIFF, WebP "
        f"or PPM of at most {limits.max_pixels} pixels; {limits.max_body_mb:g} MiB in all.",
        "content": {
            "image/*": binary,
            "application/octet-stream": binary,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "minItems": 1, "items": binary["schema"]}},
                }
            },
        },
    }

    @router.post(
        "/{team}/{category}/inspect",
        response_model=InspectAnswer,
        responses={
            **_problems(400, 401, 403, 404, 406, 408, 413, 415, 422, 429, 503, 504),
            200: {"description": "What was found, or a picture of it", "content": {PNG: binary}},
        },
        openapi_extra={"requestBody": body},
        summary="Score one image or several",
    )
    async def inspect(
        request: Request,
        caller: Who,
        team: TeamPath,
        category: CategoryPath,
        version: Ref = None,
        output: Annotated[
            Output | None,
            Query(description="A picture instead of JSON, of one image; without it, as the Accept header says."),
        ] = None,
        include: Annotated[Literal["map"] | None, Query(description="map: the anomaly map's values too.")] = None,
    ) -> Response:
        service.check(caller, team, category, "inspect")
        wanted = output or _negotiate(request.headers.get("accept", ""))
        with service.gate.admit(team, announced_bytes(request, limits)):
            images = await split_images(request, await read_body(request, limits), limits)
            contents = [content for _, content in images]
            if wanted != "json" and len(images) > 1:
                raise Problem(422, "one-image-a-picture", f"{len(images)} images, and a picture shows one: send one")
            request_id = request.state.request_id
            found = await service.inspect(team, category, version, contents, wanted, include == "map", request_id)
        request.state.facts.update(
            category=category, version=found.version.name, num_images=len(images), timings_ms=found.answer.timings_ms
        )
        return _answer(found, [name for name, _ in images], wanted, request_id)

    return router


def _administering(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    problems = _problems(400, 401, 403, 404, 408, 413, 415, 422, 503)

    def answer(version: Version, alias: str) -> Response:
        content = {"team": version.team, "category": version.category, "alias": alias, "version": version.name}
        return JSONResponse(content)

    @router.put(
        "/{team}/{category}/aliases/{alias}",
        response_model=AliasAnswer,
        responses=problems,
        openapi_extra=_document(PromoteBody),
    )
    async def promote(
        request: Request, caller: Who, team: TeamPath, category: CategoryPath, alias: AliasPath
    ) -> Response:
        service.check(caller, team, category, "admin")
        body = await read_document(request, PromoteBody)
        return answer(await service.promote(team, category, body.version, alias), alias)

    @router.post(
        "/{team}/{category}/versions/{version}/thresholds",
        response_model=VersionAnswer,
        responses={**problems, **_problems(409)},
        openapi_extra=_document(ThresholdsBody),
        summary="A new version of a model, under thresholds that a person chose",
    )
    async def set_thresholds(
        request: Request, caller: Who, team: TeamPath, category: CategoryPath, version: AliasPath
    ) -> Response:
        service.check(caller, team, category, "admin")
        body = await read_document(request, ThresholdsBody)
        made = await service.set_thresholds(team, category, version, body.image_threshold, body.pixel_threshold, caller)
        return JSONResponse(_tell(made))

    @router.post("/{team}/{category}/aliases/{alias}/rollback", response_model=AliasAnswer, responses=problems)
    async def roll_back(caller: Who, team: TeamPath, category: CategoryPath, alias: AliasPath) -> Response:
        service.check(caller, team, category, "admin")
        return answer(await service.roll_back(team, category, alias), alias)

    return router


def _add_open_routes(api: FastAPI, service: Service) -> None:
    @api.get("/healthz", response_model=Ready, summary="Whether this replica lives")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @api.get("/readyz", response_model=Ready, responses=_problems(503), summary="Whether there are models to serve")
    async def readyz() -> Response:
        await service.ready()
        return JSONResponse({"status": "ok"})

    if not service.settings.page:
        return
    folder = resources.files("focus_ray.serving") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *_PAGE_FILES)}

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["index.html"], media_type="text/html; charset=utf-8")

    for name, kind in _PAGE_FILES.items():
        content, media_type = files[name], f"{kind}; charset=utf-8"
        api.add_api_route(f"/{name}", _constant(content, media_type), methods=["GET"], include_in_schema=False)


def _constant(content: bytes, media_type: str) -> Any:
    async def give() -> Response:
        return Response(content, media_type=media_type)

    return give


def _handle_errors(api: FastAPI) -> None:
    @api.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return problem_response(problem, request.state.request_id)

    @api.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{'.'.join(str(p) for p in item['loc'])}: {item['msg']}" for item in error.errors()[:5])
        return problem_response(Problem(422, "invalid-request", told[:1000]), request.state.request_id)

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            problem = Problem(404, "not-found", "there is nothing at this path; /openapi.json says what there is")
        elif error.status_code == 405:
            problem = Problem(405, "method-not-allowed", f"{request.method} is not for this path", headers=headers)
        else:
            problem = Problem(error.status_code, "bad-request", str(error.detail)[:300], headers=headers)
        return problem_response(problem, request.state.request_id)


def _negotiate(accept: str) -> Output:
    """JSON, or a heat map where only pictures are accepted. Raises: Problem: 406, neither is."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",") if part.strip()]
    if not kinds or any(kind in ("*/*", "application/*", "application/json") for kind in kinds):
        return "json"
    if any(kind in (PNG, "image/*") for kind in kinds):
        return "heatmap"
    raise Problem(406, "not-acceptable", f"Accept {accept[:100]!r}: there is application/json and {PNG}")


def _answer(found: Inspected, names: list[str], output: Output, request_id: str) -> Response:
    version, answer = found.version, found.answer
    first = answer.results[0]
    if len(answer.results) == 1 and isinstance(first, ImageError):
        raise Problem(422, f"image-{first.reason.replace('_', '-')}", str(first))
    if output != "json":
        assert answer.pictures[0] is not None
        assert isinstance(first, Inspection)
        headers = {
            "x-score": repr(first.score),
            "x-p-value": repr(first.p_value),
            "x-threshold": repr(first.threshold),
            "x-verdict": first.verdict,
            "x-version": version.name,
            "x-sha256": version.sha256,
        }
        return Response(answer.pictures[0], media_type=PNG, headers=headers)
    content = {
        "request_id": request_id,
        "team": version.team,
        "category": version.category,
        "version": version.name,
        "sha256": version.sha256,
        "role": found.role,
        "results": [_result(*told) for told in zip(names, answer.results, answer.maps, strict=True)],
        "timings_ms": answer.timings_ms,
    }
    return JSONResponse(content)


def _result(name: str, result: Inspection | ImageError, values: MapValues | None) -> dict[str, Any]:
    """As `ResultAnswer` has it."""
    if isinstance(result, ImageError):
        return {"name": name, "error": {"reason": result.reason, "detail": str(result)}}
    told = {"name": name, "verdict": result.verdict, **result.to_dict()}
    if values is not None:
        told["map"] = {"png": base64.b64encode(values.png).decode(), "high": values.high}
    return told


def _tell(version: Version) -> dict[str, Any]:
    return {
        "version": version.name,
        "sha256": version.sha256,
        "published_at": version.published_at.isoformat(),
        "num_bytes": version.num_bytes,
    }


def _document(model: type[BaseModel]) -> dict[str, Any]:
    """The description of a JSON body that `read_document` reads."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}
