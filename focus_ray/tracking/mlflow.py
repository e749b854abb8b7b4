"""MLflow: a run a subject, its group's run above it; on a server, in a database, or in SQLite in a local folder.

A folder of plain files, MLflow's former store, is refused by MLflow 3.17 itself.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from focus_ray.config import TrackerConfig
from focus_ray.errors import ConfigError
from focus_ray.extras import require_extra
from focus_ray.tracking.base import Picture, Subject, Value, local_folder, without_secrets

_KEY = "focus_ray.key"
_MOST = 100  # parameters, or tags, that a request may hold
_TIMEOUT_S = 10  # of a request; MLflow's own defaults wait for minutes
_SETTINGS = {  # of MLflow's own variables, where they are not set
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which is for results
}


class _Tracked:
    def __init__(self, client: Any, run_id: str, is_new: bool, was_finished: bool) -> None:
        self.client, self.run_id, self.is_new, self.was_finished = client, run_id, is_new, was_finished
        self._known: dict[str, set[int]] = {}

    def tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        items = iter(tags.items())
        while some := list(islice(items, _MOST)):
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in some])

    def parameters(self, parameters: Mapping[str, Value]) -> None:
        from mlflow.entities import Param

        items = iter(parameters.items())
        while some := list(islice(items, _MOST)):
            self.client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in some])

    def curve(self, step: int, figures: Mapping[str, float]) -> None:
        self._put(step, {name: value for name, value in figures.items() if step not in self._steps(name)})
        for name in figures:
            self._known[name].add(step)

    def figures(self, figures: Mapping[str, float]) -> None:
        self._put(0, figures)

    def _put(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        items = iter(figures.items())
        while some := list(islice(items, _MOST)):
            self.client.log_batch(self.run_id, metrics=[Metric(key, value, now_ms, step) for key, value in some])

    def _steps(self, name: str) -> set[int]:
        """Where a curve has values already: MLflow would keep a second one beside the first."""
        if name not in self._known:
            former = [] if self.is_new else self.client.get_metric_history(self.run_id, name)
            self._known[name] = {metric.step for metric in former}
        return self._known[name]

    def pictures(self, pictures: Sequence[Picture]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for picture in pictures:
                Path(folder, f"{picture.name}.jpg").write_bytes(picture.jpeg)
            lines = (f"{picture.name}.jpg: {picture.caption}\n" for picture in pictures)
            Path(folder, "captions.txt").write_text("".join(lines), encoding="utf-8")
            self.client.log_artifacts(self.run_id, folder, "heat_maps")

    def end(self, failed: bool) -> None:
        if failed or not self.was_finished:
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class _MLflow:
    def __init__(self, uri: str, artifacts: str | None, project: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = _experiment(self.client, project, artifacts)

    def _find(self, subject: Subject) -> Any:
        """None where there is none."""
        found = self.client.search_runs([self.experiment], f"tags.`{_KEY}` = '{subject.key}'", max_results=1)
        return found[0] if found else None

    def has(self, subject: Subject) -> bool:
        run = self._find(subject)
        return run is not None and run.info.status != "RUNNING"

    def begin(self, subject: Subject) -> _Tracked:
        run = self._find(subject)
        if run is not None:
            was_finished = run.info.status == "FINISHED"
            if not was_finished:
                self.client.update_run(run.info.run_id, status="RUNNING")
            tracked = _Tracked(self.client, run.info.run_id, False, was_finished)
            # a parameter cannot be changed, and what is there says how the run began
            new = {key: value for key, value in subject.parameters.items() if key not in run.data.params}
        else:
            tags = {_KEY: subject.key}
            if subject.group is not None:
                tags["mlflow.parentRunId"] = self.begin(subject.group).run_id
            run = self.client.create_run(self.experiment, tags=tags, run_name=subject.name)
            tracked, new = _Tracked(self.client, run.info.run_id, True, False), dict(subject.parameters)
        tracked.parameters(new)
        tracked.tag(subject.tags)
        return tracked


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Its id; made where there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:  # another run was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


class MLflow:
    def check(self, settings: TrackerConfig, storage: str) -> str:
        for key, value in _SETTINGS.items():
            os.environ.setdefault(key, value)
        require_extra("mlflow", "trackers.mlflow")
        uri, _ = _place(settings, storage)
        if uri.startswith(("http://", "https://")):
            _reach(uri)
        return without_secrets(uri)  # MLFLOW_TRACKING_URI may hold a password

    def open(self, settings: TrackerConfig, storage: str) -> _MLflow:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells every table that it makes
        logging.getLogger("alembic").setLevel(logging.WARNING)
        return _MLflow(*_place(settings, storage), settings.project)


def _place(settings: TrackerConfig, storage: str) -> tuple[str, str | None]:
    """The tracking URI, and where artifacts of a new experiment go; None: as the server says."""
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in uri:
        return uri, None
    folder = local_folder("mlflow", settings.model_copy(update={"uri": uri or None}), storage)
    path = Path(folder).absolute()
    return f"sqlite:///{path}/mlflow.db", (path / "artifacts").as_uri()


def _reach(uri: str) -> None:
    """Raises: ConfigError: nothing listens there."""
    parts = urllib.parse.urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"trackers.mlflow: the server at {parts.hostname}:{port} does not answer ({error}): start it, set "
            "trackers.mlflow.uri to another, or leave trackers.mlflow out"
        ) from error


MLFLOW = MLflow()
