"""Summarizes the scores of a sweep in sentences: the best trial, ties with it, and caveats. No Ray.

The terminal, report.md and report.html all take their sentences from `summarize_stage`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from focus_ray.storage.files import join
from focus_ray.sweep import records
from focus_ray.sweep.records import DECIMALS, TrialRecord
from focus_ray.sweep.settings import SweepConfig

NOISE = 0.01  # a smaller difference between two scores means nothing (docs/learn/selection.md)
FEW_IMAGES = 20  # with fewer good or fewer bad images, a single image changes an AUROC by 0.01 or more
TRIALS_PER_PARAMETER = 10  # with fewer trials, parameter importance is only a hint
_SEED = "train.seed"
_MAX_NAMED = 8


@dataclass(frozen=True)
class StageSummary:
    """The sentences about one stage of a sweep.

    Attributes:
        title: Name of the stage.
        best: Sentence about the best trial; None if no trial finished.
        ties: Sentences about trials that are as good as the best.
        caveats: Sentences about the limits of the scores.
    """

    title: str
    best: str | None
    ties: list[str]
    caveats: list[str]


@dataclass(frozen=True)
class TiedTrials:
    """Trials that cannot be distinguished from the best trial.

    Attributes:
        equal: Trials whose printed score equals the best score.
        near: Trials whose score is a little lower.
        why: Reasons why the difference of the near trials means nothing.
    """

    equal: list[TrialRecord]
    near: list[TrialRecord]
    why: list[str]


def summarize_stage(sweep: SweepConfig, trials: Sequence[TrialRecord], stage: str | None) -> StageSummary:
    """Returns the sentences about one stage of a sweep.

    Args:
        sweep: Configuration of the sweep.
        trials: Records of all stages.
        stage: Category of the stage; None if trials cover all categories.
    """
    stage_records = [record for record in trials if record.stage == stage]
    title = "all categories" if stage is None else stage
    best = records.best_records(stage_records).get(stage)
    if best is None:
        return StageSummary(title, None, [], list_caveats(sweep, stage_records, None))
    settings = ", ".join(f"{key} = {records.format_value(value)}" for key, value in best.point.items())
    ties = find_ties(sweep, stage_records, best)
    best_sentence = f"Best: trial {best.number}, {best.score:.{DECIMALS}f}: {settings}."
    return StageSummary(title, best_sentence, _tie_sentences(best, ties), list_caveats(sweep, stage_records, ties))


def format_summaries(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """Returns the sentences about all stages as Markdown text, which is also readable in a terminal."""
    lines: list[str] = []
    for stage in list_stages(trials):
        summary = summarize_stage(sweep, trials, stage)
        lines += [f"**{summary.title}**", ""]
        lines += [
            f"- {sentence}" for sentence in [summary.best, *summary.ties, *summary.caveats] if sentence is not None
        ]
        lines.append("")
    return "\n".join(lines)


def train_commands(root: str, trials: Sequence[TrialRecord]) -> list[str]:
    """Returns the commands that train the best configuration of each stage."""
    files = (join(root, records.best_file_name(stage)) for stage in records.best_records(trials))
    return [f"focus-ray train {shlex.quote(file)}" for file in files]


def list_stages(trials: Sequence[TrialRecord]) -> list[str | None]:
    """Returns the sorted stages of the records; the only stage is None if trials cover all categories."""
    return sorted({record.stage for record in trials}, key=lambda stage: stage or "")


def find_ties(sweep: SweepConfig, stage_records: Sequence[TrialRecord], best: TrialRecord) -> TiedTrials:
    """Returns the finished trials of a stage whose score differs from the best score by no more than noise."""
    assert best.score is not None
    seed_noise = _seed_noise(sweep, stage_records)
    equal, near, why = [], [], []
    for record in records.finished_records(stage_records):
        if record.number == best.number or record.score is None:
            continue
        if round(record.score, DECIMALS) == round(best.score, DECIMALS):
            equal.append(record)
            continue
        margins = [
            (NOISE, f"by less than {NOISE:g}, which is within the noise of the scores"),
            (seed_noise, "by less than another seed would change the score"),
            (_gap_standard_error(best, record), "by less than the standard error of the gaps over the categories"),
        ]
        reason = next((sentence for margin, sentence in margins if best.score - record.score < margin), None)
        if reason is not None:
            near.append(record)
            why.append(reason)
    return TiedTrials(equal, near, list(dict.fromkeys(why)))


def list_caveats(sweep: SweepConfig, stage_records: Sequence[TrialRecord], ties: TiedTrials | None) -> list[str]:
    """Returns sentences about the limits of a stage's scores.

    Args:
        sweep: Configuration of the sweep.
        stage_records: Records of the stage.
        ties: Ties with the best trial; None if no trial finished.
    """
    finished = records.finished_records(stage_records)
    sentences = []
    if records.is_labelled(sweep):
        sentences.append(
            "LABELLED: these scores come from labelled test images. Do not evaluate the chosen settings on these images again."
        )
    else:
        sentences.append(
            "The score comes from synthetic defects on held-out good images: it ranks settings, and is not a detection rate."
        )
    if len(finished) > 1:
        sentences.append(
            f"The best of {len(finished)} trials was also lucky: its score is optimistic, expect less on other images."
        )
    if ties is not None and len(finished) > 1 and len(ties.equal) + len(ties.near) + 1 == len(finished):
        sentences.append(
            f"All {len(finished)} finished trials are equally good: the sweep prefers none of its settings."
        )
    sentences += _few_images_caveat(finished)
    if _SEED not in sweep.space and finished:
        seed = sweep.config_at().train.seed
        sentences.append(f"Every trial ran with one seed ({_SEED} = {seed}): the effect of another seed is unknown.")
    if finished and len(finished) < TRIALS_PER_PARAMETER * len(sweep.space):
        sentences.append(
            f"Parameter importance from {_count_text(len(finished), 'trial')} of {_count_text(len(sweep.space), 'parameter')} is "
            "a hint, not a measurement."
        )
    num_failed = sum(record.status == "failed" for record in stage_records)
    if num_failed:
        sentences.append(f"{_count_text(num_failed, 'trial')} failed and had no part in the comparison.")
    return sentences


def _tie_sentences(best: TrialRecord, ties: TiedTrials) -> list[str]:
    """Returns one sentence about trials with an equal score and one about trials with a near score."""
    sentences = []
    if ties.equal:
        names = _trial_names([best, *ties.equal])
        sentences.append(f"{names} have the best score, equal to {DECIMALS} decimals; the first trial is chosen.")
    if ties.near:
        verb, too = "are" if len(ties.near) > 1 else "is", " too" if ties.equal else ""
        sentences.append(
            f"{_trial_names(ties.near)} {verb} as good as the best trial{too}: lower {', or '.join(ties.why)}; trial "
            f"{best.number} is chosen for its higher score."
        )
    return sentences


def _trial_names(trials: Sequence[TrialRecord]) -> str:
    """Returns the numbers of trials as words: "Trials 3, 7 and 9"."""
    numbers = [str(number) for number in sorted(record.number for record in trials)]
    if len(numbers) == 1:
        return f"Trial {numbers[0]}"
    if len(numbers) > _MAX_NAMED:
        return f"Trials {', '.join(numbers[:_MAX_NAMED])} and {len(numbers) - _MAX_NAMED} more"
    return f"Trials {', '.join(numbers[:-1])} and {numbers[-1]}"


def _count_text(count: int, noun: str) -> str:
    """Returns a count with its noun: "1 trial", "2 trials"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _few_images_caveat(finished: Sequence[TrialRecord]) -> list[str]:
    """Returns a sentence about categories that were judged on few images, or no sentence. Old records have no counts."""
    few: dict[str, str] = {}
    for record in finished:
        for category, result in record.categories.items():
            good, bad = result.get("num_good"), result.get("num_bad")
            if good is not None and bad is not None and min(good, bad) < FEW_IMAGES:
                few[category] = f"{category} on {good} good and {bad} bad"
    return [f"Few images to judge on: {', '.join(few.values())}. A single image changes the score."] if few else []


def _seed_noise(sweep: SweepConfig, stage_records: Sequence[TrialRecord]) -> float:
    """Returns the standard deviation of the score difference of two trials that differ only in their seed.

    The estimate comes from groups of trials that differ only in `train.seed`. Returns 0 if there are no such groups.
    """
    if _SEED not in sweep.space:
        return 0.0
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records.finished_records(stage_records):
        other_settings = {key: value for key, value in record.point.items() if key != _SEED}
        groups[json.dumps(other_settings, sort_keys=True)].append(record.score or 0.0)
    repeated = [scores for scores in groups.values() if len(scores) > 1]
    if not repeated:
        return 0.0
    squares = sum(float(np.square(np.subtract(scores, np.mean(scores))).sum()) for scores in repeated)
    return math.sqrt(2 * squares / sum(len(scores) - 1 for scores in repeated))


def _gap_standard_error(best: TrialRecord, other: TrialRecord) -> float:
    """Returns the standard error of the mean score gap between two trials over their common categories; 0 for fewer than two."""
    gaps = [
        result["score"] - other.categories[name]["score"]
        for name, result in best.categories.items()
        if result.get("score") is not None and other.categories.get(name, {}).get("score") is not None
    ]
    return float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
