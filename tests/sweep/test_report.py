"""What a sweep tells a person: best, ties, caveats, axes, and the command that trains the best. From made-up records."""

from __future__ import annotations

import argparse
import html
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from focus_ray.cli.main import main
from focus_ray.cli.sweep import _sweep_end
from focus_ray.cli.train import read_config
from focus_ray.config import load_config
from focus_ray.errors import ConfigError
from focus_ray.sweep import records, summary
from focus_ray.sweep.plots import MIN_SPAN, learning_curves, parallel_coordinates, score_axis
from focus_ray.sweep.records import Record
from focus_ray.sweep.report import write_report
from focus_ray.sweep.settings import SweepConfig, parse_sweep

SPACE: dict[str, Any] = {"density.num_channels": [50, 100, 200], "density.window": [1, 3]}
PNG = b"\x89PNG"


def sweep_of(root: Path, space: dict[str, Any] = SPACE, **keys: Any) -> SweepConfig:
    base = {"data": {"uri": str(root / "data")}, "storage": str(root), "density": {"reduction": "semi_orthogonal"}}
    searcher = {"searcher": "grid", "name": "found", "space": space}
    return parse_sweep({"base": base, **searcher, **keys})


def a_trial(number: int, *scores: float, num_good: int = 40, num_bad: int = 60, **keys: Any) -> Record:
    parts = {
        name: {"score": score, "curve": [[0, score - 0.001], [1, score]], "num_good": num_good, "num_bad": num_bad}
        for name, score in zip(("gear", "board", "nut"), scores, strict=False)
    }
    point = {"density.num_channels": [50, 100, 200][number % 3], "density.window": [1, 3][number // 3 % 2]}
    score = records.mean_score(list(scores))
    return Record(
        **{"number": number, "stage": None, "point": point, "status": "finished", "score": score, "categories": parts}
        | keys
    )


def said_of(sweep: SweepConfig, found: list[Record]) -> str:
    return summary.text(sweep, found)


# Ties


def test_of_equal_trials_the_first_is_taken_in_whatever_order_they_ended_and_it_is_told(tmp_path: Path) -> None:
    found = [a_trial(9, 0.912301), a_trial(7, 0.912304), a_trial(3, 0.912299), a_trial(1, 0.8)]
    for order in (found, found[::-1]):
        assert records.best_of(order)[None].number == 3
        assert "Trials 3, 7 and 9 are level with the best, equal to 4 decimals; the first of them is taken." in said_of(
            sweep_of(tmp_path), order
        )


def test_a_trial_closer_than_scores_tell_apart_is_level_and_one_further_off_is_not(tmp_path: Path) -> None:
    ties = summary.ties_with(
        sweep_of(tmp_path), [a_trial(0, 0.9), a_trial(1, 0.891), a_trial(2, 0.889)], a_trial(0, 0.9)
    )
    assert ([r.number for r in ties.equal], [r.number for r in ties.near]) == ([], [1])
    words = said_of(sweep_of(tmp_path), [a_trial(0, 0.9), a_trial(1, 0.891), a_trial(2, 0.889)])
    assert "Trial 1 is level with the best, behind by less than 0.01" in words
    assert "trial 0 is taken for its higher score" in words


def test_a_gap_within_its_standard_error_over_the_categories_is_level(tmp_path: Path) -> None:
    best = a_trial(0, 0.95, 0.90, 0.80)
    trades = a_trial(1, 0.99, 0.79, 0.82)  # gaps -0.04, 0.11 and -0.02: mean 0.017, standard error 0.048
    loses = a_trial(2, 0.93, 0.87, 0.77)  # gaps 0.02, 0.03 and 0.03: mean 0.027, standard error 0.003
    ties = summary.ties_with(sweep_of(tmp_path), [best, trades, loses], best)
    assert [record.number for record in ties.near] == [1]
    assert ties.why == ["by less than the gaps' standard error over the categories"]


def test_a_gap_within_what_a_seed_changes_is_level(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"train.seed": [0, 1], "density.window": [1, 3, 5]})
    scores = {(0, 1): 0.90, (1, 1): 0.86, (0, 3): 0.87, (1, 3): 0.83, (0, 5): 0.80, (1, 5): 0.79}
    found = [
        a_trial(number, score, point={"train.seed": seed, "density.window": window})
        for number, ((seed, window), score) in enumerate(scores.items())
    ]  # variances within a window 0.0008, 0.0008, 0.00005: a difference's deviation is 0.033
    ties = summary.ties_with(sweep, found, found[0])
    assert [record.number for record in ties.near] == [2]
    assert "by less than what another seed changes" in ties.why
    assert "one seed" not in said_of(sweep, found)


def test_a_trial_that_was_cut_or_failed_is_no_tie(tmp_path: Path) -> None:
    found = [a_trial(0, 0.9), a_trial(1, 0.9, status="cut", score=None), a_trial(2, 0.9, status="failed", score=None)]
    ties = summary.ties_with(sweep_of(tmp_path), found, found[0])
    assert (ties.equal, ties.near) == ([], [])
    assert "1 trial failed and took no part." in said_of(sweep_of(tmp_path), found)


def test_where_all_are_level_it_is_said_that_nothing_is_preferred(tmp_path: Path) -> None:
    words = said_of(sweep_of(tmp_path), [a_trial(number, 0.9 + number / 1000) for number in range(4)])
    assert "All 4 finished trials are level: the sweep prefers none of its settings." in words


def test_many_ties_are_counted_not_listed(tmp_path: Path) -> None:
    words = said_of(sweep_of(tmp_path), [a_trial(number, 0.9) for number in range(12)])
    assert "Trials 0, 1, 2, 3, 4, 5, 6, 7 and 4 more are level" in words


# Caveats


def test_few_images_are_told_by_category_and_many_are_not(tmp_path: Path) -> None:
    few, many = a_trial(0, 0.9, num_good=6, num_bad=18), a_trial(0, 0.9)
    assert "Few images to judge on: gear on 6 good and 18 bad." in said_of(sweep_of(tmp_path), [few])
    assert "Few images" not in said_of(sweep_of(tmp_path), [many])


def test_a_record_of_before_images_were_counted_is_read(tmp_path: Path) -> None:
    old = a_trial(0, 0.9, categories={"gear": {"score": 0.9, "curve": [[0, 0.9]]}})
    assert "Few images" not in said_of(sweep_of(tmp_path), [old])


def test_one_trial_is_not_the_luckiest_of_many(tmp_path: Path) -> None:
    assert "luckiest" not in said_of(sweep_of(tmp_path), [a_trial(0, 0.9)])
    assert "The best of 2 trials is also the luckiest" in said_of(
        sweep_of(tmp_path), [a_trial(0, 0.9), a_trial(1, 0.8)]
    )


@pytest.mark.parametrize("objective", ["validation", "pixel_auroc"])
def test_terminal_markdown_and_page_carry_the_same_caveats(
    tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, root = sweep_of(tmp_path, objective=objective), str(tmp_path / "found")
    records.claim(root, sweep, {"gear": "a"})
    found = [a_trial(number, 0.9 - number / 500, num_good=5) for number in range(4)]
    for record in found:
        records.write_record(root, record)
    assert main(["sweep", "report", root]) == 0
    reported = capsys.readouterr().out
    assert main(["sweep", "status", root]) == 0
    status = capsys.readouterr().out
    page, markdown = (html.unescape((Path(root) / name).read_text()) for name in ("report.html", "report.md"))
    said = summary.told(sweep, found, None)
    assert said.best is not None
    assert len(said.ties) == 1
    assert len(said.caveats) == 6
    for words in [said.best, *said.ties, *said.caveats]:
        assert all(words in text for text in (reported, status, markdown))
        assert words in page
    assert json.loads((Path(root) / "report.json").read_text())["caveats"] == {"all": said.caveats}
    assert any("LABELLED" in words for words in said.caveats) == (objective != "validation")


# The command that trains the best


def outcome_of(root: str, found: list[Record], **keys: Any) -> argparse.Namespace:
    failed = [record for record in found if record.status == "failed"]
    return argparse.Namespace(**{"root": root, "records": found, "failed": failed, "stopped": False} | keys)


@pytest.mark.parametrize("stages", [[None], ["gear", "board"]], ids=["all", "each"])
def test_the_last_lines_are_the_commands_that_train_the_best(
    tmp_path: Path, stages: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "a folder" / "found")
    sweep = sweep_of(tmp_path / "a folder", scope="all_categories" if stages == [None] else "per_category")
    records.claim(root, sweep, {})
    found = [a_trial(number, 0.9 - number / 10, stage=stage) for stage in stages for number in range(2)]
    write_report(root, sweep, found)
    assert _sweep_end(outcome_of(root, found)) == 0
    lines = capsys.readouterr().out.splitlines()[-len(stages) :]
    for line, stage in zip(lines, sorted(stages, key=lambda stage: stage or ""), strict=True):
        program, command, place = shlex.split(line)
        assert (program, command) == ("focus-ray", "train")
        config = load_config(place)
        assert config.storage == str(tmp_path / "a folder")
        assert config.name == ("found-best" if stage is None else f"found-best-{stage}")
        assert config.data.categories == (None if stage is None else (stage,))
        assert not Path(config.storage, config.name).exists()


def test_a_stopped_sweep_ends_with_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "found")
    records.claim(root, sweep_of(tmp_path), {})
    assert _sweep_end(outcome_of(root, [a_trial(0, 0.9)], stopped=True)) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"go on with: focus-ray sweep resume {root}")


def test_the_longest_name_of_a_sweep_leaves_a_name_for_the_best_that_is_another(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, name="n" * 100)
    (tmp_path / "best.yaml").write_text(records.best_config_yaml(sweep, a_trial(0, 0.9), "root"))
    assert load_config(tmp_path / "best.yaml").name == "n" * 95 + "-best"


def test_a_configuration_in_a_storage_is_read_with_overrides(tmp_path: Path) -> None:
    place = tmp_path / "best.yaml"
    place.write_text(records.best_config_yaml(sweep_of(tmp_path), a_trial(0, 0.9), "root"))
    config = read_config(f"file://{place}", ["name=other"])
    assert (config.name, config.density.num_channels) == ("other", 50)
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the configuration: .*no such file"):
        read_config(f"file://{tmp_path}/absent.yaml", [])
    place.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"best\.yaml: expected a mapping of sections at the top, got list"):
        read_config(f"file://{place}", [])


# Plots


@pytest.mark.parametrize("values", [[0.91, 0.9101], [1.0, 0.9999], [0.0], [0.5, 0.5], [1.0]])
def test_an_axis_of_scores_spans_enough_and_stays_within_what_scores_can_be(values: list[float]) -> None:
    low, high = score_axis(values)
    assert high - low == pytest.approx(MIN_SPAN)
    assert 0 <= low <= min(values) <= max(values) <= high <= 1 + 1e-12


def test_an_axis_of_scores_that_differ_ends_where_they_do() -> None:
    assert score_axis([0.3, 0.9]) == (0.3, 0.9)
    low, high = score_axis([250.0, 250.1])  # a metric of one's own: 2 % of it
    assert (low, high) == pytest.approx((250.05 - 2.501, 250.05 + 2.501))


def test_plots_are_drawn_of_equal_scores_and_of_one_trial(tmp_path: Path) -> None:
    for found in ([a_trial(0, 0.9)], [a_trial(number, 0.9, 0.9) for number in range(3)]):
        for plot in (parallel_coordinates, learning_curves):
            picture = plot(sweep_of(tmp_path), found)
            assert picture is not None
            assert picture.startswith(PNG)
