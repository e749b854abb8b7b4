"""Reads and writes the folder of a sweep: its configuration, one record (result) per trial, and the best configuration. No Ray.

    sweep.yaml  data.json  state.json  owners/<number>.json  trials/<number>.json  best.yaml  report.html  ...

A trial writes its own record when it ends, completely or not at all. So no finished trial is lost when the driver (the process
of the sweep) dies, and two processes never write the same object.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from focus_ray.cluster.ownership import FINGERPRINTS_FILE, read_run_state, write_image_fingerprints
from focus_ray.errors import SweepError
from focus_ray.fitting.settings import convert_earlier_settings
from focus_ray.names import Log
from focus_ray.settings.sections import config_to_yaml
from focus_ray.settings.yaml_text import load_yaml
from focus_ray.storage.files import (
    file_exists,
    join_path,
    list_folder_entries,
    read_bytes,
    write_bytes,
    write_bytes_if_absent,
)
from focus_ray.sweep.settings import Point, SweepConfig, parse_sweep_config

SWEEP_FILE, TRIALS_FOLDER = "sweep.yaml", "trials"
DECIMALS = 4  # of a printed score; scores that are equal to this precision count as equal


@dataclass(frozen=True)
class TrialRecord:
    """The result of one trial of a sweep, the content of a file in the folder of the sweep.

    Attributes:
        number: Number of the trial in its stage (one search for one category or for all).
        stage: Category that the trial searched for; None if it searched for all categories.
        point: Settings of the trial: dotted key -> value.
        status: "finished", "cut" (pruned, i.e. stopped early for a low score) or "failed". A resumed sweep runs failed trials
            again.
        score: Mean score over the categories; None unless finished.
        categories: Category -> `trial.CategoryResult` as a dict.
        reason: Why the trial was pruned or failed.
        steps: Number of trained steps over all categories.
        seconds: Duration of the trial.
        ended_at: Unix time of the trial's end.
    """

    number: int
    stage: str | None
    point: Point
    status: str
    score: float | None
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    reason: str | None = None
    steps: int = 0
    seconds: float = 0.0
    ended_at: float = 0.0

    @property
    def name(self) -> str:
        """The name of the trial, unique in the sweep, such as 00003 or screws-00003."""
        return f"{self.number:05d}" if self.stage is None else f"{self.stage}-{self.number:05d}"

    @property
    def category_scores(self) -> dict[str, float]:
        """The final scores of the trial: category -> score. Categories without a final score are left out."""
        scores = {name: result.get("score") for name, result in self.categories.items()}
        return {name: score for name, score in scores.items() if score is not None}

    def parse_curves(self) -> dict[str, list[tuple[int, float]]]:
        """Returns all scores of the trial: category -> list of (trained steps, score)."""
        return {name: [(int(e), float(s)) for e, s in result["curve"]] for name, result in self.categories.items()}


_RECORD = TypeAdapter(TrialRecord)


def write_trial_record(root: str, record: TrialRecord) -> None:
    """Writes the result of a trial to the folder of the sweep.

    Args: root: Folder of the sweep.

    Raises: DataError: the file cannot be written.
    """
    text = json.dumps(dataclasses.asdict(record), allow_nan=False, indent=1)
    write_bytes(join_path(root, TRIALS_FOLDER, f"{record.name}.json"), (text + "\n").encode())


def read_trial_records(root: str) -> list[TrialRecord]:
    """Reads the results of all ended trials of a sweep, sorted by stage and number.

    Args: root: Folder of the sweep.

    Raises:
        SweepError: A file is not a valid result of a trial.
        DataError: The folder cannot be read.
    """
    records = []
    for name in list_folder_entries(join_path(root, TRIALS_FOLDER)):
        if not name.endswith(".json") or name.startswith("."):
            continue
        file = join_path(root, TRIALS_FOLDER, name)
        try:
            records.append(_RECORD.validate_json(read_bytes(file)))
        except ValidationError as error:
            raise SweepError(
                f"{file}: not a valid record of a trial: delete the file, then the trial is run again; {error.errors()[0]}"
            ) from None
    return sorted(records, key=lambda record: (record.stage or "", record.number))


def make_ranking_key(record: TrialRecord) -> tuple[bool, float, str, int]:
    """Returns a sort key that puts the best trial first: finished trials by score and number, then all other trials."""
    score = 0.0 if record.score is None else record.score
    return record.status != "finished", -round(score, DECIMALS), record.status, record.number


def find_best_records(records: Sequence[TrialRecord]) -> dict[str | None, TrialRecord]:
    """Returns the best finished trial of each stage: stage -> its record, sorted by stage.

    A stage is the search for one category; None is the search for all categories together.
    """
    best: dict[str | None, TrialRecord] = {}
    for record in sorted(
        select_finished_records(records), key=lambda record: (record.stage or "", make_ranking_key(record))
    ):
        best.setdefault(record.stage, record)
    return best


def select_finished_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns the results of the finished trials only. These trials have a score."""
    return [record for record in records if record.status == "finished"]


def count_statuses(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Counts the trials by status: returns "finished", "cut" (stopped early) and "failed" -> number of trials."""
    return {status: sum(record.status == status for record in records) for status in ("finished", "cut", "failed")}


def name_best_config_file(stage: str | None) -> str:
    """Returns the name of the file with the best configuration of a stage.

    Args: stage: Category of the stage; None: all categories.
    """
    return "best.yaml" if stage is None else f"best-{stage}.yaml"


def uses_labelled_images(sweep: SweepConfig) -> bool:
    """Returns whether the scores of the sweep come from labelled test images."""
    return sweep.objective != "validation"


def describe_objective(sweep: SweepConfig) -> str:
    """Returns what the sweep maximizes, in words; the text contains "LABELLED" if labelled test images are used."""
    return (
        f"{sweep.objective} on LABELLED test images" if uses_labelled_images(sweep) else "label-free validation score"
    )


def format_setting_value(value: Any) -> str:
    """Returns the value of a setting as a short text, numbers with 4 digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def check_folder_has_no_sweep(root: str) -> None:
    """Checks that the folder contains no sweep.

    Raises:
        SweepError: The folder contains a sweep.
        DataError: The storage fails.
    """
    if file_exists(join_path(root, SWEEP_FILE)):
        raise SweepError(f"{root} already contains a sweep: give another name, or `focus-ray sweep resume {root}`")


def claim_sweep_folder(root: str, sweep: SweepConfig, fingerprints: Mapping[str, str]) -> None:
    """Takes possession of a folder for a new sweep: writes its configuration and the fingerprints of its images.

    Args:
        root: Folder of the sweep.
        sweep: Configuration of the sweep.
        fingerprints: Category -> `data_fingerprint` of its images.

    Raises:
        SweepError: The folder already contains a sweep, which another process may have started at the same moment.
        DataError: The storage fails.
    """
    # The file is only created if it does not exist, and its first line is unique. So one process wins, and everything
    # else in the folder is written by the winner alone.
    text = f"# begun by {socket.gethostname()}, {uuid.uuid4().hex}\n{config_to_yaml(sweep)}"
    if not write_bytes_if_absent(join_path(root, SWEEP_FILE), text.encode()):
        check_folder_has_no_sweep(root)
    write_image_fingerprints(root, fingerprints)


def read_sweep_config(root: str) -> SweepConfig:
    """Reads the configuration of the sweep in a folder.

    Raises:
        SweepError: The folder contains no sweep.
        ConfigError: The configuration is not valid.
        DataError: The storage fails.
    """
    try:
        text = read_bytes(join_path(root, SWEEP_FILE))
    except FileNotFoundError:
        raise SweepError(f"{root}: contains no sweep: give the folder that `focus-ray sweep` printed") from None
    tree = load_yaml(text)
    tree["base"] = convert_earlier_settings(tree["base"])
    return parse_sweep_config(tree, source=join_path(root, SWEEP_FILE))


def summarize_progress(
    root: str, sweep: SweepConfig, records: Sequence[TrialRecord], log: Log = lambda message: None
) -> dict[str, Any]:
    """Returns the progress of a sweep as JSON values: state, process, number of trials by status, and the best trials.

    It may wait for a heartbeat of the sweep, up to `LEASE_S`.

    Args:
        root: Folder of the sweep.
        sweep: Configuration of the sweep.
        records: Results of its trials.
        log: Called with a message if the function waits.

    Raises:
        DataError: The storage fails.
    """
    num_stages = 1
    if sweep.scope == "per_category":
        num_stages = len(json.loads(read_bytes(join_path(root, FINGERPRINTS_FILE))))
    return {
        **{key: value for key, value in read_run_state(root, log).items() if key in ("state", "host", "pid")},
        "storage": sweep.make_trial_config().storage,
        "objective": describe_objective(sweep),
        "planned": sweep.num_planned_trials * num_stages,
        **count_statuses(records),
        "steps": sum(record.steps for record in records),
        "best": {
            stage or "all categories": {"trial": record.number, "score": record.score, **record.point}
            for stage, record in find_best_records(records).items()
        },
    }


def format_best_config(sweep: SweepConfig, record: TrialRecord, root: str) -> str:
    """Returns the configuration of a trial as YAML text, ready for `focus-ray train`, with comments about its score.

    The run gets the name of the sweep with the suffix `-best` (and the category), and the storage of the sweep.

    Args:
        sweep: Configuration of the sweep.
        record: Result of the best trial, which has a score.
        root: Folder of the sweep, for the comments.
    """
    config = sweep.make_trial_config(record.point)
    categories = config.data.categories if record.stage is None else (record.stage,)
    suffix = "-best" if record.stage is None else f"-best-{record.stage}"
    name = f"{str(sweep.name)[: 100 - len(suffix)]}{suffix}"
    config = config.model_copy(update={"name": name, "data": config.data.model_copy(update={"categories": categories})})
    trial = f"trial {record.number}{f' for {record.stage}' if record.stage else ''}"
    comments = [
        f"Best of {root}, {trial}: {describe_objective(sweep)} {record.score:.4f}",
        ", ".join(f"{key}={json.dumps(value)}" for key, value in record.point.items()),
    ]
    if uses_labelled_images(sweep):
        comments.append("Chosen with labelled test images: metrics on these images are no longer a fair test.")
    return "".join(f"# {line}\n" for line in comments) + config_to_yaml(config)
