"""The commands `serve` and `token`."""

from __future__ import annotations

import argparse
from typing import Any

from focus_ray.cli.output import check_paths_exist, print_message


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `serve` and `token`."""
    serve = commands.add_parser(
        "serve", help="answer HTTP requests with the bundles of a run or the models of a registry"
    )
    serve.add_argument("place", help="a bundle, a run's folder, a registry, or a YAML file of settings (ends in .yaml)")
    serve.add_argument("override", nargs="*", help="key=value for any setting, for instance tokens=tokens.yaml")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    serve.set_defaults(run=_run_serve_command)

    token = commands.add_parser("token", help="create, list and revoke the tokens that clients of the service send")
    actions = token.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="add a token to a file and print it; it cannot be printed again")
    add = create.add_argument
    add("file", help="token file: a path or s3:// URI; created if it does not exist")
    add("--team", required=True, help="the team that the token belongs to")
    add(
        "--scope",
        action="append",
        choices=("inspect", "read", "admin"),
        help="a permission of the token; may be repeated (default: inspect and read)",
    )
    add("--days", type=float, help="days until the token expires (default: never)")
    add("--note", default="", help="a note for people, for instance the owner")
    listing = actions.add_parser("list", help="list the tokens of a file, one in each line, without their secrets")
    listing.add_argument("file", help="token file: a path or s3:// URI")
    revoke = actions.add_parser("revoke", help="remove a token from a file")
    revoke.add_argument("file", help="token file: a path or s3:// URI")
    revoke.add_argument("id", help="the token's id, as `list` shows it")
    token.set_defaults(run=_run_token_command)


def _run_serve_command(arguments: argparse.Namespace) -> int:
    """Runs `serve`: serves models until the user interrupts. Returns the exit status."""
    check_paths_exist(arguments.place)
    print_message(f"serve: {arguments.place} on http://{arguments.host}:{arguments.port}, as soon as it has started")
    from focus_ray.serving.launch import check_host_security, check_port_free, serve_until_interrupted
    from focus_ray.serving.settings import parse_service_settings
    from focus_ray.settings.sections import apply_overrides, read_config_tree

    if arguments.place.endswith((".yaml", ".yml")):
        tree = read_config_tree(arguments.place, arguments.override)
    else:
        tree = apply_overrides({"ingress_num_cpus": 0}, arguments.override)
        kind = _detect_place_kind(arguments.place)
        tree[kind] = arguments.place
        tree.setdefault("examples", kind == "bundles")
    tree.setdefault("open_to_all", "tokens" not in tree)
    settings = parse_service_settings(tree, arguments.place)
    check_host_security(arguments.host, settings)
    check_port_free(arguments.host, arguments.port)
    serve_until_interrupted(settings, arguments.host, arguments.port, print_message)
    return 0


def _detect_place_kind(place: str) -> str:
    """Returns the kind of a place, which is also the name of its setting: "bundles" or "registry".

    Raises:
        DataError: The place has neither bundles nor published versions.
    """
    from focus_ray.bundle.bundle import find_bundles_in_folder, list_runs
    from focus_ray.bundle.registry import Registry
    from focus_ray.errors import DataError

    try:
        find_bundles_in_folder(place)
    except DataError as error:
        if list_runs(place):
            raise
        registry = Registry(place)
        published = (
            registry.list_versions(team, name)
            for team in registry.list_teams()
            for name in registry.list_categories(team)
        )
        if not any(published):
            raise DataError(f"{error}, or a registry that `focus-ray registry publish` made") from None
        return "registry"
    return "bundles"


def _run_token_command(arguments: argparse.Namespace) -> int:
    """Runs `token create`, `token list` or `token revoke`. Returns the exit status."""
    from datetime import timedelta

    from focus_ray.serving.tokens import create_token, read_tokens, revoke_token

    if arguments.action == "create":
        expires_in = None if arguments.days is None else timedelta(days=arguments.days)
        scopes = arguments.scope or ["inspect", "read"]
        token, record = create_token(arguments.file, arguments.team, scopes, expires_in, arguments.note)
        print_message(f"token {record.id} of team {record.team}: {', '.join(record.scopes)}; it cannot be shown again:")
        print(token)
    elif arguments.action == "revoke":
        record = revoke_token(arguments.file, arguments.id)
        print_message(f"token {record.id} of team {record.team} is revoked")
    else:
        for record in read_tokens(arguments.file).tokens:
            expires = "never" if record.expires is None else f"{record.expires:%Y-%m-%d %H:%M}"
            print(record.id, record.team, ",".join(record.scopes), expires, record.note or "-", sep="\t")
    return 0
