"""Plots are SVG elements that `page.svg_uri` accepts, and scores of any range can be plot."""

from __future__ import annotations

import pytest

from focus_ray.drawing import plots


@pytest.mark.parametrize("bad", [[1.0, 1.0], [0.5, 1e6], [-3.0, 0.0]])
def test_scores_of_any_range_can_be_drawn(bad: list[float]) -> None:
    plot = plots.score_histograms({"good": [1.0], "bad": bad, "calibration": []}, 1.0, "Scores", "")
    assert "good (1)" in plot.svg
    assert "bad (2)" in plot.svg
    assert "calibration" not in plot.svg.replace("--calibration", "")
    assert ("logarithmic" in plot.svg) == (max(bad) > 100)


def test_a_plot_is_an_svg_element_without_a_size() -> None:
    plot = plots.curve("<ROC>", "", ([0.0, 1.0], [0.0, 1.0]), ("x", "y"), point=(0.1, 0.9))
    assert plot.svg.startswith("<svg ")
    assert plot.svg.rstrip().endswith("</svg>")
    head = plot.svg.partition(">")[0]
    assert "viewBox=" in head
    assert "width=" not in head
    assert "xmlns" not in plot.svg
    assert "&lt;ROC&gt;" in plot.svg


def test_drawing_a_plot_is_deterministic() -> None:
    lines = {"loss": ([1.0, 2.0], [0.5, 0.4]), "loss_fine": ([1.0, 2.0], [0.3, 0.2])}
    assert plots.plot_by_epoch("loss", "", lines) == plots.plot_by_epoch("loss", "", lines)
