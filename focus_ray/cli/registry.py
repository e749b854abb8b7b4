"""The command `registry`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from focus_ray.cli.output import print_message

_ARGUMENT_HELP = {
    "bundles": "a bundle, or a run's folder",
    "team": "the team that owns the category",
    "category": "the category",
    "version": "a version such as v0007, or an alias",
    "alias": "the alias to move, such as production",
}


def add_parsers(commands: Any) -> None:
    """Adds the parsers of the actions of `registry`."""
    registry = commands.add_parser("registry", help="publish bundles, move aliases, list, delete old versions")
    actions = registry.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_action_parser(name: str, help: str, *names: str) -> argparse.ArgumentParser:
        """Adds the parser of one action with the argument `registry` and other positional arguments of `_ARGUMENT_HELP`."""
        parser: argparse.ArgumentParser = actions.add_parser(name, help=help)
        parser.add_argument("registry", help="root of the registry: a path or s3:// URI")
        for positional in names:
            parser.add_argument(positional, help=_ARGUMENT_HELP[positional])
        parser.set_defaults(run=_run_registry_command)
        return parser

    publish = add_action_parser(
        "publish", "copy a bundle, or every bundle of a run, into the registry as the next version", "bundles"
    )
    publish.add_argument("--team", required=True, help="the team that owns the models")
    publish.add_argument("--category", help="refuse bundles of other categories")
    publish.add_argument(
        "--alias", action="append", default=[], help="also point this alias at the version (may be repeated)"
    )
    promote = add_action_parser("promote", "point an alias at a version", "team", "category", "version", "alias")
    promote.epilog = "VERSION may be an alias: promote ROOT press bolt candidate production"
    add_action_parser("rollback", "point an alias at its previous version", "team", "category", "alias")
    listing = add_action_parser("list", "list versions with their aliases, one in each line")
    listing.add_argument("team", nargs="?", help="only versions of this team")
    listing.add_argument("category", nargs="?", help="only versions of this category")
    collect = add_action_parser("gc", "delete old versions that no alias names", "team", "category")
    collect.add_argument("--keep", type=int, default=5, help="number of newest versions to keep (default: 5)")
    collect.add_argument("--min-age-hours", type=float, default=1.0, help="also keep younger versions (default: 1)")


def _run_registry_command(arguments: argparse.Namespace) -> int:
    """Runs an action of `registry` and prints a line per affected version. Returns the exit status."""
    from datetime import timedelta

    from focus_ray.bundle.registry import Registry, Version
    from focus_ray.errors import RegistryError

    registry = Registry(arguments.registry)
    action = arguments.action

    def print_version(version: Version, aliases: Sequence[str] = ()) -> None:
        """Prints a version and its aliases, separated by tabs."""
        fields = (version.team, version.category, version.name, f"{version.published_at:%Y-%m-%d %H:%M:%S}")
        print(*fields, version.num_bytes, version.sha256[:16], ",".join(aliases) or "-", version.uri, sep="\t")

    if action == "publish":
        from focus_ray.bundle.bundle import find_bundles_in_folder

        bundles = find_bundles_in_folder(arguments.bundles)
        if arguments.category not in (None, *bundles):
            raise RegistryError(
                f"{arguments.bundles}: no bundle of category {arguments.category!r}; there are {', '.join(bundles)}"
            )
        for category, bundle in bundles.items():
            if arguments.category in (None, category):
                version = registry.publish(bundle, arguments.team, category, aliases=arguments.alias)
                print_version(version, ["latest", *arguments.alias])
    elif action == "promote":
        version = registry.promote(arguments.team, arguments.category, arguments.version, arguments.alias)
        print_version(version, [arguments.alias])
    elif action == "rollback":
        print_version(registry.roll_back(arguments.team, arguments.category, arguments.alias), [arguments.alias])
    elif action == "gc":
        age = timedelta(hours=arguments.min_age_hours)
        for name in registry.collect_garbage(
            arguments.team, arguments.category, arguments.keep, min_age=age, log=print_message
        ):
            print(name)
    else:
        print("team", "category", "version", "published at", "bytes", "sha256", "aliases", "place", sep="\t")
        for team in registry.list_teams() if arguments.team is None else [arguments.team]:
            for category in registry.list_categories(team) if arguments.category is None else [arguments.category]:
                aliases = registry.list_aliases(team, category)
                for version in registry.list_versions(team, category):
                    print_version(version, sorted(alias for alias, name in aliases.items() if name == version.name))
    return 0
