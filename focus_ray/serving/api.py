"""The HTTP interface: routes, their parameters and answers, and the OpenAPI description. `service` does the work."""

from __future__ import annotations

import base64
import pathlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection, Region
from focus_ray.detect.pictures import EncodedAnomalyMap, Output
from focus_ray.names import NAME_PATTERN, suggest_similar_name
from focus_ray.serving.envelope import RequestMiddleware
from focus_ray.serving.limits import extract_images, read_body, read_content_length, read_json_body
from focus_ray.serving.origin import check_same_origin
from focus_ray.serving.problems import MEDIA_TYPE, HttpProblem, ProblemDocument
from focus_ray.serving.service import InspectionService
from focus_ray.serving.settings import MIB, Name
from focus_ray.serving.source import get_version_labels
from focus_ray.serving.tokens import Caller
from focus_ray.version import __version__

PNG = "image/png"
_PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
NamePath = Annotated[str, Path(pattern=NAME_PATTERN)]
Ref = Annotated[
    str | None,
    Query(alias="version", pattern=NAME_PATTERN, description="A version or an alias; without it, the configured one."),
]


async def authenticate_request(request: Request) -> Caller:
    """FastAPI dependency: checks origin, token and query parameters of a request, and returns its caller.

    Stores token id and team in `request.state.facts`, for the log.

    Raises: HttpProblem: 401, no valid token. 403, the request comes from the page of another site. 421, wrong host name. 422, a
        query parameter is unknown or occurs twice.
    """
    service: InspectionService = request.app.state.service
    check_same_origin(request.headers, service.tokens is not None)
    caller = service.authenticate_caller(request.headers.get("authorization"))
    request.state.facts = {"token": caller.id, "team": caller.team}
    parameters = sorted(field.alias for field in request.scope["route"].dependant.query_params)
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in parameters:
            expected = f"this path takes {', '.join(parameters) or 'none'}"
            hint = suggest_similar_name(name.lower(), parameters, min_similarity=0.5)
            detail = f"query parameter {name[:100]!r} is unknown: {expected}. {hint}".rstrip()
            raise HttpProblem(422, "unknown-parameter", detail)
        if count > 1:
            raise HttpProblem(422, "repeated-parameter", f"query parameter {name!r} occurs twice: send one value")
    return caller


AuthenticatedCaller = Annotated[Caller, Depends(authenticate_request)]


class _StrictBody(BaseModel):
    """Base class of JSON bodies. A body has only the fields that its class documents."""

    model_config = ConfigDict(extra="forbid")


class TokenAccess(_StrictBody):
    """The teams that the token opens, and its scopes (inspect, read, admin)."""

    teams: list[str]
    scopes: list[str]


class CategoryList(_StrictBody):
    """The categories of a team that have a model."""

    team: str
    categories: list[str]


class VersionAnswer(_StrictBody):
    """A published version of a model: its name, hash of its manifest, time of publication and size."""

    version: str
    sha256: str
    published_at: str
    num_bytes: int


class VersionList(_StrictBody):
    """The versions of a category, and its aliases. `aliases`: alias -> version name."""

    team: str
    category: str
    versions: list[VersionAnswer]
    aliases: dict[str, str]


class AnomalyMapAnswer(_StrictBody):
    """The anomaly map as an 8-bit grey PNG in base64. A pixel value v means the anomaly value high * v / 255.

    Stretch the map over the whole image: the map and the image may differ in size and aspect ratio.
    """

    png: str
    high: float


class UnreadableImage(_StrictBody):
    """The reason why an image cannot be read."""

    reason: str
    detail: str


class ImageResultAnswer(_StrictBody):
    """The result of one image. If the image cannot be read, the result has only `name` and `error`."""

    name: str
    score: float | None = None
    p_value: float | None = None
    anomalous: bool | None = None
    verdict: Literal["normal", "anomalous"] | None = None
    threshold: float | None = None
    pixel_threshold: float | None = None
    width: int | None = None
    height: int | None = None
    regions: list[Region] | None = None
    map: AnomalyMapAnswer | None = None
    error: UnreadableImage | None = None


class InspectionAnswer(_StrictBody):
    """The results of the images of a request, in their order, and the version that scored them.

    The role is canary if a new version answered on trial, otherwise answer.
    """

    request_id: str
    team: str
    category: str
    version: str
    sha256: str
    role: Literal["answer", "canary"]
    results: list[ImageResultAnswer]
    timings_ms: dict[str, float]


class PromotionRequest(_StrictBody):
    """The version to which an alias moves: a version name or an alias."""

    version: Name


class ThresholdsRequest(_StrictBody):
    """Thresholds that a person chose. A threshold that is absent does not change."""

    image_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)
    pixel_threshold: float | None = Field(default=None, gt=0, le=1e30, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_threshold_present(self) -> ThresholdsRequest:
        """Checks that at least one threshold is set. Raises: ValueError: neither is set."""
        if self.image_threshold is None and self.pixel_threshold is None:
            raise ValueError("set image_threshold, pixel_threshold, or both")
        return self


class AliasAnswer(_StrictBody):
    """An alias and the version to which it now points."""

    team: str
    category: str
    alias: str
    version: str


class HealthAnswer(_StrictBody):
    """The answer of a health check; `status` is "ok"."""

    status: str


def create_api(service: InspectionService) -> FastAPI:
    """Creates the FastAPI application of a service. The application starts the service, and closes it when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Context manager of the application: starts the service, and closes it when the application stops."""
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
        responses={
            "default": {
                "description": "Problem (RFC 9457)",
                "content": {MEDIA_TYPE: {"schema": ProblemDocument.model_json_schema()}},
            }
        },
    )
    api.add_middleware(RequestMiddleware, metrics=service.metrics)
    api.state.service = service
    _add_error_handlers(api)
    _add_open_routes(api, service)
    security = [] if service.tokens is None else [Depends(HTTPBearer(auto_error=False))]
    router = APIRouter(
        prefix="/v1", dependencies=security, responses=_describe_problem_responses(401, 403, 404, 422, 503)
    )
    _add_read_routes(router, service)
    _add_inspect_route(router, service)
    _add_admin_routes(router, service)
    api.include_router(router)
    return api


def _add_read_routes(router: APIRouter, service: InspectionService) -> None:
    """Adds the routes that read: teams of the token (any valid token), and the routes that need the scope `read`."""

    @router.get("", summary="The teams and scopes of the token")
    async def describe_token_access(caller: AuthenticatedCaller) -> TokenAccess:
        """Returns the teams that the token opens, and the scopes of the token."""
        return TokenAccess(teams=await service.list_teams(caller), scopes=list(caller.scopes))

    @router.get("/{team}")
    async def list_categories(caller: AuthenticatedCaller, team: NamePath) -> CategoryList:
        """Returns the categories of a team that have a model."""
        service.check_access(caller, team, "", "read")
        return CategoryList(team=team, categories=await service.list_categories(team))

    @router.get("/{team}/{category}", summary="The card of a version")
    async def read_model_card(
        caller: AuthenticatedCaller, team: NamePath, category: NamePath, version: Ref = None
    ) -> dict[str, Any]:
        """Returns a description of the training and calibration of a version."""
        service.check_access(caller, team, category, "read")
        return await service.describe_version(await service.resolve_version(team, category, version))

    @router.get("/{team}/{category}/versions")
    async def list_versions(caller: AuthenticatedCaller, team: NamePath, category: NamePath) -> VersionList:
        """Returns the published versions of a category, and its aliases."""
        service.check_access(caller, team, category, "read")
        versions, aliases = await service.list_versions(team, category)
        answers = [_format_version(version) for version in versions]
        return VersionList(team=team, category=category, versions=answers, aliases=aliases)

    @router.get(
        "/{team}/{category}/examples/{number}",
        responses={200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
        summary="A normal training image, for comparison",
    )
    async def read_example(
        caller: AuthenticatedCaller,
        team: NamePath,
        category: NamePath,
        number: Annotated[int, Path(ge=0, le=10_000)],
        version: Ref = None,
    ) -> Response:
        """Returns a normal training image of a version as a JPEG file."""
        service.check_access(caller, team, category, "read")
        resolved = await service.resolve_version(team, category, version)
        return Response(await service.read_example_image(resolved, number), media_type="image/jpeg")


def _add_inspect_route(router: APIRouter, service: InspectionService) -> None:
    """Adds the route that scores images; it needs the scope `inspect`."""
    limits = service.settings.limits
    max_bytes = int(limits.max_body_mb * MIB)
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "minItems": 1, "items": binary["schema"]}},
    }
    body = {
        "required": True,
        "description": f"The bytes of one image, or a form with up to {limits.max_images} files. PNG, JPEG, BMP, TIFF, WebP "
        f"or PPM of at most {limits.max_pixels} pixels; {limits.max_body_mb:g} MiB in all.",
        "content": {"image/*": binary, "application/octet-stream": binary, "multipart/form-data": {"schema": form}},
    }

    @router.post(
        "/{team}/{category}/inspect",
        response_model=InspectionAnswer,
        responses={
            **_describe_problem_responses(400, 406, 408, 413, 415, 429, 504),
            200: {"description": "The results, or a picture of the result", "content": {PNG: binary}},
        },
        openapi_extra={"requestBody": body},
        summary="Score one image or several",
    )
    async def inspect_images(
        request: Request,
        caller: AuthenticatedCaller,
        team: NamePath,
        category: NamePath,
        version: Ref = None,
        output: Annotated[
            Output | None,
            Query(description="A picture of one image instead of JSON. Without it, the Accept header decides."),
        ] = None,
        include: Annotated[Literal["map"] | None, Query(description="map: adds the values of the anomaly map.")] = None,
    ) -> Response:
        """Scores the images of the request. Returns the results as JSON, or a picture of the result of one image as PNG."""
        service.check_access(caller, team, category, "inspect")
        chosen_output = output or _choose_output_format(request.headers.get("accept", ""))
        with service.gate.admit(team, read_content_length(request, max_bytes)):
            images = await extract_images(request, await read_body(request, max_bytes), limits)
            if chosen_output != "json" and len(images) > 1:
                detail = f"the request has {len(images)} images, but a picture shows one: send one image"
                raise HttpProblem(422, "one-image-a-picture", detail)
            contents = [content for _, content in images]
            request_id = request.state.request_id
            used_version, answer, role = await service.inspect_images(
                team, category, version, contents, chosen_output, include == "map", request_id
            )
        facts = {"version": used_version.name, "num_images": len(images), "timings_ms": answer.timings_ms}
        request.state.facts.update(category=category, **facts)
        first = answer.results[0]
        if len(images) == 1 and isinstance(first, ImageError):
            raise HttpProblem(422, f"image-{first.reason.replace('_', '-')}", str(first))
        if answer.pictures[0] is not None and isinstance(first, Inspection):
            return _create_picture_response(used_version, first, answer.pictures[0])
        entries = zip(images, answer.results, answer.maps, strict=True)
        content = {
            "request_id": request_id,
            **get_version_labels(used_version),
            "sha256": used_version.sha256,
            "role": role,
            "results": [_format_image_result(name, result, values) for (name, _), result, values in entries],
            "timings_ms": answer.timings_ms,
        }
        return JSONResponse(content)


def _add_admin_routes(router: APIRouter, service: InspectionService) -> None:
    """Adds the routes that move aliases and set thresholds; they need the scope `admin`."""
    problems = _describe_problem_responses(400, 408, 409, 413, 415)

    @router.put(
        "/{team}/{category}/aliases/{alias}", responses=problems, openapi_extra=_describe_json_body(PromotionRequest)
    )
    async def promote_version(
        request: Request, caller: AuthenticatedCaller, team: NamePath, category: NamePath, alias: NamePath
    ) -> AliasAnswer:
        """Moves an alias to a version; creates the alias if it does not exist."""
        service.check_access(caller, team, category, "admin")
        body = await read_json_body(request, PromotionRequest)
        version = await service.promote_version(team, category, body.version, alias)
        return AliasAnswer(**get_version_labels(version), alias=alias)

    @router.post(
        "/{team}/{category}/versions/{version}/thresholds",
        responses=problems,
        openapi_extra=_describe_json_body(ThresholdsRequest),
        summary="Publish a new version of a model with other thresholds",
    )
    async def set_thresholds(
        request: Request, caller: AuthenticatedCaller, team: NamePath, category: NamePath, version: NamePath
    ) -> VersionAnswer:
        """Publishes a copy of a version with the thresholds of the request, and returns the new version."""
        service.check_access(caller, team, category, "admin")
        body = await read_json_body(request, ThresholdsRequest)
        resolved = await service.resolve_version(team, category, version)
        thresholds = body.image_threshold, body.pixel_threshold
        return _format_version(await service.set_thresholds(resolved, *thresholds, caller))

    @router.post("/{team}/{category}/aliases/{alias}/rollback", responses=problems)
    async def roll_back_alias(
        caller: AuthenticatedCaller, team: NamePath, category: NamePath, alias: NamePath
    ) -> AliasAnswer:
        """Moves an alias back to its previous version."""
        service.check_access(caller, team, category, "admin")
        return AliasAnswer(**get_version_labels(await service.roll_back_alias(team, category, alias)), alias=alias)


def _add_open_routes(api: FastAPI, service: InspectionService) -> None:
    """Adds the routes that need no token: the health checks, and the files of the web page if the settings turn it on."""

    @api.get("/healthz", summary="Whether this replica lives")
    async def report_liveness() -> HealthAnswer:
        """Returns the status "ok" while this replica runs."""
        return HealthAnswer(status="ok")

    @api.get("/readyz", responses=_describe_problem_responses(503), summary="Whether there are models to serve")
    async def report_readiness() -> HealthAnswer:
        """Returns the status "ok" when the service has found a model."""
        await service.wait_until_ready()
        return HealthAnswer(status="ok")

    if service.settings.page:
        for path in _PAGE_FILES:
            api.add_api_route(path, _answer_page_file, include_in_schema=False)


async def _answer_page_file(request: Request) -> Response:
    """Answers a request for a file of the web page with its content."""
    return FileResponse(pathlib.Path(__file__).parent / "page" / _PAGE_FILES[request.scope["route"].path])


def _add_error_handlers(api: FastAPI) -> None:
    """Adds handlers that turn `HttpProblem`, invalid requests and HTTP errors into a problem document (RFC 9457).

    `RequestMiddleware` answers all other exceptions.
    """

    @api.exception_handler(HttpProblem)
    async def answer_problem(request: Request, problem: HttpProblem) -> Response:
        """Returns the problem document of an `HttpProblem`."""
        return problem.create_response(request.state.request_id)

    @api.exception_handler(RequestValidationError)
    async def answer_invalid_request(request: Request, error: RequestValidationError) -> Response:
        """Returns a problem document with status 422 that lists the first five errors of a request."""
        detail = "; ".join(f"{'.'.join(str(key) for key in item['loc'])}: {item['msg']}" for item in error.errors()[:5])
        return await answer_problem(request, HttpProblem(422, "invalid-request", detail[:1000]))

    @api.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        """Returns a problem document for an HTTP error of the framework, such as 404 for an unknown path."""
        codes = {
            404: ("not-found", "there is nothing at this path; /openapi.json says what there is"),
            405: ("method-not-allowed", f"this path does not support {request.method}"),
        }
        code, detail = codes.get(error.status_code, ("bad-request", str(error.detail)[:300]))
        return await answer_problem(
            request, HttpProblem(error.status_code, code, detail, headers=dict(error.headers or {}))
        )


def _choose_output_format(accept: str) -> Output:
    """Returns "json" if an Accept header allows JSON, or "heatmap" if it allows only PNG. Raises: HttpProblem: 406, neither."""
    media_types = [entry.partition(";")[0].strip().lower() for entry in accept.split(",") if entry.strip()]
    if not media_types or any(name in ("*/*", "application/*", "application/json") for name in media_types):
        return "json"
    if any(name in (PNG, "image/*") for name in media_types):
        return "heatmap"
    raise HttpProblem(406, "not-acceptable", f"Accept {accept[:100]!r}: this path offers application/json and {PNG}")


def _create_picture_response(version: Version, inspection: Inspection, picture: bytes) -> Response:
    """Returns an HTTP response with a PNG picture as its body, and the result of the image in its headers."""
    headers = {
        "x-score": repr(inspection.score),
        "x-p-value": repr(inspection.p_value),
        "x-threshold": repr(inspection.threshold),
        "x-verdict": inspection.verdict,
        "x-version": version.name,
        "x-sha256": version.sha256,
    }
    return Response(picture, media_type=PNG, headers=headers)


def _format_image_result(
    name: str, result: Inspection | ImageError, values: EncodedAnomalyMap | None
) -> dict[str, Any]:
    """Returns the result of one image as a dictionary with fields of `ImageResultAnswer`.

    Args:
        name: file name of the image in the request.
        values: values of the anomaly map; None: the result has no field `map`.
    """
    if isinstance(result, ImageError):
        return {"name": name, "error": {"reason": result.reason, "detail": str(result)}}
    body = {"name": name, "verdict": result.verdict, **result.to_dict()}
    if values is not None:
        body["map"] = {"png": base64.b64encode(values.png).decode(), "high": values.high}
    return body


def _format_version(version: Version) -> VersionAnswer:
    """Returns a published version in the form of an answer."""
    published_at = version.published_at.isoformat()
    return VersionAnswer(
        version=version.name, sha256=version.sha256, published_at=published_at, num_bytes=version.num_bytes
    )


def _describe_json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the OpenAPI description of a JSON body that `read_json_body` reads."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _describe_problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI description of problem documents with these HTTP statuses."""
    content = {MEDIA_TYPE: {"schema": ProblemDocument.model_json_schema()}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}
