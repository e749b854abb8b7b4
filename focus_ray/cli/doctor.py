"""The command `doctor`."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from focus_ray.cli.output import EXIT_ERROR, say


def add_doctor_parser(commands: Any) -> None:
    """Adds the parser of `doctor`."""
    doctor = commands.add_parser(
        "doctor", help="check this machine and the needs of a configuration, and say how to correct each problem"
    )
    doctor.add_argument("config", nargs="?", help="a YAML file, or a name of `focus-ray config list`")
    doctor.add_argument("override", nargs="*", help="key=value, for instance data.uri=s3://plant/parts")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    """Runs `doctor`: prints a diagnosis per check, as text or as JSON. Returns the exit status."""
    from focus_ray.doctor.checks import diagnose
    from focus_ray.doctor.diagnosis import is_healthy, to_json

    config, overrides = arguments.config, arguments.override
    if config is not None and "=" in config:
        config, overrides = None, [config, *overrides]
    diagnoses = []
    for diagnosis in diagnose(config, overrides):
        diagnoses.append(diagnosis)
        if not arguments.json:
            print(diagnosis, flush=True)
    if arguments.json:
        print(to_json(diagnoses))
    counts = Counter(diagnosis.status for diagnosis in diagnoses)
    say(f"doctor: {', '.join(f'{counts[status]} {status}' for status in ('ok', 'warning', 'FAILED'))}")
    return 0 if is_healthy(diagnoses) else EXIT_ERROR
