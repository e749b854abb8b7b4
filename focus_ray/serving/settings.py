"""What the service is told: one YAML, refused as a whole where a key or value is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from focus_ray.config import Section, parse_model
from focus_ray.names import NAME_PATTERN

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
MIB = 2**20


class Scaling(Section):
    """How many replicas a deployment has, and when that changes."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Fewest replicas. 0 lets the last one go while nothing is asked; the next request then waits for a "
        "start.",
    )
    max_replicas: int = Field(
        default=1, ge=1, le=1000, description="Most replicas; not below min_replicas. Between the two, load decides."
    )
    target_ongoing_requests: float = Field(
        default=16.0,
        gt=0.0,
        description="Requests that a replica should have at once; more are added above it. Half a batch waiting keeps it "
        "busy.",
    )
    upscale_delay_s: float = Field(
        default=5.0, ge=0.0, description="How long load must last before a replica is added."
    )
    downscale_delay_s: float = Field(
        default=300.0,
        ge=0.0,
        description="How long load must be gone before a replica is taken away: loading models anew costs more than waiting.",
    )
    downscale_to_zero_delay_s: float = Field(
        default=900.0, ge=0.0, description="The same for the last replica, where min_replicas is 0."
    )
    metrics_interval_s: float = Field(default=2.0, gt=0.0, description="How often replicas tell their load.")

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


class Pool(Section):
    """Replicas that score."""

    num_cpus: float = Field(default=1.0, ge=0.0, description="CPUs that Ray keeps for a replica.")
    num_gpus: float = Field(
        default=0.0,
        ge=0.0,
        description="GPUs that Ray keeps for a replica. A share such as 0.25 lets several replicas live on one GPU.",
    )
    num_threads: int = Field(
        default=1, ge=1, le=256, description="Threads with which torch computes on a CPU; usually as many as num_cpus."
    )
    num_decoders: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Processes that decode images, and threads that draw results. One team uses all of them but one.",
    )
    max_batch_images: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Most images in one pass through the network; they may be of several categories.",
    )
    memory_mb: float = Field(
        default=4096.0,
        gt=0.0,
        description="MiB of models that a replica keeps in memory; beyond it the least recently used goes first.",
    )
    max_ongoing_requests: int = Field(
        default=64,
        ge=1,
        description="Requests whose decoded images a replica holds, at most half of them of one team; others wait encoded.",
    )
    max_queued_requests: int = Field(
        default=512, ge=1, description="Requests that may wait for a replica; beyond it the answer is 503."
    )
    graceful_shutdown_s: float = Field(
        default=30.0, gt=0.0, description="How long a replica that stops may finish its requests."
    )
    scaling: Scaling = Scaling()


class Pin(Section):
    """Categories with replicas of their own, loaded before the first request."""

    name: Name = Field(description="Name of the deployment.")
    team: Name = Field(description="The team that owns the categories.")
    categories: tuple[Name, ...] = Field(
        min_length=1, description="Categories that these replicas score, and no others."
    )
    pool: Pool = Pool()


class Route(Section):
    """Which version answers for a category when the request names none."""

    team: Name = Field(description="The team that owns the category.")
    category: Name = Field(description="The category that the route is about.")
    ref: Name = Field(default="latest", description="The alias or version that answers.")
    canary: Name | None = Field(
        default=None, description="Alias or version that answers a share of the requests in place of ref."
    )
    canary_share: float = Field(
        default=0.05,
        ge=0.0,
        le=1.0,
        description="Share of the requests that the canary answers, of those that name no version.",
    )
    shadow: Name | None = Field(
        default=None,
        description="Alias or version that scores requests too but never answers; the difference is logged.",
    )
    shadow_share: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the requests that the shadow scores, of those that name no version.",
    )


class Limits(Section):
    """What is refused before it costs anything."""

    max_body_mb: float = Field(
        default=32.0, gt=0.0, description="Largest body of a request, in MiB; beyond it the answer is 413."
    )
    max_images: int = Field(default=32, ge=1, le=1024, description="Most images in a request.")
    max_pixels: int = Field(
        default=25_000_000, ge=1, description="Most pixels of an image, told by its header before it is decoded."
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0.0, description="How long a body may take to arrive; beyond it the answer is 408."
    )
    timeout_s: float = Field(
        default=60.0, gt=0.0, description="How long an answer may take; beyond it the answer is 504."
    )
    max_in_flight: int = Field(
        default=256,
        ge=1,
        description="Requests that are taken in at once by a replica that takes requests in; beyond it the answer is 503.",
    )
    max_in_flight_mb: float = Field(
        default=512.0, gt=0.0, description="MiB of their bodies together; beyond it the answer is 503."
    )
    max_in_flight_per_team: int = Field(
        default=128, ge=1, description="Requests of one team at once; beyond it the answer is 429."
    )
    retry_after_s: float = Field(
        default=1.0, ge=0.0, description="Seconds that a client is told to wait (Retry-After), rounded up."
    )


class Sink(Section):
    """Inspected images and scores kept as Parquet, for retraining. Off unless set."""

    uri: str = Field(min_length=1, description="Where inspected images are kept: a folder or an s3:// URI.")
    share: float = Field(default=0.01, ge=0.0, le=1.0, description="Share of the images found normal that is kept.")
    share_anomalous: float = Field(
        default=1.0, ge=0.0, le=1.0, description="Share of the images found anomalous that is kept."
    )
    retention_days: float = Field(
        default=30.0, gt=0.0, description="Days that images are kept; older ones are deleted."
    )
    flush_every_s: float = Field(default=60.0, gt=0.0, description="Longest time until kept images are written.")
    max_rows: int = Field(
        default=256, ge=1, description="Images in a file; it is written as soon as so many are there."
    )
    max_buffer_mb: float = Field(
        default=64.0, gt=0.0, description="MiB of images that may wait to be written; beyond it images are dropped."
    )


_INGRESS = Scaling(min_replicas=1, max_replicas=4, target_ongoing_requests=64.0)


class Settings(Section):
    """The whole service."""

    registry: str | None = Field(
        default=None, description="Root of the registry whose models are served: a path or an s3:// URI."
    )
    bundles: str | None = Field(default=None, description="In place of registry: a bundle, or a run's folder.")
    team: Name = Field(default="local", description="With bundles: the team that they are served as.")
    default_ref: Name = Field(
        default="latest", description="Alias or version that answers where neither the request nor a route names one."
    )
    refresh_s: float = Field(
        default=2.0, gt=0.0, description="How often aliases and tokens are looked up, and so how soon a change is seen."
    )
    tokens: str | None = Field(
        default=None, description="File of hashed tokens, made by `focus-ray token create`: a path or an s3:// URI."
    )
    open_to_all: bool = Field(default=False, description="Serves without tokens: on your own machine only.")
    page: bool = Field(default=True, description="Whether the page is shown at /.")
    examples: bool | dict[Name, tuple[str, ...]] = Field(
        default=False,
        description="The data sets whose normal training images tokens with the scope read may see: for each team a list of "
        "paths or s3:// URIs, each with all below it. true shows whatever data set a model names, and is for bundles only.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What replicas score on. auto: a GPU where they have one."
    )
    ingress: Scaling = Field(
        default=_INGRESS,
        description="How many replicas take requests in, where they are apart from those that score; they use no GPU and "
        "hold no model.",
    )
    ingress_num_cpus: float = Field(
        default=0.5, ge=0.0, description="CPUs that Ray keeps for a replica that takes requests in."
    )
    together: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether the replicas that take requests in score them too: a hop less, but nothing else tries again "
        "what a lost one had. auto: yes where the pool has exactly one replica, nothing is pinned, and ingress "
        "is not set.",
    )
    pool: Pool = Pool()
    pins: tuple[Pin, ...] = ()
    routes: tuple[Route, ...] = ()
    limits: Limits = Limits()
    sink: Sink | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.registry is None) == (self.bundles is None):
            raise ValueError("set either registry or bundles, and not both")
        if self.tokens is None and not self.open_to_all:
            raise ValueError(
                "tokens is not set, so anyone could ask: name a file made by `focus-ray token create`, or set "
                "open_to_all=true on a machine of your own"
            )
        if self.tokens is not None and self.open_to_all:
            raise ValueError("tokens and open_to_all=true contradict each other: set one")
        if self.examples is True and self.registry is not None:
            raise ValueError(
                "examples=true would show any data set that a model in the registry names, another team's too: name the "
                "places that each team may show, as in examples: {press: [s3://plant/data/press]}"
            )
        if self.together is True and (self.pins or self.ingress != _INGRESS):
            given = "pins" if self.pins else "ingress"
            raise ValueError(f"together=true leaves no replicas for {given}: take it out, or set together=false")
        _once("pins", [pin.name for pin in self.pins])
        _once("pins", [f"{pin.team}/{category}" for pin in self.pins for category in pin.categories])
        _once("routes", [f"{route.team}/{route.category}" for route in self.routes])
        return self

    @property
    def is_together(self) -> bool:
        """`together`, resolved."""
        if self.together == "auto":
            scaling = self.pool.scaling
            return scaling.min_replicas == scaling.max_replicas == 1 and not self.pins and self.ingress == _INGRESS
        return self.together


def _once(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} is named twice")


def parse_settings(tree: dict[str, Any], source: str = "settings") -> Settings:
    """Validates a plain mapping. Raises: ConfigError: naming each key, its value and what was expected."""
    return parse_model(Settings, tree, source)
