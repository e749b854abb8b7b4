"""What a sweep's scores say in words, and what they do not: best, ties, caveats. No Ray.

Terminal, report.md and report.html all take their words from `told`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from focus_ray.storage import join
from focus_ray.sweep import records
from focus_ray.sweep.records import DECIMALS, Record
from focus_ray.sweep.settings import SweepConfig

NOISE = 0.01  # of a score, docs/learn/selection.md: smaller differences mean nothing
FEW_IMAGES = 20  # of good or of bad ones: below it a single image moves an AUROC by a hundredth and more
TRIALS_PER_PARAMETER = 10  # below it the shares of parameter importance are a hint
_SEED = "train.seed"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Told:
    """A stage in sentences. best: None where no trial finished; ties, caveats: a sentence each."""

    title: str
    best: str | None
    ties: list[str]
    caveats: list[str]


@dataclass(frozen=True)
class Ties:
    """Trials that cannot be told apart from the best: `equal` to it as scores are shown, or `near` it, and why they are."""

    equal: list[Record]
    near: list[Record]
    why: list[str]


def told(sweep: SweepConfig, found: Sequence[Record], stage: str | None) -> Told:
    """What is to be said of one stage of a sweep."""
    mine = [record for record in found if record.stage == stage]
    title = "all categories" if stage is None else stage
    best = records.best_of(mine).get(stage)
    if best is None:
        return Told(title, None, [], caveats(sweep, mine, None))
    settings = ", ".join(f"{key} = {records.shown(value)}" for key, value in best.point.items())
    ties = ties_with(sweep, mine, best)
    words = f"Best: trial {best.number}, {best.score:.{DECIMALS}f}: {settings}."
    return Told(title, words, _tie_words(best, ties), caveats(sweep, mine, ties))


def text(sweep: SweepConfig, found: Sequence[Record]) -> str:
    """All stages, as Markdown that reads as it stands in a terminal."""
    lines: list[str] = []
    for stage in stages_of(found):
        said = told(sweep, found, stage)
        lines += [f"**{said.title}**", ""]
        lines += [f"- {words}" for words in [said.best, *said.ties, *said.caveats] if words is not None]
        lines.append("")
    return "\n".join(lines)


def commands(root: str, found: Sequence[Record]) -> list[str]:
    """What trains the best of each stage."""
    places = (join(root, records.best_name(stage)) for stage in records.best_of(found))
    return [f"focus-ray train {shlex.quote(place)}" for place in places]


def stages_of(found: Sequence[Record]) -> list[str | None]:
    return sorted({record.stage for record in found}, key=lambda stage: stage or "")


def ties_with(sweep: SweepConfig, mine: Sequence[Record], best: Record) -> Ties:
    """The finished trials of a stage that lie so close behind its best that their order means nothing."""
    assert best.score is not None
    of_seeds = _spread_over_seeds(sweep, mine)
    equal, near, why = [], [], []
    for record in records.scored(mine):
        if record.number == best.number or record.score is None:
            continue
        if round(record.score, DECIMALS) == round(best.score, DECIMALS):
            equal.append(record)
            continue
        margins = [
            (NOISE, f"by less than {NOISE:g}, which no score here tells apart"),
            (of_seeds, "by less than what another seed changes"),
            (_error_over_categories(best, record), "by less than the gaps' standard error over the categories"),
        ]
        reason = next((words for margin, words in margins if best.score - record.score < margin), None)
        if reason is not None:
            near.append(record)
            why.append(reason)
    return Ties(equal, near, list(dict.fromkeys(why)))


def caveats(sweep: SweepConfig, mine: Sequence[Record], ties: Ties | None) -> list[str]:
    """What keeps a stage's scores from meaning what they seem to. ties: with its best; None where it has none."""
    finished = records.scored(mine)
    said = []
    if records.is_labelled(sweep):
        said.append(
            "LABELLED: these scores come from labelled test images. What was chosen by them must not be judged on them again."
        )
    else:
        said.append(
            "The score is of synthetic defects on held-out good images: it ranks settings, and is no detection rate."
        )
    if len(finished) > 1:
        said.append(
            f"The best of {len(finished)} trials is also the luckiest of them: its score is optimistic, expect less elsewhere."
        )
    if ties is not None and len(finished) > 1 and len(ties.equal) + len(ties.near) + 1 == len(finished):
        said.append(f"All {len(finished)} finished trials are level: the sweep prefers none of its settings.")
    said += _few_images(finished)
    if _SEED not in sweep.space and finished:
        seed = sweep.base_config().train.seed
        said.append(f"Every trial ran with one seed ({_SEED} = {seed}): what another seed would change is not known.")
    if finished and len(finished) < TRIALS_PER_PARAMETER * len(sweep.space):
        said.append(
            f"Parameter importance from {_counted(len(finished), 'trial')} of {_counted(len(sweep.space), 'parameter')} is a "
            "hint, not a measurement."
        )
    failed = sum(record.status == "failed" for record in mine)
    if failed:
        said.append(f"{_counted(failed, 'trial')} failed and took no part.")
    return said


def _tie_words(best: Record, ties: Ties) -> list[str]:
    said = []
    if ties.equal:
        names = _names([best, *ties.equal])
        said.append(f"{names} are level with the best, equal to {DECIMALS} decimals; the first of them is taken.")
    if ties.near:
        be, too = "are" if len(ties.near) > 1 else "is", " too" if ties.equal else ""
        said.append(
            f"{_names(ties.near)} {be} level with the best{too}, behind {', or '.join(ties.why)}; trial {best.number} is taken "
            "for its higher score."
        )
    return said


def _names(mine: Sequence[Record]) -> str:
    """Trials 3, 7 and 9."""
    numbers = [str(number) for number in sorted(record.number for record in mine)]
    if len(numbers) == 1:
        return f"Trial {numbers[0]}"
    if len(numbers) > _MOST_NAMED:
        return f"Trials {', '.join(numbers[:_MOST_NAMED])} and {len(numbers) - _MOST_NAMED} more"
    return f"Trials {', '.join(numbers[:-1])} and {numbers[-1]}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _few_images(finished: Sequence[Record]) -> list[str]:
    """The categories that were judged on few images; records of old sweeps do not say on how many."""
    few: dict[str, str] = {}
    for record in finished:
        for category, part in record.categories.items():
            good, bad = part.get("num_good"), part.get("num_bad")
            if good is not None and bad is not None and min(good, bad) < FEW_IMAGES:
                few[category] = f"{category} on {good} good and {bad} bad"
    return [f"Few images to judge on: {', '.join(few.values())}. Each of them moves the score."] if few else []


def _spread_over_seeds(sweep: SweepConfig, mine: Sequence[Record]) -> float:
    """Standard deviation of the difference of two trials that a seed makes, from those that differ by it alone; 0 if unknown."""
    if _SEED not in sweep.space:
        return 0.0
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records.scored(mine):
        rest = {key: value for key, value in record.point.items() if key != _SEED}
        groups[json.dumps(rest, sort_keys=True)].append(record.score or 0.0)
    kept = [scores for scores in groups.values() if len(scores) > 1]
    if not kept:
        return 0.0
    squares = sum(float(np.square(np.subtract(scores, np.mean(scores))).sum()) for scores in kept)
    return math.sqrt(2 * squares / sum(len(scores) - 1 for scores in kept))


def _error_over_categories(best: Record, other: Record) -> float:
    """Standard error of the mean gap between two trials over the categories that both ended; 0 with fewer than two."""
    gaps = [
        part["score"] - other.categories[name]["score"]
        for name, part in best.categories.items()
        if part.get("score") is not None and other.categories.get(name, {}).get("score") is not None
    ]
    return float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
