"""The command `sweep`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from focus_ray.cli.output import EXIT_ERROR, print_message
from focus_ray.errors import ConfigError


def add_parsers(commands: Any) -> None:
    """Adds the parser of `sweep`."""
    sweep = commands.add_parser(
        "sweep",
        help="search settings over categories with Ray Tune",
        description="focus-ray sweep CONFIG [key=value ...] starts a sweep; base.KEY=VALUE overrides the configuration "
        "from which trials start. With name=NAME --resume the same command starts a sweep, and continues it after an "
        "interruption. `status`, `resume` and `report` take the folder of a sweep.",
    )
    sweep.add_argument(
        "what", metavar="CONFIG|status|resume|report", help="a YAML file, or a name of `focus-ray config list`"
    )
    sweep.add_argument(
        "override",
        nargs="*",
        metavar="key=value|PLACE",
        help="a setting such as num_trials=20, or the folder of a sweep",
    )
    sweep.add_argument(
        "--resume", action="store_true", help="continue the sweep of this name, or start it if there is none yet"
    )
    sweep.set_defaults(run=_run_sweep_command)


def _run_sweep_command(arguments: argparse.Namespace) -> int:
    """Runs `sweep`: starts a sweep, or uses an existing sweep (`status`, `resume`, `report`). Returns the exit status."""
    if arguments.what in ("status", "report", "resume"):
        words = [*arguments.override, *(["--resume"] if arguments.resume else [])]
        if len(words) != 1 or arguments.resume:
            raise ConfigError(f"focus-ray sweep {arguments.what}: expected one sweep's folder, got {words}")
        return _use_existing_sweep(arguments.what, words[0])
    from focus_ray.settings.standard import find_config_file
    from focus_ray.sweep.settings import load_sweep_config

    config = load_sweep_config(find_config_file(arguments.what, "sweep"), arguments.override)
    print_message(f"sweep: {arguments.what}")
    from focus_ray.sweep.driver import run_sweep

    return _print_sweep_outcome(run_sweep(config, resume=arguments.resume, log=print_message))


def _use_existing_sweep(action: str, place: str) -> int:
    """Shows, reports or resumes the sweep in a folder. Returns the exit status.

    Args:
        action: "status", "report" or "resume".
        place: Folder of the sweep.
    """
    from focus_ray.sweep import records, summary

    if action == "resume":
        from focus_ray.sweep.driver import resume_sweep

        return _print_sweep_outcome(resume_sweep(place, log=print_message))
    config, trials = records.read_sweep_config(place), records.read_trial_records(place)
    if action == "report":
        from focus_ray.sweep.report import write_sweep_report

        for name in write_sweep_report(place, config, trials):
            print_message(f"report: {place}/{name}")
    else:
        progress = records.summarize_progress(place, config, trials, log=print_message)
        print(json.dumps(progress, indent=1, ensure_ascii=False))
    print(summary.format_sweep_summary(config, trials))
    if action == "report":
        print("\n".join(summary.list_train_commands(place, trials)))
    return 0


def _print_sweep_outcome(outcome: Any) -> int:
    """Prints the table, the summary and the commands that train the best settings. Returns the exit status."""
    from focus_ray.sweep import records, summary

    config = records.read_sweep_config(outcome.root)
    print(summary.format_sweep_summary(config, outcome.records), flush=True)
    for record in outcome.failed_records:
        print_message(f"focus-ray: trial {record.name} failed: {record.reason}")
    for command in summary.list_train_commands(outcome.root, outcome.records):
        print(command, flush=True)
    if outcome.stopped:
        print_message(f"focus-ray: stopped; go on with: focus-ray sweep resume {outcome.root}")
        return 130
    return EXIT_ERROR if outcome.failed_records else 0
