"""Plots are SVG elements that `page.encode_svg_uri` accepts, and scores of any range can be drawn."""

from __future__ import annotations

import pytest

from focus_ray.drawing import plots


@pytest.mark.parametrize("bad", [[1.0, 1.0], [0.5, 1e6], [-3.0, 0.0]])
def test_scores_of_any_range_can_be_drawn(bad: list[float]) -> None:
    svg = plots.plot_score_histograms({"good": [1.0], "bad": bad, "calibration": []}, 1.0, "Scores", "").svg
    assert "good (1)" in svg
    assert "bad (2)" in svg
    assert "calibration (" not in svg
    assert ("logarithmic" in svg) == (max(bad) > 100)


def test_a_plot_is_an_svg_element_without_a_size_and_always_the_same() -> None:
    first, second = (plots.plot_curve("<ROC>", "", ([0, 1], [0, 1]), ("x", "y"), point=(0.1, 0.9)) for _ in range(2))
    assert first == second
    assert (first.svg[:5], first.svg.rstrip()[-6:]) == ("<svg ", "</svg>")
    head = first.svg.partition(">")[0]
    assert ("viewBox=" in head, "width=" in head, "xmlns" in first.svg) == (True, False, False)
    assert "&lt;ROC&gt;" in first.svg
