"""Plots as SVG, transparent, in the page's colours (`page.svg_uri`): one drawing for a light page, a dark one and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# drawn in colours that no plot has, which then become variables of the style sheet
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
_LOG_FROM = 8.0  # times the threshold: scores that reach further are told on a logarithmic axis


@dataclass(frozen=True)
class Plot:
    """svg: an element, for `page.svg_uri`.  title: for those who cannot see it.  caption: below it."""

    title: str
    caption: str
    svg: str


def curve(
    title: str,
    caption: str,
    xy: tuple[ArrayLike, ArrayLike],
    axes_names: tuple[str, str],
    *,
    point: tuple[float, float] | None = None,
    steps: bool = False,
    x_limit: float = 1.0,
) -> Plot:
    """A curve in the unit square, or its part to x_limit.

    Args: point: where the calibrated threshold stands, marked.  steps: whether y holds from its x to the next.
    """
    figure, (axes,) = _figure(2.8, 1)
    axes.plot(*xy, color=_GOOD, linewidth=1.8, drawstyle="steps-post" if steps else "default")
    if point is not None:
        axes.plot([point[0]], [point[1]], "o", color=_BAD, markersize=7, clip_on=False, zorder=3)
    axes.set_xlim(-0.02 * x_limit, 1.02 * x_limit)
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.set_title(title, fontsize=10, color=_INK)
    return Plot(title, caption, _svg(figure))


def score_histograms(groups: Mapping[str, Sequence[float]], threshold: float, title: str, caption: str) -> Plot:
    """A row a group of scores, on one axis, with the threshold through all of them.

    Args: groups: name -> scores, in the order of the rows; a name is of bad images where it starts with "bad".
    """
    shown = {name: np.asarray(scores, dtype=np.float64) for name, scores in groups.items() if len(scores)}
    everything = np.concatenate([*shown.values(), [threshold]])
    edges, is_log = _bins(everything, threshold)
    figure, rows = _figure(0.7 + 0.8 * len(shown), len(shown))
    for axes, (name, scores) in zip(rows, shown.items(), strict=True):
        colour = _BAD if name.startswith("bad") else _CALIBRATION if name.startswith("calibration") else _GOOD
        axes.hist(scores, bins=edges, color=colour)
        axes.axvline(threshold, color=_THRESHOLD, linewidth=1.3, linestyle=(0, (4, 2)))
        axes.set_title(f"{name} ({len(scores)})", loc="left", fontsize=9, color=_INK)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        if is_log:
            axes.set_xscale("log")
    rows[-1].set_xlabel("score" + (", logarithmic" if is_log else "") + "; dashed: threshold")
    return Plot(title, caption, _svg(figure))


def by_epoch(title: str, caption: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Plot:
    """Name -> (epochs, values); names are told apart by dashes as well as by colour."""
    figure, (axes,) = _figure(2.5, 1)
    looks = [(_GOOD, "-"), (_BAD, "--"), (_CALIBRATION, ":"), (_INK, "-.")]
    for number, (name, (epochs, values)) in enumerate(lines.items()):
        colour, dashes = looks[number % len(looks)]
        axes.plot(
            epochs, values, color=colour, linestyle=dashes, marker="o", markersize=3, linewidth=1.6, label=plain(name)
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epochs trained")
    axes.set_title(plain(title), fontsize=10, color=_INK)
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=_INK)
    return Plot(title, caption, _svg(figure))


def plain(text: str) -> str:
    """Text of a record as matplotlib draws it letter by letter.

    Between two dollars matplotlib reads a formula, and may fail; it fails at half of a surrogate pair too.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text).replace("$", r"\$")


def _bins(values: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.float64], bool]:
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > _LOG_FROM * threshold:
        return np.geomspace(low, high, _NUM_BINS + 1), True
    if high == low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _NUM_BINS + 1), False


def _figure(height_in: float, num_rows: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: it keeps figures, and may look for a display

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    rows = figure.subplots(num_rows, 1, squeeze=False, sharex=True)[:, 0]
    for axes in rows:
        axes.patch.set_visible(False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.tick_params(labelsize=9, colors=_INK)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=_INK, fontsize=9)
    return figure, list(rows)


def _svg(figure: Any) -> str:
    """The drawing alone: no XML head, no namespaces (`page.svg_uri` adds them), no size of its own.

    Ids are hashes of what they name: two plots that share one mean the same by it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "focus_ray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, rest = text.partition(">")
    head = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", head)
    rest = re.sub(r'<g id="[a-z]+_?\d*(\.[a-z]+\d*)?(_\d+)*">', "<g>", rest)
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
    for drawn, variable in _VARIABLES.items():
        rest = rest.replace(drawn, variable)
    return head + ">" + rest
