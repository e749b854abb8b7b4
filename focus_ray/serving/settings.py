"""The settings of the service: one YAML file, which is refused if a key or value is wrong."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from focus_ray.names import NAME_PATTERN
from focus_ray.settings.sections import ConfigSection, validate_section
from focus_ray.storage.files import make_absolute_path

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
MIB = 2**20


class ReplicaScaling(ConfigSection):
    """The number of replicas of a deployment, and when Serve changes it."""

    FIXED: ClassVar = {"metrics_interval_s": 2.0}

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Fewest replicas. 0 stops the last replica while there are no requests; the next request then waits for "
        "its start.",
    )
    max_replicas: int = Field(
        default=1, ge=1, le=1000, description="Most replicas; at least min_replicas. The load decides between the two."
    )
    max_replicas_per_node: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Most replicas on one node. With 1 and min_replicas=2, the loss of a node never takes the last replica. "
        "null: any number.",
    )
    target_ongoing_requests: float = Field(
        default=16.0,
        gt=0.0,
        description="Requests that a replica should have at the same time; above it, replicas are added. Half a batch keeps "
        "a replica busy.",
    )
    upscale_delay_s: float = Field(
        default=5.0, ge=0.0, description="How long the load must be high before a replica is added."
    )
    downscale_delay_s: float = Field(
        default=300.0,
        ge=0.0,
        description="How long the load must be low before a replica is stopped: loading models again costs more than waiting.",
    )
    downscale_to_zero_delay_s: float = Field(
        default=900.0, ge=0.0, description="The same for the last replica if min_replicas is 0."
    )

    @model_validator(mode="after")
    def _check_replica_range(self) -> ReplicaScaling:
        """Checks the range of the number of replicas. Raises: ValueError: min_replicas is above max_replicas."""
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


class ScoringPool(ConfigSection):
    """A pool of replicas that score images."""

    FIXED: ClassVar = {"max_queued_requests": 512, "graceful_shutdown_s": 30.0}

    num_cpus: float = Field(default=1.0, ge=0.0, description="CPUs that Ray reserves for a replica.")
    num_gpus: float = Field(
        default=0.0,
        ge=0.0,
        description="GPUs that Ray reserves for a replica. A share such as 0.25 lets several replicas use one GPU.",
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes on which these replicas may run, in addition to those of the service.",
    )
    num_threads: int = Field(
        default=1, ge=1, le=256, description="Threads of torch on a CPU; usually equal to num_cpus."
    )
    num_decoders: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Processes that decode images, and threads that draw results. One team can use all except one.",
    )
    max_batch_images: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Most images in one pass through the network; they may belong to several categories.",
    )
    memory_mb: float = Field(
        default=4096.0,
        gt=0.0,
        description="MiB of models in the memory of a replica; above it, the least recently used model is dropped.",
    )
    max_ongoing_requests: int = Field(
        default=64,
        ge=1,
        description="Requests whose decoded images a replica has in memory, at most half from one team; others wait encoded.",
    )
    scaling: ReplicaScaling = ReplicaScaling()


class PinnedCategories(ConfigSection):
    """Categories with their own replicas, which load the models before the first request."""

    name: Name = Field(description="Name of the deployment.")
    team: Name = Field(description="The team that owns the categories.")
    categories: tuple[Name, ...] = Field(min_length=1, description="The only categories that these replicas score.")
    pool: ScoringPool = ScoringPool()


class VersionChoice(ConfigSection):
    """Settings that choose the version for requests that name no version. They may also name a canary and a shadow version."""

    team: Name = Field(description="The team that owns the category.")
    category: Name = Field(description="The category of the route.")
    ref: Name = Field(default="latest", description="The alias or version that answers.")
    canary: Name | None = Field(
        default=None, description="Alias or version that answers a share of the requests instead of ref."
    )
    canary_share: float = Field(
        default=0.05,
        ge=0.0,
        le=1.0,
        description="Share of the requests without a version that the canary answers.",
    )
    shadow: Name | None = Field(
        default=None,
        description="Alias or version that also scores requests but never answers; the differences are logged.",
    )
    shadow_share: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the requests without a version that the shadow scores.",
    )


class RequestLimits(ConfigSection):
    """Limits above which a request is refused; all but timeout_s are checked before the images are decoded."""

    # settings of earlier versions that always have these values now
    FIXED: ClassVar = {"body_timeout_s": 30.0, "retry_after_s": 1.0}

    max_body_mb: float = Field(
        default=32.0, gt=0.0, description="Largest body of a request, in MiB; above it the answer is 413."
    )
    max_images: int = Field(default=32, ge=1, le=1024, description="Most images in a request.")
    max_pixels: int = Field(
        default=25_000_000, ge=1, description="Most pixels of an image; checked in its header before it is decoded."
    )
    timeout_s: float = Field(
        default=60.0, gt=0.0, description="How long an answer may take; after it the answer is 504."
    )
    max_in_flight: int = Field(
        default=256,
        ge=1,
        description="Requests in flight in one ingress replica (a process that receives HTTP requests); above it the answer "
        "is 503.",
    )
    max_in_flight_mb: float = Field(
        default=512.0,
        gt=0.0,
        description="MiB of the bodies of the requests in flight in one ingress replica; above it the answer is 503.",
    )
    max_in_flight_per_team: int = Field(
        default=128,
        ge=1,
        description="Requests of one team in flight in one ingress replica; above it the answer is 429.",
    )


class SinkSettings(ConfigSection):
    """Inspected images and scores stored as Parquet for retraining. Off by default."""

    FIXED: ClassVar = {"flush_every_s": 60.0, "max_rows": 256, "max_buffer_mb": 64.0}

    uri: str = Field(min_length=1, description="Where inspected images are stored: a folder or an s3:// URI.")
    share: float = Field(default=0.01, ge=0.0, le=1.0, description="Share of the normal images that is stored.")
    share_anomalous: float = Field(
        default=1.0, ge=0.0, le=1.0, description="Share of the anomalous images that is stored."
    )
    retention_days: float = Field(
        default=30.0, gt=0.0, description="Days that images are stored; older images are deleted."
    )


# replicas that receive requests have no model, so one serves more requests than a replica that scores
_INGRESS = ReplicaScaling(min_replicas=1, max_replicas=4, target_ongoing_requests=64.0)


class ServiceSettings(ConfigSection):
    """All settings of the service."""

    FIXED: ClassVar = {"together": "auto"}

    registry: str | None = Field(
        default=None, description="Root of the registry whose models are served: a path or an s3:// URI."
    )
    bundles: str | None = Field(default=None, description="Instead of registry: a bundle, or the folder of a run.")
    team: Name = Field(default="local", description="With bundles: the team that owns them.")
    default_ref: Name = Field(
        default="latest", description="Alias or version that answers if neither the request nor a route names one."
    )
    refresh_s: float = Field(
        default=2.0,
        gt=0.0,
        description="How often aliases and tokens are read again, which is how soon a change takes effect.",
    )
    tokens: str | None = Field(
        default=None, description="File of hashed tokens, made by `focus-ray token create`: a path or an s3:// URI."
    )
    open_to_all: bool = Field(default=False, description="Serves without tokens: on your own machine only.")
    page: bool = Field(default=True, description="Whether the web page is served at /.")
    examples: bool | dict[Name, tuple[str, ...]] = Field(
        default=False,
        description="Data sets whose normal training images callers with the scope read may see: for each team a list of "
        "paths or s3:// URIs, which include everything below. true allows every data set that a model names; only with bundles.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of the replicas that score. auto: a GPU if pool.num_gpus is above 0, or if `focus-ray serve` "
        "runs without a cluster on a machine with a GPU.",
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes on which replicas may run, each a value, !value, in(a,b) or !in(a,b): for instance "
        "{site: north}.",
    )
    ingress: ReplicaScaling = Field(
        default=_INGRESS,
        description="Number of replicas that receive requests and pass them to the replicas that score; they use no GPU and have "
        "no model. There are none if this is the default, the pool has exactly one replica, and there are no pins. That replica "
        "then receives requests too. This is faster, but the requests of a lost replica are not retried.",
    )
    ingress_num_cpus: float = Field(
        default=0.5, ge=0.0, description="CPUs that Ray reserves for a replica that receives requests."
    )
    pool: ScoringPool = ScoringPool()
    pins: tuple[PinnedCategories, ...] = ()
    routes: tuple[VersionChoice, ...] = ()
    limits: RequestLimits = RequestLimits()
    sink: SinkSettings | None = None

    @model_validator(mode="after")
    def _check_consistency(self) -> ServiceSettings:
        """Checks settings that depend on each other.

        Raises: ValueError: registry and bundles, or tokens and open_to_all, are both set or both absent; examples=true with a
            registry; or a name of a pin, a pinned category or a route occurs twice.
        """
        if (self.registry is None) == (self.bundles is None):
            raise ValueError("set either registry or bundles, and not both")
        if (self.tokens is None) != self.open_to_all:
            raise ValueError(
                f"tokens={self.tokens!r} and open_to_all={self.open_to_all}: set tokens to a file made by `focus-ray token "
                "create`; on your own machine only, set open_to_all=true instead"
            )
        if self.examples is True and self.registry is not None:
            raise ValueError(
                "examples=true would show every data set that a model in the registry names, also of other teams: name the "
                "locations that each team may show, for instance examples: {press: [s3://plant/data/press]}"
            )
        _check_unique_names("pins", [pin.name for pin in self.pins])
        _check_unique_names("pins", [f"{pin.team}/{category}" for pin in self.pins for category in pin.categories])
        _check_unique_names("routes", [f"{route.team}/{route.category}" for route in self.routes])
        return self

    @property
    def has_single_replica(self) -> bool:
        """Whether the service has a single replica, which receives the requests and also scores the images."""
        scaling = self.pool.scaling
        return scaling.min_replicas == scaling.max_replicas == 1 and not self.pins and self.ingress == _INGRESS


def _check_unique_names(setting: str, names: list[str]) -> None:
    """Checks that no name occurs twice in a setting. Raises: ValueError: a name occurs more than once."""
    repeated_names = sorted({name for name in names if names.count(name) > 1})
    if repeated_names:
        raise ValueError(f"{setting}: {', '.join(repeated_names)} is named twice")


def parse_service_settings(tree: dict[str, Any], source: str = "settings") -> ServiceSettings:
    """Validates a dictionary of settings, and returns the settings.

    Args: source: name of the dictionary in error messages.

    Raises: ConfigError: a key is unknown, a value is wrong, or settings contradict each other.
    """
    return validate_section(ServiceSettings, tree, source)


def make_service_paths_absolute(settings: ServiceSettings) -> ServiceSettings:
    """Returns a copy of the settings with absolute local paths, because replicas run in other folders."""
    tree = settings.model_dump(mode="json")
    for section, key in ((tree, "registry"), (tree, "bundles"), (tree, "tokens"), (tree["sink"] or {}, "uri")):
        if section.get(key) is not None:
            section[key] = make_absolute_path(section[key])
    if isinstance(settings.examples, dict):
        tree["examples"] = {
            team: [make_absolute_path(location) for location in locations]
            for team, locations in settings.examples.items()
        }
    return parse_service_settings(tree)
