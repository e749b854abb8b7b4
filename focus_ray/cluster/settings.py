"""Settings of the workers and resources that a run requests from Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from focus_ray.errors import ConfigError
from focus_ray.names import NAME_PATTERN
from focus_ray.settings.sections import ConfigSection, apply_overrides, validate_section

# Retries of a category after a lost worker, from its last checkpoint if it has one. More would repeat an error of the category.
MAX_FAILURES = 3


class ClusterConfig(ConfigSection):
    """Workers and resources that a run requests from Ray, and the owner of the run."""

    FIXED: ClassVar[Mapping[str, Any]] = {"priority": None, "namespace": None, "max_failures": MAX_FAILURES}

    team: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Owner of the run. It becomes part of the run's namespace, and of the name with name=auto. On a cluster with "
        "quotas for teams, workers use the quota of this team.",
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels of the nodes on which workers may run, each a value, !value, in(a,b) or !in(a,b).",
    )
    local: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether categories are trained in the command's own process, one after the other, without Ray. "
        "auto: true with one worker and without RAY_ADDRESS, labels and max_concurrent_categories.",
    )
    num_workers: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Workers that train one category together. With several workers, gradients are averaged (DDP).",
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Smallest number of workers with which a training starts or continues if machines are missing. It "
        "adds workers when machines return, from its last checkpoint. Results then depend on the times at "
        "which machines come and go. null waits for all num_workers.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether workers use GPUs. auto: true if the cluster has a GPU, one for each worker.",
    )
    cpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        description="CPUs that Ray reserves for a worker. The same number of threads decodes images.",
    )
    gpus_per_worker: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="GPUs that Ray reserves for a worker that uses GPUs. Below 1, workers of several categories share "
        "a GPU.",
    )
    memory_gib_per_worker: float | None = Field(
        default=None, gt=0.0, description="Memory that Ray reserves for a worker, in GiB. null reserves none."
    )
    max_cpus: float | None = Field(
        default=None,
        ge=0.0,
        description="CPUs to which the cluster can grow. null: the limit of its autoscaler, no limit if this limit is unknown, "
        "or the present CPUs without an autoscaler.",
    )
    max_gpus: float | None = Field(
        default=None, ge=0.0, description="GPUs to which the cluster can grow. null as in max_cpus."
    )
    max_concurrent_categories: int | None = Field(
        default=None,
        ge=1,
        description="Categories that are trained side by side. null trains as many as the cluster has room for.",
    )

    @property
    def min_workers_to_start(self) -> int:
        """The smallest number of workers with which a training may start: min_workers, or num_workers if min_workers is null."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def ray_namespace(self) -> str | None:
        """The namespace of named actors on the cluster; None, a new namespace for each process, without a team."""
        return f"focus-ray-{self.team}" if self.team else None

    @model_validator(mode="after")
    def _check_consistency(self) -> ClusterConfig:
        """Checks settings that depend on each other.

        Raises: ValueError: min_workers is above num_workers, or several workers would share a GPU.
        """
        if self.min_workers_to_start > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} is more than num_workers={self.num_workers}")
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} with num_workers={self.num_workers}: workers of one category "
                "cannot share a GPU; set one of the two to 1"
            )
        return self


DEFAULT_CLUSTER = ClusterConfig()


def parse_cluster_settings(overrides: Sequence[str]) -> ClusterConfig:
    """Returns the cluster settings of a command line. overrides: texts such as cluster.labels.site=a.

    Raises: ConfigError: a text is not a setting of the section cluster, or its value is not valid.
    """
    sections = apply_overrides({}, list(overrides))
    if unknown := sections.keys() - {"cluster"}:
        raise ConfigError(
            f"{', '.join(sorted(unknown))}: this command accepts only settings of the section cluster, such as "
            "cluster.labels.site=a"
        )
    return validate_section(ClusterConfig, sections.get("cluster") or {}, "cluster")


def check_settings_have_effect(config: ClusterConfig, keys: Collection[str], command: str) -> None:
    """Checks that only the settings which a command uses differ from their defaults.

    Args:
        keys: settings that the command uses, without "cluster.".
        command: name of the command, for the error message.

    Raises: ConfigError: another setting has a value that would have no effect.
    """
    for key, field in ClusterConfig.model_fields.items():
        if key not in keys and getattr(config, key) != field.default:
            advice = "use --workers" if key == "num_workers" else "leave it out"
            raise ConfigError(
                f"cluster.{key}={getattr(config, key)} has no effect on {command}: {advice}. Settings with an effect: "
                + ", ".join(f"cluster.{name}" for name in ClusterConfig.model_fields if name in keys)
            )
