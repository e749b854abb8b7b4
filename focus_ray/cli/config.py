"""The commands `config show`, `config explain` and `config list`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `config show`, `config explain` and `config list`."""
    config = commands.add_parser("config", help="show a configuration, explain a key, list the standard configurations")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print a configuration as YAML, with every default")
    show.add_argument("config", help="a YAML file, or a name of `focus-ray config list`")
    show.add_argument("override", nargs="*", help="key=value, for instance train.steps=10")
    show.set_defaults(run=_run_config_show_command)
    explain = actions.add_parser(
        "explain", help="print the meaning, values and default of a key; or the keys of a section"
    )
    explain.add_argument("key", help="dotted key, for instance train.steps")
    explain.set_defaults(run=_run_config_explain_command)
    actions.add_parser("list", help="list the standard configurations, one in each line").set_defaults(
        run=_run_config_list_command
    )


def _run_config_show_command(arguments: argparse.Namespace) -> int:
    """Runs `config show`: prints a complete configuration as YAML. Returns the exit status."""
    from focus_ray.fitting.settings import parse_config
    from focus_ray.settings.sections import apply_overrides, config_to_yaml, read_yaml_mapping
    from focus_ray.settings.standard import find_config_file

    path = find_config_file(arguments.config)
    tree = read_yaml_mapping(path)
    config: Any
    if "space" in tree:  # required in a sweep, unknown in a run
        from focus_ray.sweep.settings import load_sweep_config

        config = load_sweep_config(path, arguments.override)
    else:
        config = parse_config(apply_overrides(tree, arguments.override), str(path))
    print(config_to_yaml(config), end="")
    return 0


def _run_config_explain_command(arguments: argparse.Namespace) -> int:
    """Runs `config explain`: prints the description of a key or a section. Returns the exit status."""
    from focus_ray.cli.config_reference import explain_key

    print(explain_key(arguments.key))
    return 0


def _run_config_list_command(arguments: argparse.Namespace) -> int:
    """Runs `config list`: prints name, command and summary of each standard configuration. Returns the exit status."""
    from focus_ray.settings.standard import COMMANDS, get_config_kind, list_standard_configs, read_config_summary

    for name in list_standard_configs():
        print(name, COMMANDS[get_config_kind(name)], read_config_summary(name), sep="\t")
    return 0
