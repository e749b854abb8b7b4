"""The report of a sweep: best trial, ties, caveats, axes, and the command that trains the best. Made from artificial records."""

from __future__ import annotations

import argparse
import html
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from focus_ray.cli.main import main
from focus_ray.cli.sweep import _print_outcome
from focus_ray.cli.train import read_config
from focus_ray.drawing.sweep_plots import MIN_SPAN, learning_curves, parallel_coordinates, score_axis
from focus_ray.errors import ConfigError
from focus_ray.fitting.settings import load_config
from focus_ray.sweep import records, summary
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.report import write_report
from focus_ray.sweep.settings import SweepConfig, parse_sweep

SPACE: dict[str, Any] = {"density.num_channels": [50, 100, 200], "density.window": [1, 3]}
PNG = b"\x89PNG"


def make_sweep(root: Path, space: dict[str, Any] = SPACE, **keys: Any) -> SweepConfig:
    """Returns a grid sweep named `search` with other settings in `keys`."""
    base = {"data": {"uri": str(root / "data")}, "storage": str(root), "density": {"reduction": "semi_orthogonal"}}
    searcher = {"searcher": "grid", "name": "search", "space": space}
    return parse_sweep({"base": base, **searcher, **keys})


def make_trial(number: int, *scores: float, num_good: int = 40, num_bad: int = 60, **keys: Any) -> TrialRecord:
    """Returns the record of a finished trial with one score per category."""
    results = {
        name: {"score": score, "curve": [[0, score - 0.001], [1, score]], "num_good": num_good, "num_bad": num_bad}
        for name, score in zip(("gear", "board", "nut"), scores, strict=False)
    }
    point = {"density.num_channels": [50, 100, 200][number % 3], "density.window": [1, 3][number // 3 % 2]}
    score = records.mean_score(list(scores))
    return TrialRecord(
        **{"number": number, "stage": None, "point": point, "status": "finished", "score": score, "categories": results}
        | keys
    )


# Ties


def test_of_equal_trials_the_first_is_the_best_in_any_order_and_ties_are_named(tmp_path: Path) -> None:
    trials = [make_trial(9, 0.912301), make_trial(7, 0.912304), make_trial(3, 0.912299), make_trial(1, 0.8)]
    for order in (trials, trials[::-1]):
        assert records.best_records(order)[None].number == 3
        assert "Trials 3, 7 and 9 have the best score" in summary.format_summaries(make_sweep(tmp_path), order)


def test_a_trial_within_the_noise_of_the_best_is_tied_and_a_worse_trial_is_not(tmp_path: Path) -> None:
    ties = summary.find_ties(
        make_sweep(tmp_path), [make_trial(0, 0.9), make_trial(1, 0.891), make_trial(2, 0.889)], make_trial(0, 0.9)
    )
    assert ([r.number for r in ties.equal], [r.number for r in ties.near]) == ([], [1])
    text = summary.format_summaries(
        make_sweep(tmp_path), [make_trial(0, 0.9), make_trial(1, 0.891), make_trial(2, 0.889)]
    )
    assert "Trial 1 is as good as the best trial: lower by less than 0.01" in text
    assert "trial 0 is chosen" in text


def test_a_gap_within_its_standard_error_over_the_categories_is_a_tie(tmp_path: Path) -> None:
    best = make_trial(0, 0.95, 0.90, 0.80)
    mixed = make_trial(1, 0.99, 0.79, 0.82)  # gaps -0.04, 0.11 and -0.02: mean 0.017, standard error 0.048
    worse = make_trial(2, 0.93, 0.87, 0.77)  # gaps 0.02, 0.03 and 0.03: mean 0.027, standard error 0.003
    ties = summary.find_ties(make_sweep(tmp_path), [best, mixed, worse], best)
    assert [record.number for record in ties.near] == [1]
    assert "standard error" in ties.why[0]


def test_a_gap_within_the_noise_of_seeds_is_a_tie(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, {"train.seed": [0, 1], "density.window": [1, 3, 5]})
    scores = {(0, 1): 0.90, (1, 1): 0.86, (0, 3): 0.87, (1, 3): 0.83, (0, 5): 0.80, (1, 5): 0.79}
    trials = [
        make_trial(number, score, point={"train.seed": seed, "density.window": window})
        for number, ((seed, window), score) in enumerate(scores.items())
    ]  # variances within a window 0.0008, 0.0008, 0.00005: the standard deviation of a difference is 0.033
    ties = summary.find_ties(sweep, trials, trials[0])
    assert [record.number for record in ties.near] == [2]
    assert any("another seed" in reason for reason in ties.why)
    assert "one seed" not in summary.format_summaries(sweep, trials)


def test_a_pruned_or_failed_trial_is_no_tie(tmp_path: Path) -> None:
    trials = [
        make_trial(0, 0.9),
        make_trial(1, 0.9, status="cut", score=None),
        make_trial(2, 0.9, status="failed", score=None),
    ]
    ties = summary.find_ties(make_sweep(tmp_path), trials, trials[0])
    assert (ties.equal, ties.near) == ([], [])
    assert "1 trial failed" in summary.format_summaries(make_sweep(tmp_path), trials)


def test_if_all_trials_are_tied_the_report_says_so(tmp_path: Path) -> None:
    text = summary.format_summaries(
        make_sweep(tmp_path), [make_trial(number, 0.9 + number / 1000) for number in range(4)]
    )
    assert "All 4 finished trials are equally good" in text


def test_many_ties_are_counted_and_not_listed(tmp_path: Path) -> None:
    text = summary.format_summaries(make_sweep(tmp_path), [make_trial(number, 0.9) for number in range(12)])
    assert "Trials 0, 1, 2, 3, 4, 5, 6, 7 and 4 more" in text


# Caveats


def test_a_category_with_few_images_gets_a_caveat(tmp_path: Path) -> None:
    few, many = make_trial(0, 0.9, num_good=6, num_bad=18), make_trial(0, 0.9)
    assert "gear on 6 good and 18 bad" in summary.format_summaries(make_sweep(tmp_path), [few])
    assert "Few images" not in summary.format_summaries(make_sweep(tmp_path), [many])


def test_an_old_record_without_image_counts_is_read(tmp_path: Path) -> None:
    old = make_trial(0, 0.9, categories={"gear": {"score": 0.9, "curve": [[0, 0.9]]}})
    assert "Few images" not in summary.format_summaries(make_sweep(tmp_path), [old])


def test_only_several_trials_get_the_caveat_of_a_lucky_best(tmp_path: Path) -> None:
    assert "lucky" not in summary.format_summaries(make_sweep(tmp_path), [make_trial(0, 0.9)])
    assert "The best of 2 trials was also lucky" in summary.format_summaries(
        make_sweep(tmp_path), [make_trial(0, 0.9), make_trial(1, 0.8)]
    )


@pytest.mark.parametrize("objective", ["validation", "pixel_auroc"])
def test_terminal_markdown_and_page_have_the_same_sentences(
    tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, root = make_sweep(tmp_path, objective=objective), str(tmp_path / "search")
    records.claim_folder(root, sweep, {"gear": "a"})
    trials = [make_trial(number, 0.9 - number / 500, num_good=5) for number in range(4)]
    for record in trials:
        records.write_record(root, record)
    assert main(["sweep", "report", root]) == 0
    reported = capsys.readouterr().out
    assert main(["sweep", "status", root]) == 0
    status = capsys.readouterr().out
    page, markdown = (html.unescape((Path(root) / name).read_text()) for name in ("report.html", "report.md"))
    stage_summary = summary.summarize_stage(sweep, trials, None)
    assert stage_summary.best is not None
    assert len(stage_summary.ties) == 1
    assert len(stage_summary.caveats) == 6
    for sentence in [stage_summary.best, *stage_summary.ties, *stage_summary.caveats]:
        assert all(sentence in text for text in (reported, status, markdown))
        assert sentence in page
    assert json.loads((Path(root) / "report.json").read_text())["caveats"] == {"all": stage_summary.caveats}
    assert any("LABELLED" in sentence for sentence in stage_summary.caveats) == (objective != "validation")


# The command that trains the best settings


def make_outcome(root: str, trials: list[TrialRecord], **keys: Any) -> argparse.Namespace:
    """Returns the attributes of a SweepOutcome that the command line prints."""
    failed = [record for record in trials if record.status == "failed"]
    return argparse.Namespace(**{"root": root, "records": trials, "failed": failed, "stopped": False} | keys)


@pytest.mark.parametrize("stages", [[None], ["gear", "board"]], ids=["all", "each"])
def test_the_last_lines_are_the_commands_that_train_the_best_settings(
    tmp_path: Path, stages: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "a folder" / "search")
    sweep = make_sweep(tmp_path / "a folder", scope="all_categories" if stages == [None] else "per_category")
    records.claim_folder(root, sweep, {})
    trials = [make_trial(number, 0.9 - number / 10, stage=stage) for stage in stages for number in range(2)]
    write_report(root, sweep, trials)
    assert _print_outcome(make_outcome(root, trials)) == 0
    lines = capsys.readouterr().out.splitlines()[-len(stages) :]
    for line, stage in zip(lines, sorted(stages, key=lambda stage: stage or ""), strict=True):
        program, command, file = shlex.split(line)
        assert (program, command) == ("focus-ray", "train")
        config = load_config(file)
        assert config.storage == str(tmp_path / "a folder")
        assert config.name == ("search-best" if stage is None else f"search-best-{stage}")
        assert config.data.categories == (None if stage is None else (stage,))
        assert not Path(config.storage, config.name).exists()


def test_a_stopped_sweep_prints_the_command_that_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "search")
    records.claim_folder(root, make_sweep(tmp_path), {})
    assert _print_outcome(make_outcome(root, [make_trial(0, 0.9)], stopped=True)) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"focus-ray sweep resume {root}")


def test_the_longest_name_of_a_sweep_is_shortened_for_its_best_run(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, name="n" * 100)
    (tmp_path / "best.yaml").write_text(records.best_config_yaml(sweep, make_trial(0, 0.9), "root"))
    assert load_config(tmp_path / "best.yaml").name == "n" * 95 + "-best"


def test_a_configuration_in_a_storage_is_read_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text(records.best_config_yaml(make_sweep(tmp_path), make_trial(0, 0.9), "root"))
    config = read_config(f"file://{file}", ["name=other"])
    assert (config.name, config.density.num_channels) == ("other", 50)
    with pytest.raises(ConfigError, match=r"absent\.yaml: .*no such file"):
        read_config(f"file://{tmp_path}/absent.yaml", [])
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"best\.yaml: .*list"):
        read_config(f"file://{file}", [])


# Plots


@pytest.mark.parametrize("values", [[0.91, 0.9101], [1.0, 0.9999], [0.0], [0.5, 0.5], [1.0]])
def test_a_score_axis_is_long_enough_and_stays_in_the_range_of_scores(values: list[float]) -> None:
    low, high = score_axis(values)
    assert high - low == pytest.approx(MIN_SPAN)
    assert 0 <= low <= min(values) <= max(values) <= high <= 1 + 1e-12


def test_a_score_axis_of_different_scores_ends_at_the_scores() -> None:
    assert score_axis([0.3, 0.9]) == (0.3, 0.9)
    low, high = score_axis([250.0, 250.1])  # a user's own metric: the axis has 2 % of its value
    assert (low, high) == pytest.approx((250.05 - 2.501, 250.05 + 2.501))


def test_plots_of_equal_scores_and_of_one_trial_are_drawn(tmp_path: Path) -> None:
    for trials in ([make_trial(0, 0.9)], [make_trial(number, 0.9, 0.9) for number in range(3)]):
        for plot in (parallel_coordinates, learning_curves):
            picture = plot(make_sweep(tmp_path), trials)
            assert picture is not None
            assert picture.startswith(PNG)
