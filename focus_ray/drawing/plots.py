"""Draws plots as transparent SVG with the colours of the page (`encode_svg_uri`), for light and dark screens and for paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Plots are drawn in these placeholder colours, which `_render_svg` then replaces by variables of the style sheet.
_INK, _LINE, _GOOD, _BAD, _CALIBRATION, _THRESHOLD = (f"#0102{number:02x}" for number in range(6))
_VARIABLES = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    _CALIBRATION: "var(--calibration)",
    _THRESHOLD: "var(--threshold)",
}
_WIDTH_IN = 3.4
_NUM_BINS = 30
_LOG_FROM = 8.0  # the score axis is logarithmic if the highest score exceeds this multiple of the threshold


@dataclass(frozen=True)
class Plot:
    """A plot on a page.

    Attributes:
        title: alternative text for readers who cannot see the picture.
        caption: text below the plot.
        svg: an SVG element, for `page.encode_svg_uri`.
    """

    title: str
    caption: str
    svg: str


def plot_curve(
    title: str,
    caption: str,
    xy: tuple[ArrayLike, ArrayLike],
    axes_names: tuple[str, str],
    *,
    point: tuple[float, float] | None = None,
    steps: bool = False,
    x_limit: float = 1.0,
) -> Plot:
    """Draws a curve in the unit square.

    Args:
        xy: x and y of the curve, (N,) each.
        axes_names: labels of the x and y axis.
        point: (x, y) of the calibrated threshold, which gets a dot.
        steps: draw steps: y is constant from its x to the next x.
        x_limit: right end of the x axis.
    """
    figure, (axes,) = create_figure(_WIDTH_IN, 2.8, ink=_INK, grid=_LINE)
    axes.plot(*xy, color=_GOOD, linewidth=1.8, drawstyle="steps-post" if steps else "default")
    if point is not None:
        axes.plot([point[0]], [point[1]], "o", color=_BAD, markersize=7, clip_on=False, zorder=3)
    axes.set(xlim=(-0.02 * x_limit, 1.02 * x_limit), ylim=(-0.02, 1.04), xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_title(title, fontsize=10, color=_INK)
    return Plot(title, caption, _render_svg(figure))


def plot_score_histograms(groups: Mapping[str, Sequence[float]], threshold: float, title: str, caption: str) -> Plot:
    """Draws a histogram for each group of scores, below each other on a common axis, with the threshold.

    Args:
        groups: name -> scores, in the order of the rows. A name that starts with "bad" or "calibration" has its own colour.
    """
    shown = {name: np.asarray(scores, dtype=np.float64) for name, scores in groups.items() if len(scores)}
    all_values = np.concatenate([*shown.values(), [threshold]])
    edges, is_log = _compute_bin_edges(all_values, threshold)
    figure, rows = create_figure(_WIDTH_IN, 0.7 + 0.8 * len(shown), len(shown), ink=_INK, grid=_LINE)
    for axes, (name, scores) in zip(rows, shown.items(), strict=True):
        colour = _BAD if name.startswith("bad") else _CALIBRATION if name.startswith("calibration") else _GOOD
        axes.hist(scores, bins=edges, color=colour)
        axes.axvline(threshold, color=_THRESHOLD, linewidth=1.3, linestyle=(0, (4, 2)))
        axes.set_title(f"{name} ({len(scores)})", loc="left", fontsize=9, color=_INK)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        if is_log:
            axes.set_xscale("log")
    rows[-1].set_xlabel("score" + (", logarithmic" if is_log else "") + "; dashed: threshold")
    return Plot(title, caption, _render_svg(figure))


def plot_values_by_step(title: str, caption: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Plot:
    """Draws values by step. Lines differ in dashes and colour, so that colour is not needed.

    Args:
        lines: name -> (steps, values).
    """
    figure, (axes,) = create_figure(_WIDTH_IN, 2.5, ink=_INK, grid=_LINE)
    styles = [(_GOOD, "-"), (_BAD, "--"), (_CALIBRATION, ":"), (_INK, "-.")]
    for number, (name, (steps, values)) in enumerate(lines.items()):
        colour, dashes = styles[number % len(styles)]
        style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3, "linewidth": 1.6}
        axes.plot(steps, values, label=escape_matplotlib_text(name), **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimiser steps")
    axes.set_title(escape_matplotlib_text(title), fontsize=10, color=_INK)
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=_INK)
    return Plot(title, caption, _render_svg(figure))


def escape_matplotlib_text(text: str) -> str:
    """Escapes untrusted text so that matplotlib draws it literally.

    matplotlib parses text between two dollar signs as a formula, which may fail. It also fails at half of a surrogate pair.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text).replace("$", r"\$")


def _compute_bin_edges(values: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.float64], bool]:
    """Returns the edges of histogram bins, and whether they are logarithmic."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > _LOG_FROM * threshold:
        return np.geomspace(low, high, _NUM_BINS + 1), True
    if high == low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _NUM_BINS + 1), False


def create_figure(
    width_in: float, height_in: float, rows: int = 1, columns: int = 1, *, ink: str = "black", grid: str = "#e3e7eb"
) -> tuple[Any, list[Any]]:
    """Creates a figure with a grid of styled axes. Returns the figure and the axes.

    Args:
        ink: colour of text and spines.
        grid: colour of the horizontal grid lines.
    """
    from matplotlib.figure import Figure  # not pyplot, which stores figures and may look for a display

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex="col").flatten().tolist()
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(ink)
        axes.tick_params(labelsize=9, colors=ink)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=grid)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=ink, fontsize=9)
    return figure, all_axes


def _render_svg(figure: Any) -> str:
    """Returns a figure as a small SVG element, without XML header, namespaces (`page.encode_svg_uri` adds them) and size.

    Ids are hashes of the content that they name, so an id that occurs in two plots of a page means the same content.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "focus_ray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    head = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r'<g id="[a-z]+_?\d*(\.[a-z]+\d*)?(_\d+)*">', "<g>", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for placeholder, variable in _VARIABLES.items():
        body = body.replace(placeholder, variable)
    return head + ">" + body
