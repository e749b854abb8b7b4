"""Summarizes the results of a sweep as tables of trials and sentences about the best trial, equally good trials, and caveats.

The terminal, report.md and report.html all take their tables and sentences from `summarize_stages`. Works without Ray.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from focus_ray.storage.files import join_path
from focus_ray.sweep import records
from focus_ray.sweep.records import DECIMALS, TrialRecord
from focus_ray.sweep.settings import SweepConfig

NOISE = 0.01  # a smaller difference between two scores means nothing (docs/learn/selection.md)
FEW_IMAGES = 20  # with fewer good or fewer bad images, a single image changes an AUROC by 0.01 or more
TRIALS_PER_PARAMETER = 10  # with fewer trials, parameter importance is only a hint
_SEED = "train.seed"
_MAX_NAMED = 8


@dataclass(frozen=True)
class SweepStageSummary:
    """The summary of one stage of a sweep. A stage is one search: for one category, or for all categories together.

    Attributes:
        stage: Category of the stage; None if trials cover all categories.
        trials: Results of the trials of the stage, the best first.
        best: The best trial; None if no trial finished.
        ties: Trials that cannot be distinguished from the best trial.
        header: Column names of the table of trials.
        rows: Cells of the table: one row for each of `trials`.
        results: Sentences about the best trial and the trials that are as good.
        caveats: Sentences about the limits of the scores.
    """

    stage: str | None
    trials: list[TrialRecord]
    best: TrialRecord | None
    ties: list[TrialRecord]
    header: list[str]
    rows: list[list[str]]
    results: list[str]
    caveats: list[str]


def summarize_stages(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> list[SweepStageSummary]:
    """Returns the summary of each stage of a sweep, sorted by stage.

    Args:
        sweep: Configuration of the sweep.
        trials: Results of all trials.
    """
    best_trials = records.find_best_records(trials)
    summaries = []
    for stage in sorted({record.stage for record in trials}, key=lambda stage: stage or ""):
        stage_trials = sorted((record for record in trials if record.stage == stage), key=records.make_ranking_key)
        best = best_trials.get(stage)
        ties: list[TrialRecord] = []
        results = []
        if best is not None:
            settings = ", ".join(f"{key} = {records.format_setting_value(value)}" for key, value in best.point.items())
            results.append(f"Best: trial {best.number}, {_format_score(best.score)}: {settings}.")
            ties, sentences = _find_ties(sweep, records.select_finished_records(stage_trials), best)
            results += sentences
        caveats = _list_caveats(sweep, stage_trials, len(ties))
        table = _make_trial_table(sweep, stage, stage_trials)
        summaries.append(SweepStageSummary(stage, stage_trials, best, ties, *table, results, caveats))
    return summaries


def format_sweep_summary(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """Returns the summary of a sweep (tables and sentences of all stages) as Markdown text, also readable in a terminal.

    Args:
        sweep: Configuration of the sweep.
        trials: Results of the trials.
    """
    tables, lists = [], []
    for summary in summarize_stages(sweep, trials):
        title = records.describe_objective(sweep) + (f", {summary.stage}" if summary.stage else "")
        lines = [summary.header, ["---"] * len(summary.header), *summary.rows]
        tables += [f"**{title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
        lists += [f"**{summary.stage or 'all categories'}**", ""]
        lists += [*(f"- {sentence}" for sentence in [*summary.results, *summary.caveats]), ""]
    return "\n".join([*tables, *lists])


def list_train_commands(root: str, trials: Sequence[TrialRecord]) -> list[str]:
    """Returns one `focus-ray train` command for the best configuration of each stage that has a finished trial.

    Args:
        root: Folder of the sweep.
        trials: Results of the trials.
    """
    files = (join_path(root, records.name_best_config_file(stage)) for stage in records.find_best_records(trials))
    return [f"focus-ray train {shlex.quote(file)}" for file in files]


def _format_score(value: float | None) -> str:
    """Returns a score as text with DECIMALS decimals; "-" for None."""
    return "-" if value is None else f"{value:.{DECIMALS}f}"


def _make_trial_table(
    sweep: SweepConfig, stage: str | None, trials: Sequence[TrialRecord]
) -> tuple[list[str], list[list[str]]]:
    """Returns the column names and the cells of a table with one row per trial.

    Args:
        sweep: Configuration of the sweep.
        stage: Category of the stage; None adds a column for each category.
        trials: Results of the trials of the stage.
    """
    categories = list(dict.fromkeys(name for record in trials for name in record.categories)) if stage is None else []
    rows = []
    for record in trials:
        scores = record.category_scores
        spread = max(scores.values()) - min(scores.values()) if len(scores) > 1 else None
        shown_scores = [record.score, *(scores.get(name) for name in categories), spread]
        values = [records.format_setting_value(record.point.get(key)) for key in sweep.space]
        cells = [str(record.number), *values, *map(_format_score, shown_scores)]
        rows.append([*cells, str(record.steps), f"{record.seconds:.1f}", record.status])
    return ["trial", *sweep.space, "score", *categories, "spread", "steps", "seconds", "status"], rows


def _find_ties(
    sweep: SweepConfig, finished: Sequence[TrialRecord], best: TrialRecord
) -> tuple[list[TrialRecord], list[str]]:
    """Returns the finished trials that cannot be distinguished from the best trial, and sentences about these trials.

    The difference of their scores is smaller than the noise of the scores.

    Args:
        sweep: Configuration of the sweep.
        finished: Results of the finished trials of the stage.
        best: The best trial.
    """
    seed_noise = _estimate_seed_noise(sweep, finished)
    equal, near, reasons = [], [], []
    for record in finished:
        if record is best or best.score is None or record.score is None:
            continue
        if round(record.score, DECIMALS) == round(best.score, DECIMALS):
            equal.append(record)
            continue
        margins = {
            f"{NOISE:g}, which is within the noise of the scores": NOISE,
            "another seed would change the score": seed_noise,
            "the standard error of the gaps over the categories": _compute_gap_standard_error(best, record),
        }
        reason = next((reason for reason, margin in margins.items() if best.score - record.score < margin), None)
        if reason is not None:
            near.append(record)
            reasons.append(reason)
    sentences = []
    if equal:
        names = _format_trial_numbers([best, *equal])
        sentences.append(f"Trials with the best score, equal to {DECIMALS} decimals: {names}; the first is chosen.")
    if near:
        sentences.append(
            f"Trials as good as the best: {_format_trial_numbers(near)} "
            f"(lower by less than {', or '.join(dict.fromkeys(reasons))}). "
            f"Trial {best.number} is chosen for its higher score."
        )
    return [*equal, *near], sentences


def _format_trial_numbers(trials: Sequence[TrialRecord]) -> str:
    """Returns the sorted numbers of trials as text; for many trials only the first numbers and how many more there are."""
    numbers = [str(number) for number in sorted(record.number for record in trials)]
    suffix = f" and {len(numbers) - _MAX_NAMED} more" if len(numbers) > _MAX_NAMED else ""
    return ", ".join(numbers[:_MAX_NAMED]) + suffix


def _list_caveats(sweep: SweepConfig, trials: Sequence[TrialRecord], num_ties: int) -> list[str]:
    """Returns sentences that warn of the limits of a stage's scores, such as few images or few trials.

    Args:
        sweep: Configuration of the sweep.
        trials: Results of the trials of the stage.
        num_ties: Number of other trials that are as good as the best trial.
    """
    finished = records.select_finished_records(trials)
    sentences = [
        "LABELLED: these scores come from labelled test images. Do not evaluate the chosen settings on these images again."
        if records.uses_labelled_images(sweep)
        else "The score comes from synthetic defects on held-out good images: it ranks settings, and is not a detection rate."
    ]
    if len(finished) > 1:
        sentences.append(
            f"The best of {len(finished)} trials was also lucky: its score is optimistic, expect less on other images."
        )
        if num_ties + 1 == len(finished):
            sentences.append(
                f"All {len(finished)} finished trials are equally good: the sweep prefers none of its settings."
            )
    counts = {  # category -> numbers of judged images
        category: (result.get("num_good", FEW_IMAGES), result.get("num_bad", FEW_IMAGES))
        for record in finished
        for category, result in record.categories.items()
    }
    few = [
        f"{category} on {good} good and {bad} bad"
        for category, (good, bad) in counts.items()
        if min(good, bad) < FEW_IMAGES
    ]
    if few:
        sentences.append(f"Few images to judge on: {', '.join(few)}. A single image changes the score.")
    if _SEED not in sweep.space and finished:
        seed = sweep.make_trial_config().train.seed
        sentences.append(f"Every trial ran with one seed ({_SEED} = {seed}): the effect of another seed is unknown.")
    if finished and len(finished) < TRIALS_PER_PARAMETER * len(sweep.space):
        sentences.append(
            "Parameter importance is a hint, not a measurement: "
            f"{len(sweep.space)} parameter(s), only {len(finished)} finished trial(s)."
        )
    num_failed = records.count_statuses(trials)["failed"]
    if num_failed:
        sentences.append(f"{num_failed} trial(s) failed and had no part in the comparison.")
    return sentences


def _estimate_seed_noise(sweep: SweepConfig, finished: Sequence[TrialRecord]) -> float:
    """Returns the standard deviation of the score difference of two trials that differ only in their random seed.

    The estimate comes from groups of trials that differ only in `train.seed`. Returns 0 if there are no such groups.
    """
    if _SEED not in sweep.space:
        return 0.0
    groups: dict[str, list[float]] = defaultdict(list)
    for record in finished:
        other_settings = {key: value for key, value in record.point.items() if key != _SEED}
        groups[json.dumps(other_settings, sort_keys=True)].append(record.score or 0.0)
    squares = sum(float(np.square(np.subtract(scores, np.mean(scores))).sum()) for scores in groups.values())
    degrees_of_freedom = sum(len(scores) - 1 for scores in groups.values())
    return math.sqrt(2 * squares / degrees_of_freedom) if degrees_of_freedom else 0.0


def _compute_gap_standard_error(best: TrialRecord, other: TrialRecord) -> float:
    """Returns the standard error of the mean score difference of two trials over their common categories.

    Returns 0 for fewer than two common categories.
    """
    scores = other.category_scores
    gaps = [score - scores[name] for name, score in best.category_scores.items() if name in scores]
    return float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
