"""MLflow: one run per category or trial, below the run of its group.

Records go to a server, a database, or an SQLite database in a local folder. MLflow 3.17 itself refuses its old format, a
folder of plain files.
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

from focus_ray.errors import ConfigError, require_extra
from focus_ray.tracking.base import ParameterValue, Picture, RunDescription, local_folder, without_secrets
from focus_ray.tracking.settings import TrackerConfig

_KEY = "focus_ray.key"
_MAX_ITEMS = 100  # parameters, tags or metrics in a request
_TIMEOUT_S = 10  # of a request; the defaults of MLflow wait for minutes
_ENVIRONMENT = {  # environment variables of MLflow, set unless the user has set them
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for results
}


class _MLflowRun:
    """A begun run in MLflow."""

    def __init__(self, client: Any, run_id: str, is_new: bool, was_finished: bool) -> None:
        self.client, self.run_id, self.is_new, self.was_finished = client, run_id, is_new, was_finished
        self._logged_steps: dict[str, set[int]] = {}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or replaces existing tags."""

        from mlflow.entities import RunTag

        items = iter(tags.items())
        while items_batch := list(islice(items, _MAX_ITEMS)):
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in items_batch])

    def log_parameters(self, parameters: Mapping[str, ParameterValue]) -> None:
        """Adds parameters to the run. MLflow refuses to change an existing parameter."""

        from mlflow.entities import Param

        items = iter(parameters.items())
        while items_batch := list(islice(items, _MAX_ITEMS)):
            self.client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in items_batch])

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to curves at a step. Skips curves that already have a value at this step."""
        self._send_metrics(
            step, {name: value for name, value in metrics.items() if step not in self._existing_steps(name)}
        )
        for name in metrics:
            self._logged_steps[name].add(step)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sets metrics that have one value per run."""
        self._send_metrics(0, metrics)

    def _send_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends metrics at a step to MLflow, in requests of at most _MAX_ITEMS metrics."""

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        items = iter(metrics.items())
        while items_batch := list(islice(items, _MAX_ITEMS)):
            self.client.log_batch(self.run_id, metrics=[Metric(key, value, now_ms, step) for key, value in items_batch])

    def _existing_steps(self, name: str) -> set[int]:
        """Returns the steps of a curve that already have a value: MLflow would store a second value too."""
        if name not in self._logged_steps:
            history = [] if self.is_new else self.client.get_metric_history(self.run_id, name)
            self._logged_steps[name] = {metric.step for metric in history}
        return self._logged_steps[name]

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Adds pictures with their captions."""
        with tempfile.TemporaryDirectory() as folder:
            for picture in pictures:
                Path(folder, f"{picture.name}.jpg").write_bytes(picture.jpeg)
            lines = (f"{picture.name}.jpg: {picture.caption}\n" for picture in pictures)
            Path(folder, "captions.txt").write_text("".join(lines), encoding="utf-8")
            self.client.log_artifacts(self.run_id, folder, "heat_maps")

    def end(self, failed: bool) -> None:
        """Ends the run as finished or as failed. A finished run that was continued stays finished, unless `failed` is True."""
        if failed or not self.was_finished:
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class _MLflow:
    """An opened MLflow store."""

    def __init__(self, uri: str, artifacts: str | None, project: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = _get_experiment(self.client, project, artifacts)

    def _find_run(self, run: RunDescription) -> Any:
        """Returns MLflow's run with the tag `focus_ray.key` = `run.key`; None if there is none."""
        runs = self.client.search_runs([self.experiment], f"tags.`{_KEY}` = '{run.key}'", max_results=1)
        return runs[0] if runs else None

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if the run exists and is not in progress."""
        mlflow_run = self._find_run(run)
        return mlflow_run is not None and mlflow_run.info.status != "RUNNING"

    def begin_run(self, run: RunDescription) -> _MLflowRun:
        """Continues MLflow's run with the key `run.key`, or creates it. Adds parameters and tags."""
        mlflow_run = self._find_run(run)
        if mlflow_run is not None:
            was_finished = mlflow_run.info.status == "FINISHED"
            if not was_finished:
                self.client.update_run(mlflow_run.info.run_id, status="RUNNING")
            begun = _MLflowRun(self.client, mlflow_run.info.run_id, False, was_finished)
            # MLflow refuses to change a parameter; the existing parameters are those at the start of the run.
            new = {key: value for key, value in run.parameters.items() if key not in mlflow_run.data.params}
        else:
            tags = {_KEY: run.key}
            if run.group is not None:
                tags["mlflow.parentRunId"] = self.begin_run(run.group).run_id
            mlflow_run = self.client.create_run(self.experiment, tags=tags, run_name=run.name)
            begun, new = _MLflowRun(self.client, mlflow_run.info.run_id, True, False), dict(run.parameters)
        begun.log_parameters(new)
        begun.set_tags(run.tags)
        return begun


def _get_experiment(client: Any, name: str, artifacts: str | None) -> str:
    """Returns the id of an experiment; creates the experiment if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:  # another process created it at the same moment
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


class MLflow:
    """The tracker kind `mlflow`: checks and opens an MLflow store."""

    def check(self, settings: TrackerConfig, storage: str) -> str:
        """Checks the package, and the local folder or the HTTP server. Does not connect to a database.

        Also sets environment variables of MLflow (_ENVIRONMENT) that the user has not set.

        Returns:
            The address of the store, without passwords.

        Raises:
            MissingPackageError: The extra `mlflow` is not installed.
            ConfigError: The folder cannot be written, or the server does not answer.
        """
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        require_extra("mlflow", "trackers.mlflow")
        uri, _ = _find_location(settings, storage)
        if uri.startswith(("http://", "https://")):
            _check_server(uri)
        return without_secrets(uri)  # MLFLOW_TRACKING_URI may hold a password

    def open(self, settings: TrackerConfig, storage: str) -> _MLflow:
        """Opens the tracker after `check`."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # otherwise it logs every table that it creates
        logging.getLogger("alembic").setLevel(logging.WARNING)
        return _MLflow(*_find_location(settings, storage), settings.project)


def _find_location(settings: TrackerConfig, storage: str) -> tuple[str, str | None]:
    """Returns (tracking URI, URI for artifacts of a new experiment); None for artifacts lets the server decide."""
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in uri:
        return uri, None
    folder = local_folder("mlflow", settings.model_copy(update={"uri": uri or None}), storage)
    path = Path(folder).absolute()
    return f"sqlite:///{path}/mlflow.db", (path / "artifacts").as_uri()


def _check_server(uri: str) -> None:
    """Checks that the server accepts connections.

    Raises:
        ConfigError: The server does not answer.
    """
    parts = urllib.parse.urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"trackers.mlflow: the server at {parts.hostname}:{port} does not answer ({error}): start the server, set "
            "trackers.mlflow.uri to another server, or remove trackers.mlflow"
        ) from error


MLFLOW = MLflow()
