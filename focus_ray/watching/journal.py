"""The output folder of a watch: one JSON line per image in `verdicts-YYYY-MM-DD.jsonl`, a CSV table per day, and overlays.

An overlay is the image with its heat map drawn over it. The lines are the only state: at the start they are read to find the
images that are already inspected. A line is written after its overlay. If a crash cut off the last line, the line is removed,
and its image is inspected again. The tables are made from the lines, and are made again after a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from focus_ray.csv_tables import COLUMNS, build_verdict_row, format_csv
from focus_ray.errors import DataError
from focus_ray.watching.processed_keys import ProcessedKeySet

_EXTRA_COLUMNS = ("time", "bundle", "sha256", "milliseconds")
TABLE_COLUMNS = ("time", *COLUMNS, *_EXTRA_COLUMNS[1:])
_LINES_PATTERN = "verdicts-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"
_KEY = re.compile(rb'\{"key": "([0-9a-f]{16})([0-9a-f]{16})", ')
_LOCK_NAME = ".watch.lock"


class VerdictJournal:
    """Writes one JSON line per inspected image into the output folder, and locks the folder for this process.

    Must be closed, or used in a `with` statement.

    Attributes:
        processed_keys: `compute_stamp_key` and `compute_content_key` of all files that need no inspection any more.
        num_lines_at_start: Number of valid lines in the folder when the journal was opened.
    """

    def __init__(
        self, folder: str | Path, table: bool = False, log: Callable[[str], None] = lambda message: None
    ) -> None:
        """Locks the folder, removes lines that a crash cut off, reads the keys of all lines, and completes the CSV tables.

        Args:
            folder: Output folder; it is created if it does not exist.
            table: True to also write a CSV table per day.
            log: Called with each message about removed or ignored lines.

        Raises:
            DataError: Another process writes to the folder, the folder cannot be used, or `table` is True and a line is not
                valid JSON.
        """
        self.folder, self.table = Path(folder).expanduser(), table
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_folder(self.folder)
            days = sorted(self.folder.glob(_LINES_PATTERN))
            keys = array("Q")
            for day in days:
                keys += _read_image_keys(day, log)
            self.processed_keys, self.num_lines_at_start = ProcessedKeySet(keys), len(keys) // 2
            if table:
                self._rebuild_tables(days)
        except OSError as error:
            raise DataError(f"{folder}: verdicts cannot be written here: {error.strerror or error}") from error

    def __enter__(self) -> VerdictJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock of the output folder."""
        self._lock.close()

    def write_lines(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Appends one JSON line per image to the file of today, and one row per image to the CSV table if tables are on.

        Both are on the disk when the function returns.

        Args:
            lines: One dict of JSON values per image. Its first entry is "key" with the `format_image_key` of the image.

        Returns:
            The lines as JSON texts.

        Raises:
            DataError: The lines or rows cannot be written completely. The next start removes an incomplete line.
        """
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        path = self.folder / f"verdicts-{datetime.now():%Y-%m-%d}.jsonl"
        try:
            _append_to_file(path, "".join(f"{text}\n" for text in texts))
            if self.table:
                table = path.with_suffix(".csv")
                _append_to_file(table, _format_csv_rows(lines, header=not table.exists()))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}; images without a line are inspected at the next start"
            ) from error
        return texts

    def _rebuild_tables(self, days: Sequence[Path]) -> None:
        """Rebuilds the CSV tables that may lack rows, from the JSON lines of their days.

        Rebuilds missing tables, tables that are older than the lines of their day, and always the table of the last
        day: after a crash it may lack rows.

        Args:
            days: File of the JSON lines of each day.

        Raises:
            DataError: A line is not valid JSON.
            OSError: A file cannot be read or written.
        """
        newest_ns = max((day.stat().st_mtime_ns for day in days), default=0)
        for day in days:
            table = day.with_suffix(".csv")
            changed_ns = day.stat().st_mtime_ns
            if table.exists() and changed_ns < newest_ns and changed_ns <= table.stat().st_mtime_ns:
                continue
            temporary = self.folder / f".{table.name}.new"
            with day.open("rb") as lines, temporary.open("w", encoding="utf-8", newline="") as stream:
                stream.write(_format_csv_rows([], header=True))
                for number, line in enumerate(lines, 1):
                    try:
                        stream.write(_format_csv_rows([json.loads(line)] if _KEY.match(line) else []))
                    except ValueError as error:
                        raise DataError(
                            f"{day}, line {number}: not valid JSON ({error}): correct or delete the line"
                        ) from error
            os.replace(temporary, table)


def format_image_key(stamp: int, content: int) -> str:
    """Returns the value of "key" in a journal line: 32 hexadecimal digits.

    Args:
        stamp: Key of the file's path, size, times and inode, from `compute_stamp_key`.
        content: Key of the file's path and bytes, from `compute_content_key`.
    """
    return f"{stamp:016x}{content:016x}"


def _append_to_file(path: Path, text: str) -> None:
    """Appends text to a file. The text is on the disk when the function returns.

    Raises:
        OSError: The text cannot be written completely.
    """
    with path.open("ab", buffering=0) as stream:
        remaining = memoryview(text.encode())
        while remaining:
            remaining = remaining[stream.write(remaining) :]
        os.fsync(stream.fileno())


def _lock_folder(folder: Path) -> IO[str]:
    """Locks the folder with a lock file in it, until the returned file is closed or the process ends.

    Writes process and host into the lock file, for the message to other processes.

    Raises:
        DataError: Another process holds the lock.
        OSError: The lock file cannot be written.
    """
    stream = (folder / _LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise DataError(
            f"{folder}: {holder} writes its verdicts to this folder: give another --output, or stop that process"
        ) from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}")
    stream.flush()
    return stream


def _read_image_keys(day: Path, log: Callable[[str], None]) -> array[int]:
    """Returns stamp key and content key of each line of a day as a flat array, and deletes a last line that a crash cut off.

    Logs the removal, and the number of lines without keys, which are ignored.

    Raises:
        OSError: The file cannot be read or shortened.
    """
    keys = array("Q")
    num_invalid = num_bytes = 0
    with day.open("r+b") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                stream.truncate(num_bytes)
                log(f"{day}: the last line was cut off and is removed; its image is inspected again")
                break
            num_bytes += len(line)
            if match := _KEY.match(line):
                keys.extend([int(match[1], 16), int(match[2], 16)])
            else:
                num_invalid += 1
    if num_invalid:
        log(f"{day}: {num_invalid} lines have no key of an image, and are ignored")
    return keys


def _format_csv_rows(lines: Sequence[Mapping[str, Any]], header: bool = False) -> str:
    """Returns one CSV row per journal line as text. The names of the columns come first if `header` is True."""
    rows = [{**build_verdict_row(line), **{key: line[key] for key in _EXTRA_COLUMNS if key in line}} for line in lines]
    return format_csv(rows, TABLE_COLUMNS, header)
