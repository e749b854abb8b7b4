"""config: show, explain, list."""

from __future__ import annotations

import argparse
from typing import Any


def add_config(commands: Any) -> None:
    config = commands.add_parser("config", help="show a configuration whole, explain a key, list the standard ones")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="a configuration as YAML, every default written out")
    show.add_argument("config", help="a YAML file, or a name of `focus-ray config list`")
    show.add_argument("override", nargs="*", help="key=value, for instance train.epochs=10")
    show.set_defaults(run=_show)
    explain = actions.add_parser("explain", help="what a key means, what it may be, its default; the keys of a section")
    explain.add_argument("key", help="dotted, for instance train.epochs")
    explain.set_defaults(run=_explain)
    actions.add_parser("list", help="the standard configurations, one a line").set_defaults(run=_list)


def _show(arguments: argparse.Namespace) -> int:
    from focus_ray.config import config_to_yaml, override_tree, parse_config, read_mapping
    from focus_ray.standard import find_config

    path = find_config(arguments.config)
    tree = read_mapping(path)
    if "space" in tree:  # which a sweep must have, and a run cannot
        from focus_ray.sweep.settings import load_sweep

        print(config_to_yaml(load_sweep(path, arguments.override)), end="")
    else:
        print(config_to_yaml(parse_config(override_tree(tree, arguments.override), str(path))), end="")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from focus_ray.config_reference import explain

    print(explain(arguments.key))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from focus_ray.standard import COMMANDS, config_kind, standard_names, standard_summary

    for name in standard_names():
        print(name, COMMANDS[config_kind(name)], standard_summary(name), sep="\t")
    return 0
