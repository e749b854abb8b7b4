"""The tracker MLflow: one MLflow run for each category or trial, below the run of the whole training or sweep.

The data go to a server, a database, or an SQLite database in a local folder. MLflow 3.17 itself refuses its old format, a
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
from pathlib import Path
from typing import Any

from focus_ray.errors import ConfigError, check_extra_is_installed
from focus_ray.tracking.base import (
    CaptionedPicture,
    ParameterValue,
    RunDescription,
    Tracker,
    find_writable_folder,
    remove_uri_secrets,
)
from focus_ray.tracking.settings import PROJECT, TrackerConfig

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
    """An open run in MLflow, as `TrackerRun`."""

    def __init__(self, client: Any, run_id: str) -> None:
        """Wraps an existing run. client: an `MlflowClient`; run_id: MLflow's id of the run."""
        self.client, self.run_id = client, run_id
        self._existing_steps: dict[str, set[int]] = {}  # of curves that an earlier process may have begun

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds tags, or replaces existing tags."""
        from mlflow.entities import RunTag

        self._send_batches("tags", [RunTag(key, value) for key, value in tags.items()])

    def log_parameters(self, parameters: Mapping[str, ParameterValue]) -> None:
        """Adds parameters to the run. They must be new: MLflow raises an exception for a changed parameter."""
        from mlflow.entities import Param

        self._send_batches("params", [Param(key, str(value)) for key, value in parameters.items()])

    def log_step_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the value of each metric to its curve at a step.

        Skips a curve to which an earlier process has added a value at this step, because MLflow would store both values.
        """
        for name in metrics.keys() - self._existing_steps.keys():
            self._existing_steps[name] = {point.step for point in self.client.get_metric_history(self.run_id, name)}
        new = {name: value for name, value in metrics.items() if step not in self._existing_steps[name]}
        self.log_metrics(new, step)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Sets metrics that have one value per run. With `step`, adds the value of each metric to its curve at this step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._send_batches("metrics", [Metric(key, value, now_ms, step) for key, value in metrics.items()])

    def _send_batches(self, kind: str, items: Sequence[Any]) -> None:
        """Sends tags, parameters or metrics to MLflow, in requests of at most _MAX_ITEMS items.

        Args:
            kind: Name of the argument of `log_batch`: "tags", "params" or "metrics".
            items: MLflow objects of this kind.
        """
        for start in range(0, len(items), _MAX_ITEMS):
            self.client.log_batch(self.run_id, **{kind: items[start : start + _MAX_ITEMS]})

    def log_pictures(self, pictures: Sequence[CaptionedPicture]) -> None:
        """Adds pictures as files, and a file captions.txt with their captions."""
        with tempfile.TemporaryDirectory() as folder:
            for picture in pictures:
                Path(folder, f"{picture.name}.jpg").write_bytes(picture.jpeg)
            lines = (f"{picture.name}.jpg: {picture.caption}\n" for picture in pictures)
            Path(folder, "captions.txt").write_text("".join(lines), encoding="utf-8")
            self.client.log_artifacts(self.run_id, folder, "heat_maps")

    def end(self, failed: bool) -> None:
        """Ends the run as finished or as failed. A run that is finished already keeps its end time, unless `failed` is True."""
        if failed or self.client.get_run(self.run_id).info.status != "FINISHED":
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class MLflowTracker(Tracker):
    """The tracker MLflow, opened: one experiment on a server or in a database."""

    @classmethod
    def check_usable(cls, settings: TrackerConfig, storage: str) -> str:
        """Checks that MLflow is installed, and that the local folder can be written or the HTTP server answers.

        Does not connect to a database. Sets the environment variables in _ENVIRONMENT that the user has not set.

        Returns:
            The address of the server or database, without passwords.

        Raises:
            MissingPackageError: The package extra `mlflow` is not installed.
            ConfigError: The folder cannot be written, or the server does not answer.
        """
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        check_extra_is_installed("mlflow", "trackers.mlflow")
        uri, _ = _find_storage_uris(settings, storage)
        if uri.startswith(("http://", "https://")):
            _check_server_reachable(uri)
        return remove_uri_secrets(uri)  # MLFLOW_TRACKING_URI may hold a password

    def __init__(self, settings: TrackerConfig, storage: str) -> None:
        """Connects to the server or database, and opens or creates the experiment.

        MLFLOW_EXPERIMENT_NAME names the experiment; the default is `PROJECT`.

        Raises:
            ConfigError: The local folder cannot be written.
            MlflowException: The experiment can neither be created nor opened.
        """
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # otherwise they log every table that they create
        uri, artifacts = _find_storage_uris(settings, storage)
        self.client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            self.experiment_id = str(self.client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:  # it could not be created
                raise
            self.experiment_id = str(experiment.experiment_id)

    def has_run(self, run: RunDescription) -> bool:
        """Returns True if MLflow has the run and its status is not RUNNING."""
        mlflow_run = self._find_run(run)
        return mlflow_run is not None and mlflow_run.info.status != "RUNNING"

    def begin_run(self, run: RunDescription) -> _MLflowRun:
        """Opens MLflow's run with the key `run.key`, or creates it below its parent run. Adds tags and missing parameters.

        A run that was not finished gets the status RUNNING again. A finished run stays finished.
        """
        mlflow_run = self._find_run(run)
        if mlflow_run is None:
            tags = {_KEY: run.key}
            if run.parent is not None:
                tags["mlflow.parentRunId"] = self.begin_run(run.parent).run_id
            mlflow_run = self.client.create_run(self.experiment_id, tags=tags, run_name=run.name)
        elif mlflow_run.info.status != "FINISHED":
            self.client.update_run(mlflow_run.info.run_id, status="RUNNING")
        begun = _MLflowRun(self.client, mlflow_run.info.run_id)
        # MLflow refuses to change a parameter; the existing parameters are those at the start of the run.
        existing = mlflow_run.data.params
        begun.log_parameters({key: value for key, value in run.parameters.items() if key not in existing})
        begun.set_tags(run.tags)
        return begun

    def _find_run(self, run: RunDescription) -> Any:
        """Returns MLflow's object for the run with the tag `focus_ray.key` = `run.key`; None if there is none."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{_KEY}` = '{run.key}'", max_results=1)
        return runs[0] if runs else None


def _find_storage_uris(settings: TrackerConfig, storage: str) -> tuple[str, str | None]:
    """Returns (tracking URI of MLflow, URI for pictures of a new experiment). None instead of the second: the server decides.

    The tracking URI comes from the settings, or without them from MLFLOW_TRACKING_URI. A local path, or neither of the two,
    means an SQLite database in a local folder.

    Raises:
        ConfigError: The local folder cannot be written.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in uri:
        return uri, None
    path = Path(find_writable_folder("mlflow", settings.model_copy(update={"uri": uri or None}), storage)).absolute()
    return f"sqlite:///{path}/mlflow.db", (path / "artifacts").as_uri()


def _check_server_reachable(uri: str) -> None:
    """Checks that a server accepts a network connection. uri: http or https address of the server.

    Raises:
        ConfigError: The server does not answer within _TIMEOUT_S seconds.
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
