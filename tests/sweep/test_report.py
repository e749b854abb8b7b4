"""The report of a sweep: best trial, ties, caveats, axes, and the command that trains the best. Made from artificial records."""

from __future__ import annotations

import html
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from focus_ray.cli.main import main
from focus_ray.cli.sweep import _print_sweep_outcome
from focus_ray.cli.train import read_run_config
from focus_ray.drawing.sweep_plots import MIN_SPAN, compute_score_axis_limits
from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import load_config
from focus_ray.sweep import records, summary
from focus_ray.sweep.driver import SweepOutcome
from focus_ray.sweep.plots import draw_learning_curves, draw_parallel_coordinates
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.report import write_sweep_report
from focus_ray.sweep.settings import SweepConfig, parse_sweep_config

SPACE: dict[str, Any] = {"density.num_channels": [50, 100, 200], "density.window": [1, 3]}
SEEDS: dict[str, Any] = {"train.seed": [0, 1], "density.window": [1, 3, 5]}


def make_sweep(storage: Path | str = "unused", space: dict[str, Any] = SPACE, **keys: Any) -> SweepConfig:
    """Returns a grid sweep named `search` with other settings in `keys`."""
    base = {"data": {"uri": "data"}, "storage": str(storage), "density": {"reduction": "semi_orthogonal"}}
    return parse_sweep_config({"base": base, "searcher": "grid", "name": "search", "space": space, **keys})


def make_trial(number: int, *scores: float, num_good: int = 40, **keys: Any) -> TrialRecord:
    """Returns the record of a finished trial with one score per category."""
    results = {
        name: {"score": score, "curve": [[0, score - 0.001], [1, score]], "num_good": num_good, "num_bad": 60}
        for name, score in zip(("gear", "board", "nut"), scores, strict=False)
    }
    point = {"density.num_channels": [50, 100, 200][number % 3], "density.window": [1, 3][number // 3 % 2]}
    record = TrialRecord(number, None, point, "finished", float(np.mean(scores)), results)
    return TrialRecord(**{**vars(record), **keys})


def summarize(trials: list[TrialRecord], **keys: Any) -> summary.StageSummary:
    """Returns the summary of a sweep with one stage."""
    (stage,) = summary.summarize_stages(make_sweep(**keys), trials)
    return stage


# Ties and caveats


def test_of_equal_trials_the_first_is_the_best_in_any_order() -> None:
    trials = [make_trial(9, 0.912301), make_trial(7, 0.912304), make_trial(3, 0.912299), make_trial(1, 0.8)]
    for order in (trials, trials[::-1]):
        stage = summarize(order)
        assert stage.best is trials[2]
        assert "3, 7, 9" in stage.results[1]


SEED_TRIALS = [  # variances within a window 0.0008, 0.0008, 0.00005: the standard deviation of a difference is 0.033
    make_trial(number, score, point={"train.seed": number % 2, "density.window": 1 + 2 * (number // 2)})
    for number, score in enumerate([0.90, 0.86, 0.87, 0.83, 0.80, 0.79])
]


@pytest.mark.parametrize(
    ("trials", "space", "level", "reason"),
    [
        ([make_trial(0, 0.9), make_trial(1, 0.891), make_trial(2, 0.889)], SPACE, [1], "0.01"),
        (
            [
                make_trial(0, 0.95, 0.90, 0.80),
                make_trial(1, 0.99, 0.79, 0.82),  # gaps -0.04, 0.11 and -0.02: mean 0.017, standard error 0.048
                make_trial(2, 0.93, 0.87, 0.77),  # gaps 0.02, 0.03 and 0.03: mean 0.027, standard error 0.003
            ],
            SPACE,
            [1],
            "standard error",
        ),
        (SEED_TRIALS, SEEDS, [2], "another seed"),
    ],
)
def test_a_trial_within_the_noise_of_the_best_is_tied_and_a_worse_trial_is_not(
    trials: list[TrialRecord], space: dict[str, Any], level: list[int], reason: str
) -> None:
    stage = summarize(trials, space=space)
    assert [record.number for record in stage.ties] == level
    assert reason in stage.results[1]


FAILED = make_trial(2, 0.9, status="failed", score=None)


@pytest.mark.parametrize(
    ("trials", "keys", "caveat"),
    [
        ([make_trial(0, 0.9)], {}, "synthetic defects"),
        ([make_trial(0, 0.9)], {"objective": "pixel_auroc"}, "LABELLED"),
        ([make_trial(0, 0.9), make_trial(1, 0.8)], {}, "best of 2 trials"),
        ([make_trial(number, 0.9 + number / 1000) for number in range(4)], {}, "All 4 finished trials"),
        ([make_trial(0, 0.9, num_good=6)], {}, "gear on 6 good and 60 bad"),
        ([make_trial(0, 0.9)], {}, "one seed (train.seed = 0)"),
        ([make_trial(0, 0.9)], {}, "2 parameter(s)"),
        ([make_trial(0, 0.9), FAILED], {}, "1 trial(s) failed"),
    ],
)
def test_limits_of_the_scores_are_said(trials: list[TrialRecord], keys: dict[str, Any], caveat: str) -> None:
    assert any(caveat in sentence for sentence in summarize(trials, **keys).caveats)


def test_caveats_that_do_not_apply_are_not_said() -> None:
    few_trials = SEED_TRIALS[::4]
    assert len(summarize(few_trials, space=SEEDS).caveats) == 3  # objective, the best of many, few trials


def test_a_pruned_or_failed_trial_is_no_tie() -> None:
    stage = summarize([make_trial(0, 0.9), make_trial(1, 0.9, status="cut", score=None), FAILED])
    assert (stage.ties, len(stage.results)) == ([], 1)


def test_many_ties_are_counted_and_not_listed() -> None:
    assert "6, 7 and 4 more" in summarize([make_trial(number, 0.9) for number in range(12)]).results[1]


def test_terminal_markdown_and_page_have_the_same_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, root = make_sweep(tmp_path), str(tmp_path / "search")
    records.claim_sweep_folder(root, sweep, {"gear": "a"})
    trials = [make_trial(number, 0.9 - number / 500, num_good=5) for number in range(4)]
    for record in trials:
        records.write_trial_record(root, record)
    texts = []
    for command in ("report", "status"):
        assert main(["sweep", command, root]) == 0
        texts.append(capsys.readouterr().out)
    texts += [html.unescape((Path(root) / name).read_text()) for name in ("report.html", "report.md")]
    stage = summarize(trials)
    assert len(stage.results) == 2
    for sentence in [*stage.results, *stage.caveats]:
        assert all(sentence in text for text in texts)
    assert json.loads((Path(root) / "report.json").read_text())["caveats"] == {"all": stage.caveats}


# The command that trains the best settings


@pytest.mark.parametrize("stages", [[None], ["board", "gear"]], ids=["all", "each"])
def test_the_last_lines_are_the_commands_that_train_the_best_settings(
    tmp_path: Path, stages: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "a folder" / "search")
    sweep = make_sweep(tmp_path / "a folder", scope="all_categories" if stages == [None] else "per_category")
    records.claim_sweep_folder(root, sweep, {})
    trials = [make_trial(number, 0.9 - number / 10, stage=stage) for stage in stages for number in range(2)]
    write_sweep_report(root, sweep, trials)
    assert _print_sweep_outcome(SweepOutcome(root, trials, stopped=False)) == 0
    lines = capsys.readouterr().out.splitlines()[-len(stages) :]
    for line, stage in zip(lines, stages, strict=True):
        program, command, file = shlex.split(line)
        assert (program, command) == ("focus-ray", "train")
        config = load_config(file)
        assert config.name == ("search-best" if stage is None else f"search-best-{stage}")
        assert config.data.categories == (None if stage is None else (stage,))
        assert not Path(config.storage, config.name).exists()
    assert _print_sweep_outcome(SweepOutcome(root, trials, stopped=True)) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"focus-ray sweep resume {root}")


def test_a_labelled_objective_is_marked_in_all_files(tmp_path: Path) -> None:
    write_sweep_report(str(tmp_path), make_sweep(tmp_path, objective="pixel_auroc"), [make_trial(0, 0.9)])
    for name in ("best.yaml", "report.md", "report.html"):
        assert "LABELLED" in (tmp_path / name).read_text()
    assert pq.read_schema(tmp_path / "trials.parquet").metadata[b"labelled"] == b"True"


def test_the_best_configuration_is_read_from_a_storage_and_its_name_is_not_too_long(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text(records.format_best_config(make_sweep(name="n" * 100), make_trial(0, 0.9), "root"))
    assert read_run_config(f"file://{file}", []).name == "n" * 95 + "-best"
    assert read_run_config(f"file://{file}", ["name=other"]).name == "other"
    for content in (None, "- 1\n"):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(ConfigError, match=r"best\.yaml: "):
            read_run_config(f"file://{file}", [])


# Plots


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.91, 0.9101], (0.90005, 0.92005)),
        ([1.0, 0.9999], (0.98, 1.0)),
        ([0.0], (0.0, 0.02)),
        ([0.3, 0.9], (0.3, 0.9)),
        ([250.0, 250.1], (250.05 - 2.501, 250.05 + 2.501)),  # a user's own metric: the axis has 2 % of its value
    ],
)
def test_a_score_axis_is_long_enough_and_stays_in_the_range_of_scores(
    values: list[float], ends: tuple[float, float]
) -> None:
    low, high = compute_score_axis_limits(values)
    assert (low, high) == pytest.approx(ends)
    assert high - low >= MIN_SPAN - 1e-12


def test_plots_of_equal_scores_and_of_one_trial_are_drawn() -> None:
    for trials in ([make_trial(0, 0.9)], [make_trial(number, 0.9, 0.9) for number in range(3)]):
        for plot in (draw_parallel_coordinates, draw_learning_curves):
            assert str(plot(make_sweep(), trials)).startswith(r"b'\x89PNG")
