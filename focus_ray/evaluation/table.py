"""Writes verdicts as a CSV table, the same for `inspect --csv` and for `watch --csv`."""

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


def table_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS, header: bool = True) -> str:
    """Returns rows as CSV text; a missing value becomes an empty cell.

    Text that a spreadsheet would read as a formula is escaped (`csv_cells`).

    Args: header: whether the text begins with the column names.
    """
    buffer = _Lines(newline="")
    # with the line end "\r\n" the writer also quotes a cell with a single carriage return, which would start a new row
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


class _Lines(io.StringIO):
    """Text buffer that ends each row with a newline only."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")
