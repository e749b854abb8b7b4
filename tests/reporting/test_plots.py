"""Plots as SVG: what `page.svg_uri` needs of one, and scores of any range."""

from __future__ import annotations

import pytest

from focus_ray.reporting import plots


@pytest.mark.parametrize("bad", [[1.0, 1.0], [0.5, 1e6], [-3.0, 0.0]])
def test_scores_of_any_range_can_be_drawn(bad: list[float]) -> None:
    drawn = plots.score_histograms({"good": [1.0], "bad": bad, "calibration": []}, 1.0, "Scores", "")
    assert "good (1)" in drawn.svg
    assert "bad (2)" in drawn.svg
    assert "calibration" not in drawn.svg.replace("--calibration", "")
    assert ("logarithmic" in drawn.svg) == (max(bad) > 100)


def test_a_plot_is_an_svg_element_that_takes_the_width_it_is_given() -> None:
    drawn = plots.curve("<ROC>", "", ([0.0, 1.0], [0.0, 1.0]), ("x", "y"), point=(0.1, 0.9))
    assert drawn.svg.startswith("<svg ")
    assert drawn.svg.rstrip().endswith("</svg>")
    head = drawn.svg.partition(">")[0]
    assert "viewBox=" in head
    assert "width=" not in head
    assert "xmlns" not in drawn.svg
    assert "&lt;ROC&gt;" in drawn.svg


def test_the_same_plot_is_the_same_text() -> None:
    lines = {"loss": ([1.0, 2.0], [0.5, 0.4]), "loss_fine": ([1.0, 2.0], [0.3, 0.2])}
    assert plots.by_epoch("loss", "", lines) == plots.by_epoch("loss", "", lines)
