"""The output folder: a line an image in `verdicts-YYYY-MM-DD.jsonl`, and what is made of it: a table a day, and pictures.

The lines are the truth, and the only state: at the start they are read for what has been inspected. A line is written in one
piece after its picture; the one that a crash cut off is taken away, its image is inspected again, and its picture replaced.
Tables follow the lines, and are made again of them where a crash came between.
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
from focus_ray.storage import write_bytes
from focus_ray.watching.seen import Seen

TABLE_COLUMNS = ("time", *COLUMNS, "bundle", "sha256", "milliseconds")
_DAYS = "verdicts-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"
_KEY = re.compile(rb'\{"key": "([0-9a-f]{16})([0-9a-f]{16})", ')
_BLOCK = 65536
_LOCK = ".watch.lock"


class Journal:
    """Writes verdicts into a folder, alone there. To be closed, or used as a context.

    seen: keys of the images that have a line.  num_known: lines that were there at the start.
    """

    def __init__(
        self, folder: str | Path, table: bool = False, log: Callable[[str], None] = lambda message: None
    ) -> None:
        """
        Args:
            folder: is made where there is none.  table: whether to write a CSV of each day too.

        Raises: DataError: another process writes there, or the folder cannot be used.
        """
        self.folder, self.table, self.log = Path(folder).expanduser(), table, log
        self._day, self._lines, self._rows = "", _Appended(), _Appended()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            days = sorted(self.folder.glob(_DAYS))
            for day in days:
                _mend(day, log)
            keys = _keys_of(days, log)
            self.seen, self.num_known = Seen(keys), len(keys) // 2
            if table:
                self._mend_tables(days)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used for verdicts: {error.strerror or error}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._rows.close()
        self._lock.close()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Adds lines, which are on disk when it returns; each begins with "key": `key_text` of its image.

        Returns: them as text.  Raises: DataError: they cannot be written, wholly; what was written is mended at the next start.
        """
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        day = datetime.now().strftime("%Y-%m-%d")
        path = self.folder / f"verdicts-{day}.jsonl"
        try:
            if day != self._day:
                self._day = day
                self._lines.open(path)
                if self.table:
                    self._rows.open(path.with_suffix(".csv"), _table_text([], header=True))
            self._lines.add("".join(f"{text}\n" for text in texts))
            if self.table:
                self._rows.add(_table_text(lines))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}; what has no line yet is inspected at the next start"
            ) from error
        return texts

    def write_picture(self, name: str, content: bytes) -> None:
        """A file below the folder, whole or not at all; a crash leaves no piece. Raises: DataError: it cannot be written."""
        path, made = self.folder / name, self.folder / ".picture.new"
        write_bytes(made, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, path)
        except OSError as error:
            made.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _mend_tables(self, days: Sequence[Path]) -> None:
        """Makes the table again of each day that has none, or an older one, and of the one written last, where a row may lack."""
        newest = max((day.stat().st_mtime_ns for day in days), default=0)
        for day in days:
            table = day.with_suffix(".csv")
            written = day.stat().st_mtime_ns
            if table.exists() and written < newest and written <= table.stat().st_mtime_ns:
                continue
            made = self.folder / f".{table.name}.new"
            with made.open("w", encoding="utf-8", newline="") as stream:
                stream.write(_table_text([], header=True))
                for line in _read_lines(day):
                    stream.write(_table_text([line]))
            os.replace(made, table)


def key_text(stamp: int, content: int) -> str:
    """A line's key: `seen.stamp_key` and `seen.content_key` of its image."""
    return f"{stamp:016x}{content:016x}"


class _Appended:
    """A text file that is only added to, without a buffer: what could not be written is not tried again at its end."""

    def __init__(self) -> None:
        self._stream: io.FileIO | None = None

    def open(self, path: Path, header: str = "") -> None:
        """header: what a new file begins with."""
        self.close()
        self._stream = io.FileIO(path, "a")
        if header and not self._stream.tell():
            self.add(header)

    def add(self, text: str) -> None:
        """On disk when it returns. Raises: OSError."""
        assert self._stream is not None
        rest = memoryview(text.encode())
        while rest:
            rest = rest[self._stream.write(rest) :]
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()


def _locked(folder: Path) -> IO[str]:
    """A lock that goes with the process. Raises: DataError: another holds it."""
    stream = (folder / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise DataError(
            f"{folder}: {holder} writes its verdicts here: give another --output, or end it first"
        ) from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}")
    stream.flush()
    return stream


def _mend(path: Path, log: Callable[[str], None]) -> None:
    """Takes away what follows the last whole line: a crash cut it off."""
    with path.open("r+b") as stream:
        size = start = stream.seek(0, os.SEEK_END)
        whole = 0
        while start and not whole:
            end, start = start, max(0, start - _BLOCK)
            stream.seek(start)
            place = stream.read(end - start).rfind(b"\n")
            whole = start + place + 1 if place >= 0 else 0
        if whole < size:
            stream.truncate(whole)
            log(f"{path}: its last line was cut off, and is taken away; its image is inspected again")


def _keys_of(days: Sequence[Path], log: Callable[[str], None]) -> array[int]:
    """Of all lines of all days; one that is no line of ours is told."""
    keys = array("Q")
    for day in days:
        strange = 0
        with day.open("rb") as stream:
            for line in stream:
                if found := _KEY.match(line):
                    keys.append(int(found[1], 16))
                    keys.append(int(found[2], 16))
                else:
                    strange += 1
        if strange:
            log(f"{day}: {strange} lines begin otherwise than the watcher's, and count for no image")
    return keys


def _read_lines(day: Path) -> Iterator[dict[str, Any]]:
    with day.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not _KEY.match(line):
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{day}, line {number}: no JSON ({error}): mend or delete the line") from error


def _table_text(lines: Sequence[Mapping[str, Any]], header: bool = False) -> str:
    more = ("time", "bundle", "sha256", "milliseconds")
    rows = [{**table_row(line), **{key: line[key] for key in more if key in line}} for line in lines]
    return table_text(rows, TABLE_COLUMNS, header)
