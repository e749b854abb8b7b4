"""watch."""

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

from focus_ray.cli.output import EXIT_PARTLY, image_paths, require, say
from focus_ray.errors import DataError


def add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="inspect what arrives in a folder, until it is stopped",
        description="Inspects every image that is in a folder or arrives there, once, and writes a line an image to "
        "OUTPUT/verdicts-YYYY-MM-DD.jsonl. Ctrl-C ends it; started again, it goes on where it was.",
    )
    watch.add_argument("bundle", help="a bundle, a run's folder, or a registry or a team's folder of one")
    watch.add_argument("folder", help="where images arrive; folders within count too")
    watch.add_argument("--output", default="verdicts", metavar="FOLDER", help="for the verdicts (default: verdicts)")
    watch.add_argument("--csv", action="store_true", help="write a table a day too")
    watch.add_argument(
        "--overlays",
        nargs="?",
        const="all",
        choices=("all", "anomalous"),
        help="write heat maps too, of all images or of anomalous ones (default: all)",
    )
    watch.add_argument("--print", dest="show", action="store_true", help="write the lines to standard output too")
    watch.add_argument(
        "--once", action="store_true", help="inspect what is there and end; exits with 3 if a file was no image"
    )
    watch.add_argument(
        "--on-anomalous", metavar="COMMAND", help="run for each anomalous image, with its line on standard input"
    )
    watch.add_argument(
        "--poll-s", type=float, default=0.5, metavar="S", help="between looks at the folder (default: 0.5)"
    )
    watch.add_argument(
        "--settle-s", type=float, default=1.0, metavar="S", help="a file has to rest before it is read (default: 1)"
    )
    watch.add_argument(
        "--give-up-s",
        type=float,
        default=30.0,
        metavar="S",
        help="until a file at rest that is no image is one (default: 30)",
    )
    watch.add_argument("--batch", type=int, default=8, metavar="N", help="images inspected at once (default: 8)")
    watch.add_argument("--category", metavar="NAME", help="which, where the place has models of several")
    watch.add_argument(
        "--version",
        dest="version_of",
        default="latest",
        metavar="NAME",
        help="of a registry's models: a version or an alias (default: latest)",
    )
    watch.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    watch.add_argument("--engine", default="torch", help="as of inspect (default: torch)")
    watch.add_argument("--examples", nargs="+", metavar="IMAGE", help="as of inspect")
    watch.set_defaults(run=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    require(arguments.bundle, arguments.folder)
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
    examples = image_paths(arguments.examples) if arguments.examples else []
    try:
        command = tuple(shlex.split(arguments.on_anomalous or ""))
    except ValueError as error:
        raise DataError(f"--on-anomalous {arguments.on_anomalous}: no command: {error}") from error
    if command and shutil.which(command[0]) is None:
        raise DataError(
            f"--on-anomalous {arguments.on_anomalous}: {command[0]} is no program on the PATH, nor a file that runs"
        )
    with _stopped_by_signals() as stop:
        return _run(arguments, examples, command, stop)


def _run(arguments: argparse.Namespace, examples: list[Path], command: tuple[str, ...], stop: threading.Event) -> int:
    from focus_ray.watching.journal import Journal

    with Journal(arguments.output, arguments.csv, say) as journal:
        say(f"watch: {arguments.folder} -> {arguments.output}, where {journal.num_known} images have a line")
        from focus_ray.bundle.inspector import Inspector  # seconds of imports, which a folder in use need not wait for
        from focus_ray.watching.model import WatchedModel
        from focus_ray.watching.watch import Watch, WatchSettings, summarize_counts

        model = WatchedModel(
            arguments.bundle,
            lambda uri: Inspector.load(uri, arguments.device, engine=arguments.engine, examples=examples),
            say,
            version=arguments.version_of,
            category=arguments.category,
        )
        settings = WatchSettings(
            arguments.poll_s,
            arguments.settle_s,
            arguments.give_up_s,
            arguments.batch,
            overlays=arguments.overlays,
            on_anomalous=command,
            once=arguments.once,
        )
        watch = Watch(
            Path(arguments.folder), model, journal, settings, say, _Shown() if arguments.show else lambda line: None
        )
        watch.run(stop)
        left = f", {watch.num_pending} left for the next start" if watch.num_pending else ""
        say(f"watch: ended: {summarize_counts(watch.counts)}{left}")
    return EXIT_PARTLY if arguments.once and (watch.counts["error"] or watch.num_pending) else 0


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, as a wish to end; a second one ends at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Shown:
    """Lines on standard output, while there is a reader: its end is none of the watch."""

    def __init__(self) -> None:
        self.open = True

    def __call__(self, line: str) -> None:
        if not self.open:
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.open = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at the end
            say("watch: nobody reads standard output any more; the verdicts are written on")
