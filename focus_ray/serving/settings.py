"""What the service is told: one YAML, refused as a whole where a key or value is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from focus_ray.config import Section, parse_model
from focus_ray.names import NAME

Name = Annotated[str, Field(pattern=NAME)]
MIB = 2**20


class Scaling(Section):
    """How many replicas a deployment has, and when that changes."""

    min_replicas: int = Field(default=1, ge=0, le=1000, description="0: none while nothing is asked.")
    max_replicas: int = Field(default=1, ge=1, le=1000, description="Not below min_replicas; above it, load decides.")
    target_ongoing_requests: float = Field(
        default=16.0, gt=0.0, description="Requests a replica should have at once; half a batch keeps it busy."
    )
    upscale_delay_s: float = Field(default=5.0, ge=0.0, description="Load must last so long before a replica is added.")
    downscale_delay_s: float = Field(
        default=300.0, ge=0.0, description="And be gone so long before one is taken: loading models anew costs more."
    )
    downscale_to_zero_delay_s: float = Field(
        default=900.0, ge=0.0, description="For the last one, which min 0 lets go."
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
    num_gpus: float = Field(default=0.0, ge=0.0, description="A share lets several replicas live on one GPU.")
    num_threads: int = Field(default=1, ge=1, le=256, description="Of torch, on a CPU. As many as num_cpus, usually.")
    num_decoders: int = Field(default=2, ge=1, le=64, description="Threads that decode images and draw results.")
    max_batch_images: int = Field(default=32, ge=1, le=1024, description="Images a pass; of several categories too.")
    memory_mb: float = Field(
        default=4096.0, gt=0.0, description="Models kept at once, in MiB; the least recently used goes first."
    )
    max_ongoing_requests: int = Field(default=64, ge=1, description="Requests a replica takes on; others queue.")
    max_queued_requests: int = Field(default=512, ge=1, description="That wait for a replica; beyond it: 503.")
    graceful_shutdown_s: float = Field(default=30.0, gt=0.0, description="A replica that stops may finish so long.")
    scaling: Scaling = Scaling()


class Pin(Section):
    """Categories with replicas of their own, loaded before the first request."""

    name: Name = Field(description="Names the deployment.")
    team: Name = Field(description="Whose categories they are.")
    categories: tuple[Name, ...] = Field(min_length=1, description="Those that these replicas alone score.")
    pool: Pool = Pool()


class Route(Section):
    """Which version answers for a category when the request names none."""

    team: Name = Field(description="Whose category it is.")
    category: Name = Field(description="The category that this is about.")
    ref: Name = Field(default="latest", description="An alias or a version.")
    canary: Name | None = Field(default=None, description="Alias or version that answers a share of the requests.")
    canary_share: float = Field(default=0.05, ge=0.0, le=1.0, description="Of the requests that name no version.")
    shadow: Name | None = Field(default=None, description="Alias or version that scores too; the difference is logged.")
    shadow_share: float = Field(default=1.0, ge=0.0, le=1.0, description="Of the requests that name no version.")


class Limits(Section):
    """What is refused before it costs anything."""

    max_body_mb: float = Field(default=32.0, gt=0.0, description="Of a request, in MiB.")
    max_images: int = Field(default=32, ge=1, le=1024, description="Images a request.")
    max_pixels: int = Field(default=25_000_000, ge=1, description="Pixels an image, told by its header.")
    body_timeout_s: float = Field(default=30.0, gt=0.0, description="A body that takes longer to arrive: 408.")
    timeout_s: float = Field(default=60.0, gt=0.0, description="An answer that takes longer: 504.")
    max_in_flight: int = Field(default=256, ge=1, description="Requests at once, an ingress replica; beyond it: 503.")
    max_in_flight_mb: float = Field(default=512.0, gt=0.0, description="Their bodies, in MiB; beyond it: 503.")
    max_in_flight_per_team: int = Field(default=128, ge=1, description="Beyond it: 429.")
    retry_after_s: float = Field(default=1.0, ge=0.0, description="What Retry-After says, rounded up.")


class Sink(Section):
    """Inspected images and scores kept as Parquet, for retraining. Off unless set."""

    uri: str = Field(min_length=1, description="A folder or s3:// URI.")
    share: float = Field(default=0.01, ge=0.0, le=1.0, description="Of images found normal.")
    share_anomalous: float = Field(default=1.0, ge=0.0, le=1.0, description="Of images found anomalous.")
    retention_days: float = Field(default=30.0, gt=0.0, description="Days kept; older ones are deleted.")
    flush_every_s: float = Field(default=60.0, gt=0.0, description="What is kept is written at least so often.")
    max_rows: int = Field(default=256, ge=1, description="A file; it is written when so many are there.")
    max_buffer_mb: float = Field(
        default=64.0, gt=0.0, description="Waiting to be written; beyond it images are dropped."
    )


_INGRESS = Scaling(min_replicas=1, max_replicas=4, target_ongoing_requests=64.0)


class Settings(Section):
    """The whole service."""

    registry: str | None = Field(default=None, description="Root of a registry: a path or s3:// URI.")
    bundles: str | None = Field(default=None, description="Instead: a bundle, or a run's folder.")
    team: Name = Field(default="local", description="bundles: the team that they are served as.")
    default_ref: Name = Field(default="latest", description="Alias or version where neither request nor route says.")
    refresh_s: float = Field(default=2.0, gt=0.0, description="How soon a moved alias is seen.")
    tokens: str | None = Field(default=None, description="File of hashed tokens; made by `focus-ray token`.")
    open_to_all: bool = Field(default=False, description="Serve without tokens: for one's own machine only.")
    page: bool = Field(default=True, description="Whether / shows the page.")
    examples: bool = Field(
        default=False, description="Let readers see normal training images, where the data set can be reached."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What replicas score on. auto: a GPU where they have one."
    )
    ingress: Scaling = Field(
        default=_INGRESS, description="Replicas that take requests in; apart, they use no GPU and hold no model."
    )
    ingress_num_cpus: float = Field(
        default=0.5, ge=0.0, description="CPUs that Ray keeps for a replica that takes requests in."
    )
    together: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether the replicas that take requests in score them too: a hop less, but nothing else retries what "
        "a lost one had. auto: where the pool has exactly one replica, nothing is pinned, and ingress is not set.",
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
