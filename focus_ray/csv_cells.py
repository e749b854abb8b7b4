"""Cells of CSV files: text that a spreadsheet would take for a formula is escaped, and read back as it was."""

from __future__ import annotations

import re
from typing import Any

# A cell begins with the text, or after a separator: in some countries spreadsheets split lines at semicolons. Full-width signs
# count too: some spreadsheets take them for the plain ones.
_BEGIN = r"(?:^|(?<=[;\t\r\n]))"
_FORMULA = r"(?='*\s*[=+\-@\t\r\n＝＋－＠])"
_UNESCAPED, _ESCAPED = re.compile(_BEGIN + _FORMULA), re.compile(f"{_BEGIN}'{_FORMULA}")


def csv_cell(value: Any) -> Any:
    """Returns a cell that no spreadsheet runs: text that could be a formula begins with an apostrophe (OWASP, CSV injection).

    Numbers are returned unchanged. `csv_text` restores every text.
    """
    return _UNESCAPED.sub("'", value) if isinstance(value, str) else value


def csv_text(cell: str) -> str:
    """Returns the text from which `csv_cell` made a cell."""
    return _ESCAPED.sub("", cell)
