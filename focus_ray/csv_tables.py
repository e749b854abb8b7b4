"""CSV tables of verdicts, the same for `inspect --csv` and for `watch --csv`, and cells that no spreadsheet runs as a formula."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLUMNS = (
    *("image", "category", "verdict", "score", "threshold", "p_value", "num_regions"),
    *("largest_x", "largest_y", "largest_width", "largest_height", "trained_on", "error"),
)
# A cell begins with the text, or after a separator: in some countries spreadsheets split lines at semicolons. Full-width signs
# count too: some spreadsheets take them for the plain ones.
_BEGIN = r"(?:^|(?<=[;\t\r\n]))"
_FORMULA = r"(?='*\s*[=+\-@\t\r\n＝＋－＠])"
_UNESCAPED, _ESCAPED = re.compile(_BEGIN + _FORMULA), re.compile(f"{_BEGIN}'{_FORMULA}")


def escape_formula(value: Any) -> Any:
    """Returns a cell that no spreadsheet runs: text that could be a formula begins with an apostrophe (OWASP, CSV injection).

    Numbers are returned unchanged. `unescape_formula` restores every text.
    """
    return _UNESCAPED.sub("'", value) if isinstance(value, str) else value


def unescape_formula(cell: str) -> str:
    """Returns the text from which `escape_formula` made a cell."""
    return _ESCAPED.sub("", cell)


def build_verdict_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table row of an image: values of COLUMNS, without the columns that have no value.

    The largest region is the region with the most pixels.

    Args: line: 'image', 'category', and either 'error' or the entries of `Inspection.to_dict`.
    """
    row = {key: line[key] for key in ("image", "category", "score", "threshold", "p_value", "error") if key in line}
    if "error" in line:
        return row
    row |= {"verdict": "anomalous" if line["anomalous"] else "normal", "num_regions": len(line["regions"])}
    row["trained_on"] = "true" if line.get("trained_on") else "false"
    if line["regions"]:
        largest = max(line["regions"], key=lambda region: region["area"])
        row |= {f"largest_{key}": largest[key] for key in ("x", "y", "width", "height")}
    return row


def format_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS, header: bool = True) -> str:
    """Returns rows as CSV text; a missing value becomes an empty cell.

    Text that a spreadsheet would read as a formula is escaped (`escape_formula`).

    Args: header: whether the text begins with the column names.
    """
    buffer = _NewlineBuffer(newline="")
    # with the line end "\r\n" the writer also quotes a cell with a single carriage return, which would start a new row
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows({key: escape_formula(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


class _NewlineBuffer(io.StringIO):
    """Text buffer that ends each row with a newline only."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")
