"""The output folder of a watch: one JSON line per image in `verdicts-YYYY-MM-DD.jsonl`, a CSV table per day, and overlays.

The lines are the only state. They are read at the start to find the images that are already inspected. A line is written in
one piece, after its overlay. If a crash cut off the last line, the line is removed, and its image is inspected again. The
tables are derived from the lines, and are rebuilt from them after a crash.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from focus_ray.errors import DataError
from focus_ray.evaluation.table import COLUMNS, table_row, table_text
from focus_ray.storage.files import write_bytes
from focus_ray.watching.processed_keys import ProcessedKeys

TABLE_COLUMNS = ("time", *COLUMNS, "bundle", "sha256", "milliseconds")
_LINES_PATTERN = "verdicts-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"
_KEY = re.compile(rb'\{"key": "([0-9a-f]{16})([0-9a-f]{16})", ')
_BLOCK_BYTES = 65536
_LOCK_NAME = ".watch.lock"


class Journal:
    """Writes one JSON line per inspected image into the output folder, and locks the folder for this process.

    Must be closed, or used in a `with` statement.

    Attributes:
        processed: Keys (`stamp_key` and `content_key`) of all images that need no inspection any more.
        num_lines_at_start: Number of valid lines in the folder when the journal was opened.
    """

    def __init__(
        self, folder: str | Path, table: bool = False, log: Callable[[str], None] = lambda message: None
    ) -> None:
        """Locks the folder, removes a line that a crash cut off, and reads the keys of all lines.

        Args:
            folder: Output folder; it is created if it does not exist.
            table: True to also write a CSV table per day.
            log: Takes messages.

        Raises:
            DataError: Another process writes to the folder, or the folder cannot be used.
        """
        self.folder, self.table, self.log = Path(folder).expanduser(), table, log
        self._day, self._lines, self._rows = "", _AppendOnlyFile(), _AppendOnlyFile()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_folder(self.folder)
            days = sorted(self.folder.glob(_LINES_PATTERN))
            for day in days:
                _remove_cut_line(day, log)
            keys = _read_keys(days, log)
            self.processed, self.num_lines_at_start = ProcessedKeys(keys), len(keys) // 2
            if table:
                self._rebuild_tables(days)
        except OSError as error:
            raise DataError(f"{folder}: verdicts cannot be written here: {error.strerror or error}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and releases the lock."""
        self._lines.close()
        self._rows.close()
        self._lock.close()

    def write_lines(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Appends one line per image to the file of today. The lines are on the disk when the function returns.

        Args:
            lines: Each line is a dict of JSON values. Its first entry is "key" with the `key_text` of the image.

        Returns:
            The lines as JSON texts.

        Raises:
            DataError: The lines cannot be written completely. The next start removes an incomplete line.
        """
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        day = datetime.now().strftime("%Y-%m-%d")
        path = self.folder / f"verdicts-{day}.jsonl"
        try:
            if day != self._day:
                self._day = day
                self._lines.open(path)
                if self.table:
                    self._rows.open(path.with_suffix(".csv"), _format_rows([], header=True))
            self._lines.append("".join(f"{text}\n" for text in texts))
            if self.table:
                self._rows.append(_format_rows(lines))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}; images without a line are inspected at the next start"
            ) from error
        return texts

    def write_picture(self, name: str, content: bytes) -> None:
        """Writes an image file into the output folder, completely or not at all, even if the process is killed.

        Args:
            name: Path relative to the output folder.
            content: Bytes of the file.

        Raises:
            DataError: The file cannot be written.
        """
        path, temporary = self.folder / name, self.folder / ".picture.new"
        write_bytes(temporary, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _rebuild_tables(self, days: Sequence[Path]) -> None:
        """Rebuilds the CSV tables that may lack rows, from the JSON lines of their days.

        Rebuilds missing tables, tables that are older than the lines of their day, and always the table of the last
        day: after a crash it may lack rows.

        Args:
            days: File of the JSON lines of each day.
        """
        newest_ns = max((day.stat().st_mtime_ns for day in days), default=0)
        for day in days:
            table = day.with_suffix(".csv")
            changed_ns = day.stat().st_mtime_ns
            if table.exists() and changed_ns < newest_ns and changed_ns <= table.stat().st_mtime_ns:
                continue
            temporary = self.folder / f".{table.name}.new"
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                stream.write(_format_rows([], header=True))
                for line in _read_lines(day):
                    stream.write(_format_rows([line]))
            os.replace(temporary, table)


def key_text(stamp: int, content: int) -> str:
    """Returns the entry "key" of a journal line: the stamp key and the content key as 32 hexadecimal digits."""
    return f"{stamp:016x}{content:016x}"


class _AppendOnlyFile:
    """A text file that appends text without a buffer, so that `close` does not write failed text again."""

    def __init__(self) -> None:
        self._stream: io.FileIO | None = None

    def open(self, path: Path, header: str = "") -> None:
        """Opens a file. Writes the header if the file is new."""
        self.close()
        self._stream = io.FileIO(path, "a")
        if header and not self._stream.tell():
            self.append(header)

    def append(self, text: str) -> None:
        """Appends text. The text is on the disk when the function returns.

        Raises:
            OSError: The text cannot be written completely.
        """
        assert self._stream is not None
        remaining = memoryview(text.encode())
        while remaining:
            remaining = remaining[self._stream.write(remaining) :]
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file, if one is open."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()


def _lock_folder(folder: Path) -> IO[str]:
    """Locks the folder until the returned file is closed or the process ends.

    Raises:
        DataError: Another process holds the lock.
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


def _remove_cut_line(path: Path, log: Callable[[str], None]) -> None:
    """Removes an incomplete last line, which a crash cut off. Logs the removal."""
    with path.open("r+b") as stream:
        size = start = stream.seek(0, os.SEEK_END)
        complete_bytes = 0
        while start and not complete_bytes:
            end, start = start, max(0, start - _BLOCK_BYTES)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            complete_bytes = start + newline + 1 if newline >= 0 else 0
        if complete_bytes < size:
            stream.truncate(complete_bytes)
            log(f"{path}: the last line was cut off and is removed; its image is inspected again")


def _read_keys(days: Sequence[Path], log: Callable[[str], None]) -> array[int]:
    """Returns the stamp key and the content key of each line, in order. Logs how many lines of a day have no keys."""
    keys = array("Q")
    for day in days:
        num_invalid = 0
        with day.open("rb") as stream:
            for line in stream:
                if match := _KEY.match(line):
                    keys.append(int(match[1], 16))
                    keys.append(int(match[2], 16))
                else:
                    num_invalid += 1
        if num_invalid:
            log(f"{day}: {num_invalid} lines have no key of an image, and are ignored")
    return keys


def _read_lines(day: Path) -> Iterator[dict[str, Any]]:
    """Yields each line of a day that has a key, as a dict of JSON values.

    Raises:
        DataError: A line is not valid JSON.
    """
    with day.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not _KEY.match(line):
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{day}, line {number}: not valid JSON ({error}): correct or delete the line"
                ) from error


def _format_rows(lines: Sequence[Mapping[str, Any]], header: bool = False) -> str:
    """Returns one CSV row per line as text. The header comes first if `header` is True."""
    extra_columns = ("time", "bundle", "sha256", "milliseconds")
    rows = [{**table_row(line), **{key: line[key] for key in extra_columns if key in line}} for line in lines]
    return table_text(rows, TABLE_COLUMNS, header)
