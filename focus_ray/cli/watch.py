"""The command `watch`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from focus_ray.cli.options import add_engine_options, add_model_version_option
from focus_ray.cli.output import EXIT_PARTLY, check_paths_exist, list_image_paths, print_message
from focus_ray.errors import DataError


def add_parsers(commands: Any) -> None:
    """Adds the parser of `watch`."""
    watch = commands.add_parser(
        "watch",
        help="inspect images as they arrive in a folder, until you stop the command",
        description="Inspects every image in a folder, and every image that arrives there, once. Writes one line for each "
        "image to OUTPUT/verdicts-YYYY-MM-DD.jsonl. Ctrl-C ends the command; after a restart it continues with the next "
        "image.",
    )
    add = watch.add_argument
    add("bundle", help="a bundle, a run's folder, a registry, or a team's folder in a registry")
    add("folder", help="folder in which images arrive, including its subfolders")
    add("--output", default="verdicts", metavar="FOLDER", help="folder of the verdicts (default: verdicts)")
    add("--csv", action="store_true", help="also write a table for each day")
    add(
        "--overlays",
        nargs="?",
        const="all",
        choices=("all", "anomalous"),
        help="also write heat maps, of all images or of anomalous images (default: all)",
    )
    add("--print", dest="show", action="store_true", help="also print the lines on standard output")
    add(
        "--once",
        action="store_true",
        help="inspect the existing images and end; exit status 3 if a file is not an image",
    )
    add(
        "--on-anomalous",
        metavar="COMMAND",
        help="command to run for each anomalous image, with its line on standard input",
    )
    add(
        "--poll-s",
        type=float,
        default=0.5,
        metavar="S",
        help="seconds between two listings of the folder (default: 0.5)",
    )
    add(
        "--settle-s",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds without a change after which a file is read (default: 1)",
    )
    add(
        "--give-up-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds without a change after which an unreadable image gets an error line (default: 30)",
    )
    add("--batch", type=int, default=8, metavar="N", help="images inspected at once (default: 8)")
    add("--category", metavar="NAME", help="category, if the place has models of several categories")
    add_model_version_option(watch)
    add_engine_options(watch)
    watch.set_defaults(run=_run_watch_command)


def _run_watch_command(arguments: argparse.Namespace) -> int:
    """Runs `watch`: checks the arguments, then watches until a signal stops it. Returns the exit status."""
    check_paths_exist(arguments.bundle, arguments.folder)
    for name in ("poll_s", "settle_s", "give_up_s"):
        if not getattr(arguments, name) >= 0:
            raise DataError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected seconds, 0 or more")
    if arguments.batch < 1:
        raise DataError(f"--batch {arguments.batch}: expected 1 or more")
    if not Path(arguments.folder).is_dir():
        raise DataError(f"{arguments.folder}: not a folder")
    if "://" in arguments.output:
        raise DataError(f"--output {arguments.output}: expected a folder of this machine")
    if os.path.realpath(arguments.output) == os.path.realpath(arguments.folder):
        raise DataError(
            f"--output {arguments.output}: the watched folder itself: pictures in it would be inspected; give another"
        )
    examples = list_image_paths(arguments.examples) if arguments.examples else []
    try:
        command = tuple(shlex.split(arguments.on_anomalous or ""))
    except ValueError as error:
        raise DataError(f"--on-anomalous {arguments.on_anomalous}: no command: {error}") from error
    if command and shutil.which(command[0]) is None:
        raise DataError(
            f"--on-anomalous {arguments.on_anomalous}: {command[0]} is no program on the PATH, nor a file that runs"
        )
    from focus_ray.watching.journal import VerdictJournal

    with (
        _catch_stop_signals() as stop,
        VerdictJournal(arguments.output, arguments.csv, print_message) as journal,
    ):
        print_message(
            f"watch: {arguments.folder} -> {arguments.output}, where {journal.num_lines_at_start} images have a line"
        )
        from focus_ray.bundle.inspector import Inspector  # takes seconds to import, so check the folder first
        from focus_ray.watching.model import ReloadableModel
        from focus_ray.watching.watch import FolderWatch, WatchSettings, format_verdict_counts

        model = ReloadableModel(
            arguments.bundle,
            lambda uri: Inspector.load(uri, arguments.device, engine=arguments.engine, examples=examples),
            print_message,
            version=arguments.version_of,
            category=arguments.category,
        )
        options = {name: getattr(arguments, name) for name in ("poll_s", "settle_s", "give_up_s", "overlays", "once")}
        settings = WatchSettings(batch_size=arguments.batch, on_anomalous=command, **options)
        print_line = _LinePrinter() if arguments.show else lambda line: None
        watch = FolderWatch(Path(arguments.folder), model, journal, settings, print_message, print_line)
        watch.run(stop)
        remaining_text = f", {len(watch.pending)} left for the next start" if watch.pending else ""
        print_message(f"watch: ended: {format_verdict_counts(watch.counts)}{remaining_text}")
    return EXIT_PARTLY if arguments.once and (watch.counts["error"] or watch.pending) else 0


@contextmanager
def _catch_stop_signals() -> Iterator[threading.Event]:
    """Context manager: yields an event that SIGINT or SIGTERM sets.

    A second signal has its usual effect and ends the process.
    """
    stop = threading.Event()

    def request_stop(number: int, _: object) -> None:
        """Sets the event and restores the previous handler of the signal."""
        signal.signal(number, before[signal.Signals(number)])
        stop.set()

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _LinePrinter:
    """Prints lines on standard output, until the program that reads them ends (a closed pipe). The watch continues."""

    def __init__(self) -> None:
        self.open = True

    def __call__(self, line: str) -> None:
        if not self.open:
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.open = False
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # otherwise Python reports a broken pipe at exit
            print_message("watch: nobody reads standard output any more; the verdicts are written on")
