"""The `focus-ray` command; every subcommand imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focus_ray import __version__
from focus_ray.errors import ConfigError, FocusRayError

EXIT_ERROR = 1
EXIT_REJECTS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns: its exit status: 0, 1 for an error that is told on stderr, 3 where ingest rejected."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FocusRayError as error:
        print(f"focus-ray: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("focus-ray: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="focus-ray",
        description="Learns from images of good parts; says of a new one whether it is defective, where, and how sure it is.",
    )
    parser.add_argument("--version", action="version", version=f"focus-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ingest = commands.add_parser("ingest", help="read a folder of images into a Parquet data set")
    ingest.add_argument("source", help="folder: MVTec AD (also AD 2, LOCO), BTAD, VisA, or good/ bad/ masks/")
    ingest.add_argument("destination", help="root of the Parquet data set: a path or s3:// URI")
    ingest.add_argument("--format", default="auto", help="auto, mvtec, btad, visa or folder (default: auto)")
    ingest.add_argument("--category", action="append", help="take only this category (may be repeated)")
    ingest.add_argument("--site", default="default", help="where the images were taken (default: default)")
    ingest.set_defaults(run=_ingest)

    train = commands.add_parser("train", help="train one model a category and write their bundles")
    train.add_argument("config", help="YAML file, for instance configs/quickstart.yaml")
    train.add_argument("override", nargs="*", help="key=value, for instance train.epochs=10")
    train.add_argument("--resume", action="store_true", help="go on with the run of this name")
    train.set_defaults(run=_train)

    sweep = commands.add_parser(
        "sweep",
        help="search settings over categories with Ray Tune",
        description="focus-ray sweep CONFIG [key=value ...] starts a sweep; base.KEY=VALUE overrides the configuration that "
        "trials start from. `status`, `resume` and `report` take the sweep's folder.",
    )
    sweep.add_argument("what", metavar="CONFIG|status|resume|report", help="YAML file, for instance configs/sweep.yaml")
    sweep.add_argument("rest", nargs="*", metavar="key=value|PLACE", help="num_trials=20, or the sweep's folder")
    sweep.set_defaults(run=_sweep)

    evaluate = commands.add_parser("evaluate", help="measure bundles on the labelled test images")
    evaluate.add_argument("bundles", help="a bundle, or a run's folder")
    evaluate.add_argument("--data", help="Parquet data set (default: the one they were trained from)")
    evaluate.add_argument("--output", help="folder for report.json and report.md (default: report/ beside the bundles)")
    evaluate.add_argument(
        "--max-side-px", type=int, default=512, help="maps are compared at the masks' size up to this"
    )
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="score images: JSON lines on stdout, overlays as PNG")
    inspect.add_argument("bundle", help="a bundle")
    inspect.add_argument("images", nargs="+", help="image files, or folders of them")
    inspect.add_argument("--overlays", metavar="FOLDER", help="write a heat-map overlay of every image here")
    inspect.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    inspect.set_defaults(run=_inspect)

    batch = commands.add_parser("inspect-batch", help="score a Parquet data set with Ray Data into Parquet")
    batch.add_argument("bundles", help="a bundle, or a run's folder")
    batch.add_argument("data", help="Parquet data set: a path or s3:// URI")
    batch.add_argument("output", help="where the results go: a path or s3:// URI")
    batch.add_argument("--split", choices=("train", "test"), help="only these images")
    batch.add_argument("--actors", type=int, default=1, help="models that score side by side (default: 1)")
    batch.set_defaults(run=_inspect_batch)

    update = commands.add_parser("update", help="take images into or out of a bundle's density, or join another site's")
    update.add_argument("bundle")
    update.add_argument("output", help="where the changed bundle goes; may be the bundle itself")
    update.add_argument("--add", metavar="DATA", help="ingested set whose normal training images are taken in")
    update.add_argument(
        "--remove", metavar="DATA", help="ingested set whose normal training images are taken out again"
    )
    update.add_argument("--join", metavar="BUNDLE", help="bundle of the same network whose statistics are added")
    update.add_argument("--calibrate", metavar="DATA", help="ingested set of normal images for the new thresholds")
    update.set_defaults(run=_update)

    _add_registry(commands)
    _add_jobs(commands)
    _add_serving(commands)

    samples = commands.add_parser("samples", help="draw a small image set of made-up parts, in MVTec's folder shape")
    samples.add_argument("folder")
    samples.add_argument("--seed", type=int, default=0)
    samples.set_defaults(run=_samples)
    return parser


def _add_registry(commands: Any) -> None:
    registry = commands.add_parser("registry", help="publish bundles, move aliases, list, delete old versions")
    actions = registry.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str, *names: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=help)
        parser.add_argument("registry", help="root of the registry: a path or s3:// URI")
        for positional in names:
            parser.add_argument(positional)
        parser.set_defaults(run=_registry)
        return parser

    publish = action("publish", "copy a bundle, or every bundle of a run, in under the next version", "bundles")
    publish.add_argument("--team", required=True)
    publish.add_argument("--category", help="refuse bundles of any other")
    publish.add_argument("--alias", action="append", default=[], help="point this alias at it too (may be repeated)")
    promote = action("promote", "point an alias at a version", "team", "category", "version", "alias")
    promote.epilog = "VERSION may be an alias: promote ROOT press bolt candidate production"
    action("rollback", "point an alias at what it named before", "team", "category", "alias")
    listing = action("list", "versions with their aliases, one a line")
    listing.add_argument("team", nargs="?")
    listing.add_argument("category", nargs="?")
    collect = action("gc", "delete old versions that no alias names", "team", "category")
    collect.add_argument("--keep", type=int, default=5, help="newest versions that stay in any case (default: 5)")
    collect.add_argument("--min-age-hours", type=float, default=1.0, help="younger ones stay too (default: 1)")


def _add_jobs(commands: Any) -> None:
    submit = commands.add_parser(
        "submit",
        help="run a command as a job on a Ray cluster",
        epilog="COMMAND is a focus-ray command (focus-ray submit train configs/run.yaml storage=s3://...) or a program.",
    )
    submit.add_argument("--address", help="http://HEAD:8265 (default: RAY_ADDRESS)")
    submit.add_argument("--team", help="whose job it is; train and sweep get it in their configuration too")
    submit.add_argument("--category", help="noted with the job (train: that of the configuration)")
    submit.add_argument("--working-dir", default=".", help="folder that is sent (default: this one)")
    submit.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these files out too")
    submit.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for the job")
    submit.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="node to run the driver on")
    submit.add_argument(
        "--num-cpus", type=float, default=0.0, help="CPUs kept for the driver (default: 0, on the head)"
    )
    submit.add_argument("--num-gpus", type=float, default=0.0, help="GPUs kept for the driver (default: 0)")
    submit.add_argument("--memory-gib", type=float, default=0.0, help="memory kept for the driver (default: 0)")
    submit.add_argument("--python", default="python", help="interpreter on the cluster (default: python)")
    submit.add_argument("--no-follow", action="store_true", help="return at once; print the job's id only")
    submit.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    submit.set_defaults(run=_submit)

    jobs = commands.add_parser("jobs", help="list, follow and stop the jobs of a Ray cluster")
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help in (
        ("list", "jobs, newest first"),
        ("status", "one job, as JSON"),
        ("follow", "its log until it ends; its exit status"),
        ("stop", "end it"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("--address", help="http://HEAD:8265 (default: RAY_ADDRESS)")
        if name == "list":
            action.add_argument("--team", help="only this team's")
        else:
            action.add_argument("job", help="the id that `submit` printed")
        action.set_defaults(run=_jobs)


def command_names() -> list[str]:
    """Names of the subcommands."""
    (subparsers,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return list(subparsers.choices)


def _add_serving(commands: Any) -> None:
    serve = commands.add_parser("serve", help="answer HTTP requests with a run's bundles or a registry's models")
    serve.add_argument("place", help="a bundle, a run's folder, a registry, or a YAML of settings (ends in .yaml)")
    serve.add_argument("override", nargs="*", help="key=value for any setting, for instance tokens=tokens.yaml")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000)
    serve.set_defaults(run=_serve)

    token = commands.add_parser("token", help="make, list and revoke the tokens that clients of the service send")
    actions = token.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="add a token to a file and print it, once")
    create.add_argument("file", help="token file: a path or s3:// URI; made where there is none")
    create.add_argument("--team", required=True)
    create.add_argument("--scope", action="append", choices=("inspect", "read", "admin"), help="default: inspect, read")
    create.add_argument("--days", type=float, help="it expires after so many (default: never)")
    create.add_argument("--note", default="", help="whose it is, for people")
    listing = actions.add_parser("list", help="tokens of a file, one a line, without their secrets")
    listing.add_argument("file")
    revoke = actions.add_parser("revoke", help="take a token out of a file")
    revoke.add_argument("file")
    revoke.add_argument("id")
    token.set_defaults(run=_token)


def _ingest(arguments: argparse.Namespace) -> int:
    from focus_ray.dataset import ingest

    report = ingest(
        arguments.source,
        arguments.destination,
        format=arguments.format,
        categories=arguments.category,
        site=arguments.site,
    )
    print(report)
    return report.exit_status


def _train(arguments: argparse.Namespace) -> int:
    from focus_ray.config import load_config

    config = load_config(arguments.config, arguments.override)
    from focus_ray.training import train  # seconds of imports, which a misspelt key need not wait for

    bundles = train(config, resume=arguments.resume, log=_say)
    for category, bundle in bundles.items():
        print(f"{category}\t{bundle}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    if arguments.what in ("status", "report", "resume"):
        if len(arguments.rest) != 1:
            raise ConfigError(f"focus-ray sweep {arguments.what}: expected one sweep's folder, got {arguments.rest}")
        return _sweep_place(arguments.what, arguments.rest[0])
    from focus_ray.search import load_sweep

    config = load_sweep(arguments.what, arguments.rest)
    from focus_ray.tuning import sweep

    return _sweep_end(sweep(config, log=_say))


def _sweep_place(action: str, place: str) -> int:
    from focus_ray import records

    if action == "resume":
        from focus_ray.tuning import resume

        return _sweep_end(resume(place, log=_say))
    config, found = records.read_sweep(place), records.read_records(place)
    if action == "report":
        from focus_ray.sweep_report import write_report

        for name in write_report(place, config, found):
            _say(f"report: {place}/{name}")
    else:
        print(json.dumps(records.progress(place, config, found), indent=1))
    print(records.summary_table(config, found))
    return 0


def _sweep_end(outcome: Any) -> int:
    from focus_ray import records

    config = records.read_sweep(outcome.root)
    print(records.summary_table(config, outcome.records))
    for stage, record in outcome.best.items():
        name = "best.yaml" if stage is None else f"best-{stage}.yaml"
        print(f"{stage or 'all categories'}\t{record.score:.4f}\t{outcome.root}/{name}")
    for record in outcome.failed:
        _say(f"focus-ray: trial {record.name} failed: {record.reason}")
    if outcome.stopped:
        _say(f"focus-ray: stopped; go on with: focus-ray sweep resume {outcome.root}")
        return 130
    return EXIT_ERROR if outcome.failed else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from focus_ray.bundle import find_bundles
    from focus_ray.inspector import Inspector
    from focus_ray.report import evaluation_table, mean_metrics
    from focus_ray.storage import join, write_bytes
    from focus_ray.training import iter_test_records

    results: dict[str, dict[str, Any]] = {}
    bundles = find_bundles(arguments.bundles)
    for category, uri in bundles.items():
        _say(f"{category}: evaluating {uri}")
        inspector = Inspector.load(uri)
        data = arguments.data or inspector.bundle.config.data.uri
        results[category] = {
            **inspector.evaluate(iter_test_records(data, category), arguments.max_side_px),
            "bundle": uri,
            "version": inspector.bundle.version,
            "data": data,
        }
    table = evaluation_table(results)
    output = arguments.output or join(arguments.bundles, "report")
    content = {"categories": results, "mean": mean_metrics(results)}
    write_bytes(join(output, "report.json"), (json.dumps(content, indent=1) + "\n").encode())
    write_bytes(join(output, "report.md"), table.encode())
    print(table)
    _say(f"report: {join(output, 'report.md')} and {join(output, 'report.json')}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from focus_ray.dataset import IMAGE_SUFFIXES
    from focus_ray.errors import DataError
    from focus_ray.images import decode_image, encode_png
    from focus_ray.inspector import Inspector
    from focus_ray.report import overlay

    paths: list[Path] = []
    for name in arguments.images:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir())
            if not found:
                raise DataError(f"{path}: no image in this folder; image files end in {', '.join(IMAGE_SUFFIXES)}")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    if arguments.overlays:
        try:
            Path(arguments.overlays).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{arguments.overlays}: cannot make a folder for overlays: {error.strerror}") from error
    names = _overlay_names(paths)
    inspector = Inspector.load(arguments.bundle, arguments.device)
    status = 0
    for start in range(0, len(paths), inspector.batch_size):
        for path, data, found_or_error in _inspect_files(inspector, paths[start : start + inspector.batch_size]):
            if isinstance(found_or_error, str):
                print(json.dumps({"image": str(path), "error": found_or_error}))
                status = EXIT_ERROR
                continue
            line = {"image": str(path), "category": inspector.bundle.category, **found_or_error.to_dict()}
            if arguments.overlays:
                target = Path(arguments.overlays) / names[path]
                target.write_bytes(encode_png(overlay(decode_image(data, None), found_or_error)))
                line["overlay"] = str(target)
            print(json.dumps(line))
    return status


def _inspect_files(inspector: Any, paths: Sequence[Path]) -> list[tuple[Path, bytes, Any]]:
    """Inspections in order; where a file cannot be used, its reason in place of the inspection."""
    from focus_ray.errors import DataError

    results: list[tuple[Path, bytes, Any]] = []
    for path in paths:
        try:
            results.append((path, path.read_bytes(), None))
        except OSError as error:
            results.append((path, b"", f"cannot read the file: {error.strerror or error}"))
    readable = [number for number, (_, _, reason) in enumerate(results) if reason is None]
    try:
        found: list[Any] = inspector.inspect([results[number][1] for number in readable])
    except DataError:
        found = []
        for number in readable:
            try:
                found += inspector.inspect([results[number][1]])
            except DataError as error:
                found.append(str(error))
    for number, finding in zip(readable, found, strict=True):
        results[number] = (*results[number][:2], finding)
    return results


def _overlay_names(paths: Sequence[Path]) -> dict[Path, str]:
    """<stem>.png; where images share a stem, with their folders' names before it, and a number if that is not enough."""
    alike = Counter(path.stem for path in set(paths))
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        name = path.stem if alike[path.stem] == 1 else "-".join([*path.parts[-3:-1], path.stem])
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        name = next(candidate for candidate in numbered if candidate not in taken)
        taken.add(name)
        names[path] = f"{name}.png"
    return names


def _inspect_batch(arguments: argparse.Namespace) -> int:
    from focus_ray.batch import inspect_dataset
    from focus_ray.bundle import find_bundles

    counts = inspect_dataset(
        find_bundles(arguments.bundles),
        arguments.data,
        arguments.output,
        split=arguments.split,
        num_actors=arguments.actors,
        log=_say,
    )
    print(json.dumps(counts, indent=1))
    return EXIT_ERROR if any(count["num_errors"] for count in counts.values()) else 0


def _update(arguments: argparse.Namespace) -> int:
    from focus_ray.errors import DataError
    from focus_ray.update import update_bundle

    changes = {key: getattr(arguments, key) for key in ("add", "remove", "join")}
    if not any(changes.values()):
        raise DataError("nothing to change: give --add, --remove or --join")
    manifest = update_bundle(arguments.bundle, arguments.output, **changes, calibrate=arguments.calibrate)
    print(f"{arguments.output}\t{manifest['moments']['count']} images\t{manifest['sha256']}")
    return 0


def _registry(arguments: argparse.Namespace) -> int:
    from datetime import timedelta

    from focus_ray.errors import RegistryError
    from focus_ray.registry import Registry, Version

    registry = Registry(arguments.registry)
    action = arguments.action

    def show(version: Version, aliases: Sequence[str] = ()) -> None:
        fields = (version.team, version.category, version.name, f"{version.published_at:%Y-%m-%d %H:%M:%S}")
        print(*fields, version.num_bytes, version.sha256[:16], ",".join(aliases) or "-", version.uri, sep="\t")

    if action == "publish":
        from focus_ray.bundle import find_bundles

        found = find_bundles(arguments.bundles)
        if arguments.category not in (None, *found):
            raise RegistryError(
                f"{arguments.bundles}: no bundle of category {arguments.category!r}; there are {', '.join(found)}"
            )
        for category, bundle in found.items():
            if arguments.category in (None, category):
                version = registry.publish(bundle, arguments.team, category, aliases=arguments.alias)
                show(version, ["latest", *arguments.alias])
    elif action == "promote":
        version = registry.promote(arguments.team, arguments.category, arguments.version, arguments.alias)
        show(version, [arguments.alias])
    elif action == "rollback":
        show(registry.roll_back(arguments.team, arguments.category, arguments.alias), [arguments.alias])
    elif action == "gc":
        age = timedelta(hours=arguments.min_age_hours)
        for name in registry.collect_garbage(arguments.team, arguments.category, arguments.keep, min_age=age, log=_say):
            print(name)
    else:
        for team in registry.teams() if arguments.team is None else [arguments.team]:
            for category in registry.categories(team) if arguments.category is None else [arguments.category]:
                aliases = registry.aliases(team, category)
                for version in registry.versions(team, category):
                    show(version, sorted(alias for alias, name in aliases.items() if name == version.name))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from focus_ray import submission
    from focus_ray.errors import SubmissionError

    labels = dict(item.partition("=")[::2] for item in arguments.label)
    if not all(labels.values()):
        raise SubmissionError(f"--label {arguments.label}: expected KEY=VALUE")
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    job = submission.build_job(
        words,
        commands=command_names(),
        team=arguments.team,
        category=arguments.category,
        working_dir=arguments.working_dir,
        excludes=arguments.exclude,
        env=arguments.env,
        python=arguments.python,
        num_cpus=arguments.num_cpus,
        num_gpus=arguments.num_gpus,
        memory_gib=arguments.memory_gib,
        labels=labels,
    )
    _say(
        f"{job.submission_id}: {job.entrypoint}\n  sends {job.package}; environment: {', '.join(job.environment) or '-'}"
    )
    if arguments.dry_run:
        print("\n".join(job.package.names))
        return 0
    client = submission.connect(arguments.address)
    name = submission.submit(client, job, _say)
    if arguments.no_follow:
        print(name)
        return 0
    return _follow(client, name)


def _follow(client: Any, job: str) -> int:
    from focus_ray import submission

    try:
        status = submission.follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        _say(
            f"\nfocus-ray: no longer following; the job goes on. focus-ray jobs follow {job} | focus-ray jobs stop {job}"
        )
        return 130
    _say(f"{job}: {submission.describe(client, job)['status']}, exit status {status}")
    return status


def _jobs(arguments: argparse.Namespace) -> int:
    from focus_ray import submission

    client = submission.connect(arguments.address)
    if arguments.action == "follow":
        return _follow(client, arguments.job)
    if arguments.action == "stop":
        print(f"{arguments.job}\t{submission.stop(client, arguments.job)}")
    elif arguments.action == "status":
        print(json.dumps(submission.describe(client, arguments.job), indent=1))
    else:
        for job in submission.list_jobs(client, arguments.team):
            print(*(job[key] or "-" for key in ("id", "status", "team", "category", "started", "ended")), sep="\t")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from focus_ray.config import override_tree, read_tree
    from focus_ray.serving.launch import check_host, serve_until_interrupted
    from focus_ray.serving.settings import parse_settings

    if arguments.place.endswith((".yaml", ".yml")):
        tree = read_tree(arguments.place, arguments.override)
    else:
        tree = override_tree({"examples": True, "ingress_num_cpus": 0}, arguments.override)
        tree[_kind_of(arguments.place)] = arguments.place
    tree.setdefault("open_to_all", "tokens" not in tree)
    settings = parse_settings(tree, arguments.place)
    check_host(arguments.host, settings)
    serve_until_interrupted(settings, arguments.host, arguments.port, _say)
    return 0


def _kind_of(place: str) -> str:
    """The setting that a place is for. Raises: DataError: there is neither a bundle nor a published version."""
    from focus_ray.bundle import find_bundles
    from focus_ray.errors import DataError
    from focus_ray.registry import Registry

    try:
        find_bundles(place)
    except DataError as error:
        registry = Registry(place)
        if not any(registry.categories(team) for team in registry.teams()):
            raise DataError(f"{error}, or a registry that `focus-ray registry publish` made") from None
        return "registry"
    return "bundles"


def _token(arguments: argparse.Namespace) -> int:
    from datetime import timedelta

    from focus_ray.serving.tokens import create_token, read_tokens, revoke_token

    if arguments.action == "create":
        expires_in = None if arguments.days is None else timedelta(days=arguments.days)
        scopes = arguments.scope or ["inspect", "read"]
        token, record = create_token(arguments.file, arguments.team, scopes, expires_in, arguments.note)
        _say(f"token {record.id} of team {record.team}: {', '.join(record.scopes)}; it cannot be shown again:")
        print(token)
    elif arguments.action == "revoke":
        record = revoke_token(arguments.file, arguments.id)
        _say(f"token {record.id} of team {record.team} is revoked")
    else:
        for record in read_tokens(arguments.file).tokens:
            expires = "never" if record.expires is None else f"{record.expires:%Y-%m-%d %H:%M}"
            print(record.id, record.team, ",".join(record.scopes), expires, record.note or "-", sep="\t")
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from focus_ray.errors import DataError
    from focus_ray.samples import write_samples

    folder = Path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty: give a new folder")
    write_samples(folder, seed=arguments.seed)
    _say(f"samples: {folder}")
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
