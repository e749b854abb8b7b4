"""The HTTP interface: routes, their parameters and answers, and the OpenAPI description. Thin: `service` does the work."""

from __future__ import annotations

import base64
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
from focus_ray.detect.inspection import Inspection, Region
from focus_ray.detect.pictures import MapValues, Output
from focus_ray.names import NAME_PATTERN, suggest_name
from focus_ray.serving.envelope import Envelope, problem_response
from focus_ray.serving.limits import read_body, read_content_length, read_document, split_images
from focus_ray.serving.origin import check_origin
from focus_ray.serving.problems import MEDIA_TYPE, SCHEMA, Problem
from focus_ray.serving.service import InspectionOutcome, Service
from focus_ray.serving.settings import Name
from focus_ray.serving.tokens import Caller

PNG = "image/png"
_PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css"}

TeamPath = Annotated[str, Path(pattern=NAME_PATTERN)]
CategoryPath = Annotated[str, Path(pattern=NAME_PATTERN)]
AliasPath = Annotated[str, Path(pattern=NAME_PATTERN)]
Ref = Annotated[
    str | None,
    Query(alias="version", pattern=NAME_PATTERN, description="A version or an alias; without it, the configured one."),
]


async def authenticate_request(request: Request) -> Caller:
    """FastAPI dependency: returns the caller of a request.

    Raises: Problem: 401, no valid token. 403, the request comes from the page of another site. 421, wrong host name.
    """
    service: Service = request.app.state.service
    check_origin(request.headers, service.tokens is not None)
    caller = service.authenticate(request.headers.get("authorization"))
    request.state.facts = {"token": caller.id, "team": caller.team}
    return caller


AuthenticatedCaller = Annotated[Caller, Depends(authenticate_request)]


async def check_query(request: Request, caller: AuthenticatedCaller) -> None:
    """FastAPI dependency: refuses unknown and repeated query parameters, after the caller was authenticated.

    Raises: Problem: 422, a parameter is unknown or occurs twice.
    """
    parameters = sorted(field.alias for field in request.scope["route"].dependant.query_params)
    names = [name for name, _ in request.query_params.multi_items()]
    for name in dict.fromkeys(names):
        if name not in parameters:
            quoted = repr(name[:100])
            if not parameters:
                raise Problem(422, "unknown-parameter", f"query parameter {quoted}: this path takes none: remove it")
            suggestion = suggest_name(name.lower(), parameters, min_similarity=0.5)
            hint = f"{suggestion} " if suggestion else ""
            raise Problem(
                422,
                "unknown-parameter",
                f"query parameter {quoted}: unknown; {hint}this path takes {', '.join(parameters)}",
            )
        if names.count(name) > 1:
            raise Problem(422, "repeated-parameter", f"query parameter {name!r} occurs twice: send one value")


class _AnswerBody(BaseModel):
    """Base of the documented answers: they have no other fields."""

    model_config = ConfigDict(extra="forbid")


class WhoAmI(_AnswerBody):
    """Teams and scopes of the token."""

    teams: list[str]
    scopes: list[str]


class CategoryList(_AnswerBody):
    """Categories of a team."""

    team: str
    categories: list[str]


class VersionAnswer(_AnswerBody):
    """A published version of a model."""

    version: str
    sha256: str
    published_at: str
    num_bytes: int


class VersionList(_AnswerBody):
    """Versions of a category, and version names by alias."""

    team: str
    category: str
    versions: list[VersionAnswer]
    aliases: dict[str, str]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RegionAnswer(Region):
    """An anomalous region: bounding box and area in pixels of the image, and the peak of the anomaly map."""


class MapAnswer(_AnswerBody):
    """The anomaly map as an 8-bit grey PNG in base64. A pixel value v means high * v / 255.

    The map is square. Stretch it over the whole image.
    """

    png: str
    high: float


class ImageProblem(_AnswerBody):
    """The reason why an image cannot be read."""

    reason: str
    detail: str


class ResultAnswer(_AnswerBody):
    """The result of one image. An image that cannot be read has only `name` and `error`."""

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


class InspectAnswer(_AnswerBody):
    """Results of the images of a request, in order, and the version that scored them."""

    request_id: str
    team: str
    category: str
    version: str
    sha256: str
    role: Literal["answer", "canary"]
    results: list[ResultAnswer]
    timings_ms: dict[str, float]


class PromoteBody(BaseModel):
    """The version to which an alias moves: a version name or an alias."""

    model_config = ConfigDict(extra="forbid")
    version: Name


class ThresholdsBody(BaseModel):
    """Thresholds that a person chose. A threshold that is absent does not change."""

    model_config = ConfigDict(extra="forbid")
    image_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)
    pixel_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sets_a_threshold(self) -> ThresholdsBody:
        """Raises: ValueError: neither threshold is set."""
        if self.image_threshold is None and self.pixel_threshold is None:
            raise ValueError("set image_threshold, pixel_threshold, or both")
        return self


class AliasAnswer(_AnswerBody):
    """An alias and the version to which it now points."""

    team: str
    category: str
    alias: str
    version: str


class Ready(_AnswerBody):
    """The state of the replica."""

    status: str


def create_api(service: Service) -> FastAPI:
    """Creates the FastAPI application that answers requests with a service; it starts and closes the service."""

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
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        responses={"default": {"description": "Problem (RFC 9457)", "content": {MEDIA_TYPE: {"schema": SCHEMA}}}},
    )
    api.add_middleware(Envelope, measures=service.measures)
    _handle_errors(api)
    _add_open_routes(api, service)

    api.state.service = service
    security = [] if service.tokens is None else [Depends(HTTPBearer(auto_error=False))]
    checks = [*security, Depends(check_query)]
    api.include_router(_create_read_routes(service), dependencies=checks)
    api.include_router(_create_inspect_routes(service), dependencies=checks)
    api.include_router(_create_admin_routes(service), dependencies=checks)
    return api


def _create_read_routes(service: Service) -> APIRouter:
    """Creates the routes of the scope `read`."""
    router = APIRouter(prefix="/v1")

    @router.get(
        "",
        response_model=WhoAmI,
        responses=_problem_responses(401, 422, 503),
        summary="The teams and scopes of the token",
    )
    async def who_am_i(caller: AuthenticatedCaller) -> Response:
        return JSONResponse({"teams": await service.list_teams(caller), "scopes": list(caller.scopes)})

    @router.get("/{team}", response_model=CategoryList, responses=_problem_responses(401, 403, 404, 422, 503))
    async def list_categories(caller: AuthenticatedCaller, team: TeamPath) -> Response:
        service.check_access(caller, team, "", "read")
        return JSONResponse({"team": team, "categories": await service.list_categories(team)})

    @router.get(
        "/{team}/{category}", responses=_problem_responses(401, 403, 404, 422, 503), summary="The card of a version"
    )
    async def model_card(
        caller: AuthenticatedCaller, team: TeamPath, category: CategoryPath, version: Ref = None
    ) -> dict[str, Any]:
        service.check_access(caller, team, category, "read")
        return await service.describe_version(await service.resolve(team, category, version))

    @router.get(
        "/{team}/{category}/versions", response_model=VersionList, responses=_problem_responses(401, 403, 404, 422, 503)
    )
    async def list_versions(caller: AuthenticatedCaller, team: TeamPath, category: CategoryPath) -> Response:
        service.check_access(caller, team, category, "read")
        versions, aliases = await service.list_versions(team, category)
        content = {
            "team": team,
            "category": category,
            "versions": [_version_body(version) for version in versions],
            "aliases": aliases,
        }
        return JSONResponse(content)

    @router.get(
        "/{team}/{category}/examples/{number}",
        responses={**_problem_responses(401, 403, 404, 422, 503), 200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
        summary="A normal training image, for comparison",
    )
    async def example(
        caller: AuthenticatedCaller,
        team: TeamPath,
        category: CategoryPath,
        number: Annotated[int, Path(ge=0, le=10_000)],
        version: Ref = None,
    ) -> Response:
        service.check_access(caller, team, category, "read")
        resolved = await service.resolve(team, category, version)
        return Response(await service.read_example(resolved, number), media_type="image/jpeg")

    return router


def _create_inspect_routes(service: Service) -> APIRouter:
    """Creates the route of the scope `inspect`."""
    router = APIRouter(prefix="/v1")
    limits = service.settings.limits
    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {
        "required": True,
        "description": f"The bytes of one image, or a form with up to {limits.max_images} files. PNG, JPEG, BMP, TIFF, WebP "
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
            **_problem_responses(400, 401, 403, 404, 406, 408, 413, 415, 422, 429, 503, 504),
            200: {"description": "The results, or a picture of the result", "content": {PNG: binary}},
        },
        openapi_extra={"requestBody": body},
        summary="Score one image or several",
    )
    async def inspect(
        request: Request,
        caller: AuthenticatedCaller,
        team: TeamPath,
        category: CategoryPath,
        version: Ref = None,
        output: Annotated[
            Output | None,
            Query(description="A picture of one image instead of JSON. Without it, the Accept header decides."),
        ] = None,
        include: Annotated[Literal["map"] | None, Query(description="map: adds the values of the anomaly map.")] = None,
    ) -> Response:
        service.check_access(caller, team, category, "inspect")
        chosen_output = output or _choose_output(request.headers.get("accept", ""))
        with service.gate.admit(team, read_content_length(request, limits)):
            images = await split_images(request, await read_body(request, limits), limits)
            contents = [content for _, content in images]
            if chosen_output != "json" and len(images) > 1:
                raise Problem(
                    422,
                    "one-image-a-picture",
                    f"the request has {len(images)} images, but a picture shows one: send one image",
                )
            request_id = request.state.request_id
            outcome = await service.inspect(
                team, category, version, contents, chosen_output, include == "map", request_id
            )
        request.state.facts.update(
            category=category,
            version=outcome.version.name,
            num_images=len(images),
            timings_ms=outcome.answer.timings_ms,
        )
        return _inspection_response(outcome, [name for name, _ in images], chosen_output, request_id)

    return router


def _create_admin_routes(service: Service) -> APIRouter:
    """Creates the routes of the scope `admin`."""
    router = APIRouter(prefix="/v1")
    problems = _problem_responses(400, 401, 403, 404, 408, 413, 415, 422, 503)

    def alias_response(version: Version, alias: str) -> Response:
        content = {"team": version.team, "category": version.category, "alias": alias, "version": version.name}
        return JSONResponse(content)

    @router.put(
        "/{team}/{category}/aliases/{alias}",
        response_model=AliasAnswer,
        responses=problems,
        openapi_extra=_request_body(PromoteBody),
    )
    async def promote(
        request: Request, caller: AuthenticatedCaller, team: TeamPath, category: CategoryPath, alias: AliasPath
    ) -> Response:
        service.check_access(caller, team, category, "admin")
        body = await read_document(request, PromoteBody)
        return alias_response(await service.promote(team, category, body.version, alias), alias)

    @router.post(
        "/{team}/{category}/versions/{version}/thresholds",
        response_model=VersionAnswer,
        responses={**problems, **_problem_responses(409)},
        openapi_extra=_request_body(ThresholdsBody),
        summary="Publish a new version of a model with other thresholds",
    )
    async def set_thresholds(
        request: Request, caller: AuthenticatedCaller, team: TeamPath, category: CategoryPath, version: AliasPath
    ) -> Response:
        service.check_access(caller, team, category, "admin")
        body = await read_document(request, ThresholdsBody)
        new_version = await service.set_thresholds(
            team, category, version, body.image_threshold, body.pixel_threshold, caller
        )
        return JSONResponse(_version_body(new_version))

    @router.post("/{team}/{category}/aliases/{alias}/rollback", response_model=AliasAnswer, responses=problems)
    async def roll_back(
        caller: AuthenticatedCaller, team: TeamPath, category: CategoryPath, alias: AliasPath
    ) -> Response:
        service.check_access(caller, team, category, "admin")
        return alias_response(await service.roll_back(team, category, alias), alias)

    return router


def _add_open_routes(api: FastAPI, service: Service) -> None:
    """Adds the routes that need no token: the probes, and the files of the page."""

    @api.get("/healthz", response_model=Ready, summary="Whether this replica lives")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @api.get(
        "/readyz", response_model=Ready, responses=_problem_responses(503), summary="Whether there are models to serve"
    )
    async def readyz() -> Response:
        await service.check_ready()
        return JSONResponse({"status": "ok"})

    if not service.settings.page:
        return
    folder = resources.files("focus_ray.serving") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *_PAGE_FILES)}

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["index.html"], media_type="text/html; charset=utf-8")

    for name, subtype in _PAGE_FILES.items():
        content, media_type = files[name], f"{subtype}; charset=utf-8"
        api.add_api_route(
            f"/{name}", _create_file_endpoint(content, media_type), methods=["GET"], include_in_schema=False
        )


def _create_file_endpoint(content: bytes, media_type: str) -> Any:
    """Returns an endpoint that always answers with the same bytes."""

    async def send_file() -> Response:
        return Response(content, media_type=media_type)

    return send_file


def _handle_errors(api: FastAPI) -> None:
    """Answers every error with a problem document."""

    @api.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return problem_response(problem, request.state.request_id)

    @api.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> Response:
        detail = "; ".join(f"{'.'.join(str(key) for key in item['loc'])}: {item['msg']}" for item in error.errors()[:5])
        return problem_response(Problem(422, "invalid-request", detail[:1000]), request.state.request_id)

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            problem = Problem(404, "not-found", "there is nothing at this path; /openapi.json says what there is")
        elif error.status_code == 405:
            problem = Problem(
                405, "method-not-allowed", f"this path does not support {request.method}", headers=headers
            )
        else:
            problem = Problem(error.status_code, "bad-request", str(error.detail)[:300], headers=headers)
        return problem_response(problem, request.state.request_id)


def _choose_output(accept: str) -> Output:
    """Chooses JSON if an Accept header allows it, else a heat map. Raises: Problem: 406, it allows neither."""
    media_types = [entry.partition(";")[0].strip().lower() for entry in accept.split(",") if entry.strip()]
    if not media_types or any(name in ("*/*", "application/*", "application/json") for name in media_types):
        return "json"
    if any(name in (PNG, "image/*") for name in media_types):
        return "heatmap"
    raise Problem(406, "not-acceptable", f"Accept {accept[:100]!r}: this path offers application/json and {PNG}")


def _inspection_response(outcome: InspectionOutcome, names: list[str], output: Output, request_id: str) -> Response:
    """Returns the answer to an inspection: the picture with the score in headers, or JSON with the results of all images.

    Args: names: file names of the images, in order.

    Raises: Problem: 422, the only image cannot be read.
    """
    version, answer = outcome.version, outcome.answer
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
        "role": outcome.role,
        "results": [_result_body(*entry) for entry in zip(names, answer.results, answer.maps, strict=True)],
        "timings_ms": answer.timings_ms,
    }
    return JSONResponse(content)


def _result_body(name: str, result: Inspection | ImageError, values: MapValues | None) -> dict[str, Any]:
    """Returns the fields of `ResultAnswer` for one image."""
    if isinstance(result, ImageError):
        return {"name": name, "error": {"reason": result.reason, "detail": str(result)}}
    body = {"name": name, "verdict": result.verdict, **result.to_dict()}
    if values is not None:
        body["map"] = {"png": base64.b64encode(values.png).decode(), "high": values.high}
    return body


def _version_body(version: Version) -> dict[str, Any]:
    """Returns the fields of `VersionAnswer`."""
    return {
        "version": version.name,
        "sha256": version.sha256,
        "published_at": version.published_at.isoformat(),
        "num_bytes": version.num_bytes,
    }


def _request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the OpenAPI description of a JSON body that `read_document` reads."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI description of problem documents with these HTTP statuses."""
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}
