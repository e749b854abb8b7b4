"""The command `doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from focus_ray.cli.output import EXIT_ERROR, print_message
from focus_ray.errors import ConfigError

if TYPE_CHECKING:
    from focus_ray.doctor.diagnosis import CheckContext, Diagnosis


def add_parsers(commands: Any) -> None:
    """Adds the parser of `doctor`."""
    doctor = commands.add_parser(
        "doctor", help="check this machine and the needs of a configuration, and say how to correct each problem"
    )
    doctor.add_argument("config", nargs="?", help="a YAML file, or a name of `focus-ray config list`")
    doctor.add_argument("override", nargs="*", help="key=value, for instance data.uri=s3://plant/parts")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_run_doctor_command)


def _run_doctor_command(arguments: argparse.Namespace) -> int:
    """Runs `doctor`: prints a diagnosis per check, as text or as JSON. Returns the exit status."""
    config, overrides = arguments.config, arguments.override
    if config is not None and "=" in config:
        config, overrides = None, [config, *overrides]
    diagnoses = []
    for diagnosis in diagnose_machine(config, overrides):
        diagnoses.append(diagnosis)
        if not arguments.json:
            print(diagnosis, flush=True)
    counts = Counter(diagnosis.status for diagnosis in diagnoses)
    if arguments.json:
        findings = [dataclasses.asdict(diagnosis) for diagnosis in diagnoses]
        print(json.dumps({"healthy": not counts["FAILED"], "findings": findings}, indent=1, ensure_ascii=False))
    print_message(f"doctor: {', '.join(f'{counts[status]} {status}' for status in ('ok', 'warning', 'FAILED'))}")
    return EXIT_ERROR if counts["FAILED"] else 0


def diagnose_machine(config: str | None, overrides: Sequence[str]) -> Iterator[Diagnosis]:
    """Runs all checks for a configuration and yields their diagnoses.

    If the user named a configuration, the first diagnosis says whether it is valid. If the configuration or an override is
    not valid, the first diagnosis fails, and the checks use the default configuration.

    Args:
        config: Path or standard name of the configuration of a run or a sweep; None takes the defaults.
        overrides: Texts "key=value", as for the commands `train` and `sweep`.
    """
    from focus_ray.doctor.checks import CHECKS
    from focus_ray.doctor.diagnosis import Diagnosis, run_checks

    try:
        context = read_check_context(config, overrides)
    except ConfigError as error:
        yield Diagnosis("configuration", "FAILED", str(error))
        context = read_check_context(None, ())
    else:
        if config is not None:
            yield Diagnosis("configuration", "ok", f"{config} is valid")
    yield from run_checks(CHECKS, context)


def read_check_context(config: str | None, overrides: Sequence[str]) -> CheckContext:
    """Reads the configuration that the checks use: of a run, or the base configuration of a sweep.

    Raises:
        ConfigError: The configuration does not exist or is not valid.
    """
    from focus_ray.doctor.diagnosis import CheckContext
    from focus_ray.fitting.settings import parse_config
    from focus_ray.settings.sections import apply_overrides, read_yaml_mapping
    from focus_ray.settings.standard import find_config_file
    from focus_ray.sweep.settings import load_sweep_config

    if config is None:
        tree = {"data": {"uri": "data"}}  # the only setting without a default
        has_data = any(override.partition("=")[0].strip() in ("data", "data.uri") for override in overrides)
        return CheckContext(parse_config(apply_overrides(tree, list(overrides))), bool(overrides), has_data)
    path = find_config_file(config)
    tree = read_yaml_mapping(path)
    if "space" in tree:  # only a sweep has this key
        return CheckContext(load_sweep_config(path, overrides).make_trial_config(), True, True)
    return CheckContext(parse_config(apply_overrides(tree, list(overrides)), str(path)), True, True)
