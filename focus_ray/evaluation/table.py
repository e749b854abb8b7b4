"""Verdicts as a table: a row of a JSON line, the same from `inspect --csv` and from `watch --csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from focus_ray.csv_cells import csv_cell

COLUMNS = (
    *("image", "category", "verdict", "score", "threshold", "p_value", "num_regions"),
    *("largest_x", "largest_y", "largest_width", "largest_height", "trained_on", "error"),
)


def table_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """COLUMNS of a line: an image's name and category, and its error or all that `Inspection.to_dict` gives.

    The largest region is that of the most pixels, in pixels of the image. What is not known has no entry.
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


def table_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS, header: bool = True) -> str:
    """Rows as CSV, below a line of column names where a header is asked for; what a row does not have is empty.

    Text that a spreadsheet would take for a formula is escaped (`csv_cells`).
    """
    buffer = _Lines(newline="")
    # with these ends of lines the writer quotes a cell that holds a carriage return alone, which would begin a row too
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


class _Lines(io.StringIO):
    """Takes rows, and ends each with a newline alone."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")
