"""Pages of hostile records: no name, reason or plot becomes markup, and the page forbids scripts and requests."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import TypeAdapter

from focus_ray.bundle.bundle import read_manifest
from focus_ray.drawing import plots
from focus_ray.metrics.registry import METRICS
from focus_ray.reporting.evaluation import EvaluationSection, render_evaluation_page
from focus_ray.reporting.page import encode_svg_uri
from focus_ray.reporting.tables import format_evaluation_tables
from focus_ray.sweep.records import TrialRecord
from focus_ray.sweep.report import write_sweep_report
from focus_ray.sweep.settings import parse_sweep_config
from focus_ray.training.report import build_report_section, render_training_report

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</style><svg onload=alert(1)>",
    "{{ 7 * 7 }}",
    "$\\bad$ <b>",
)
ATTACK = " ".join(ATTACKS)
HALF_PAIR = f"{ATTACK} half of a pair: \ud800"  # JSON cannot hold it, so only names outside JSON contain it
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "br", "div", "span", "ul", "li", "dl", "dt"),
    *("dd", "table", "tr", "th", "td", "section", "figure", "figcaption", "img", "a", "nav", "details", "summary", "pre", "code"),
}  # fmt: skip
ATTRIBUTES = {"http-equiv", "content", "charset", "name", "lang", "class", "id", "src", "alt", "href"}


class ElementCollector(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))


def assert_harmless(content: bytes) -> list[tuple[str, dict[str, str]]]:
    """Asserts that elements, attributes, addresses and policy of a page are harmless, and returns its elements."""
    elements = ElementCollector(content.decode()).elements
    assert {tag for tag, _ in elements} <= TAGS
    assert {name for _, attributes in elements for name in attributes} <= ATTRIBUTES
    for tag, attributes in elements:
        if "src" in attributes:
            assert tag == "img"
            assert re.fullmatch(r"data:(image/(jpeg|png|svg\+xml);base64)?,[A-Za-z0-9+/=]*", attributes["src"])
        assert attributes.get("href", "#").startswith(("#", "categories/"))
    (policy,) = (n for n, (_, attributes) in enumerate(elements) if "Content-Security-Policy" in attributes.values())
    assert [tag for tag, _ in elements[:policy]] == ["html", "head", "meta"]  # before anything that it forbids
    assert {"default-src 'none'", "img-src data:"} <= set(elements[policy][1]["content"].split("; "))
    assert "script" not in elements[policy][1]["content"]
    return elements


def make_hostile_section(svg: str, view: str) -> EvaluationSection:
    """Returns a section from a hostile record."""
    card = {
        "name": ATTACK, "defect_type": ATTACK, "score": 1.0, "threshold": 1.0, "score_to_threshold": 1.0, "p_value": 0.5,
        "verdict": ATTACK, "mistake": ATTACK, "views": {ATTACK: view},
    }  # fmt: skip
    share = {"count": 1, "total": 4}
    section = {
        "good": share, "bad": share, "target_fpr": 0.05, "num_calibration": 20, "method": ATTACK, "caveats": [ATTACK],
        "plots": [{"title": ATTACK, "caption": ATTACK, "svg": svg}],
        "gallery": [{"title": ATTACK, "note": ATTACK, "cards": [card]}],
    }  # fmt: skip
    return TypeAdapter(EvaluationSection).validate_python(section)


NO_METRICS = dict.fromkeys(METRICS)
RESULT: dict[str, Any] = {
    "num_normal": 4, "num_anomalous": 4, "bundle": HALF_PAIR, "version": ATTACK, "data": ATTACK, "bounds": {}, **NO_METRICS,
    "defect_types": {ATTACK: {"num_images": 4, "bounds": {}, **NO_METRICS}},
}  # fmt: skip
SCRIPTED_SVG = (
    "<svg onload='alert(1)'><script>alert(1)</script><image href='https://example.org/x.png'/>"
    "<foreignObject><iframe src='javascript:alert(1)'></iframe></foreignObject><a href='javascript:alert(1)'>x</a></svg>"
)


VIEWS = ("https://example.org/x.gif", "javascript:alert(1)", "data:text/html;base64,PHNjcmlwdD4=", "/etc/passwd")
SVGS = (SCRIPTED_SVG, "", "no element", "<svg", "</figure><script>alert(1)</script>", *ATTACKS)


@pytest.mark.parametrize(
    ("svg", "view"), [*((svg, VIEWS[0]) for svg in SVGS), *((SCRIPTED_SVG, view) for view in VIEWS)]
)
def test_an_evaluation_record_puts_no_markup_into_the_page(svg: str, view: str) -> None:
    results, sections = {HALF_PAIR: RESULT, "board": {"error": HALF_PAIR}}, {HALF_PAIR: make_hostile_section(svg, view)}
    elements = assert_harmless(render_evaluation_page(results, sections, {HALF_PAIR: f"categories/{HALF_PAIR}.html"}))
    assert ("img", {"src": "data:,", "alt": f"{ATTACK}: {ATTACK}"}) in elements
    assert encode_svg_uri(svg) in {attributes.get("src") for _, attributes in elements}


def test_a_manifest_puts_no_markup_into_the_page_of_a_training(part_bundles: dict[str, str]) -> None:
    manifest = read_manifest(part_bundles["gear"])
    manifest["metrics"] = {
        "history": [{"epoch": number, "loss": 1.0, ATTACK: 2.0} for number in range(2)],
        "selection": [{"image_alignment": ATTACK, "score": 0.5}],
        "seconds": {ATTACK: 1.0},
        "warnings": [ATTACK],
    }
    manifest.update(git_commit=ATTACK, created_at=ATTACK, versions={"torch": ATTACK})
    manifest["data"].update(uri=HALF_PAIR, fingerprint=ATTACK)
    assert_harmless(render_training_report({HALF_PAIR: build_report_section(HALF_PAIR, manifest)}, HALF_PAIR))


def test_a_trial_puts_no_markup_into_the_page_of_a_sweep(tmp_path: Path) -> None:
    base = {"name": "base", "data": {"uri": "images"}, "storage": str(tmp_path)}
    space = {"density.num_channels": [50, 100]}
    sweep = parse_sweep_config({"name": "sweep", "base": base, "searcher": "grid", "space": space})
    part = {ATTACK: {"score": 0.5, "curve": [[0, 0.5], [1, 0.6]]}, "gear": {"score": 0.4, "curve": [[0, 0.5]]}}
    trials = [
        TrialRecord(number, None, {"density.num_channels": 50}, status, score, part, ATTACK)
        for number, (status, score) in enumerate([("finished", 0.5), ("failed", None)])
    ]
    write_sweep_report(str(tmp_path), sweep, trials)
    assert_harmless((tmp_path / "report.html").read_bytes())


def test_a_plot_is_a_self_contained_picture_with_the_colours_of_the_page() -> None:
    plot = plots.plot_values_by_step(ATTACK, "", {name: ([1.0, 2.0], [0.5, 0.4]) for name in ATTACKS})
    tree = ElementTree.fromstring(base64.b64decode(encode_svg_uri(plot.svg).partition(",")[2]))
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    style = next(element.text or "" for element in tree if element.tag.endswith("style"))
    assert [name for name in re.findall(r"var\((--[a-z]+)\)", plot.svg) if f"{name}:" not in style] == []
    assert "prefers-color-scheme: dark" in style


def test_names_become_no_markup_in_markdown_tables() -> None:
    table = format_evaluation_tables({"a|b <img src=x onerror=alert(1)>\n# c": RESULT, "d": {"error": "[x](http://y)"}})
    assert r"| a\|b \<img src=x onerror=alert(1)> # c |" in table
    assert not re.search(r"(?<!\\)<[a-z/]", table)
    assert r"\[x\](http://y)" in table
