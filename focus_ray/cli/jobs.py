"""The commands `submit` and `jobs`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from focus_ray.cli.output import print_message

# options of `submit` with the names of arguments of `build_job_request`
_JOB_OPTIONS = (
    "team", "category", "working_dir", "env", "runtime_env", "python", "num_cpus", "num_gpus", "memory_gib"
)  # fmt: skip


def _add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `_connect` reads: --address, --header, --cookie and --verify."""
    add = parser.add_argument
    add("--address", help="http://HEAD:8265 (default: RAY_ADDRESS)")
    for name, thing in (("--header", "HTTP header"), ("--cookie", "cookie")):
        text = f"{thing} for a proxy in front of the cluster; @FILE reads the value from a file"
        add(name, action="append", default=[], metavar="NAME=VALUE|NAME=@FILE", help=text)
    add(
        "--verify",
        default="true",
        metavar="PATH|false",
        help="trusted certificates for https, a file or folder; false checks no certificate (default: public authorities)",
    )


def _connect(arguments: argparse.Namespace) -> Any:
    """Returns a client of the Jobs API. Warns if the certificate of the cluster is not checked."""
    from focus_ray.submission.client import connect_to_cluster

    if arguments.verify.lower() == "false":
        print_message(
            "WARNING: --verify false: anyone between this machine and the cluster can read and change the jobs"
        )
    return connect_to_cluster(arguments.address, arguments.header, arguments.cookie, arguments.verify)


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `submit` and `jobs`."""
    submit = commands.add_parser(
        "submit",
        help="run a command as a job on a Ray cluster",
        epilog="COMMAND is a focus-ray command (focus-ray submit train configs/run.yaml storage=s3://...) or a program.",
    )
    add = submit.add_argument
    _add_connection_options(submit)
    add("--team", help="owner of the job; also set in the configuration of train and sweep")
    add("--category", help="category to record with the job (default for train: the category of the configuration)")
    add("--working-dir", default=".", help="folder to send (default: the working folder)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="also leave out these files")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment variable for the job")
    add(
        "--runtime-env",
        metavar="FILE",
        help="YAML or JSON file with keys of Ray's runtime environment: pip, uv, conda, image_uri, py_executable ...",
    )
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="label of the node for the driver")
    add("--num-cpus", type=float, default=0.0, help="CPUs to reserve for the driver (default: 0, on the head node)")
    add("--num-gpus", type=float, default=0.0, help="GPUs to reserve for the driver (default: 0)")
    add("--memory-gib", type=float, default=0.0, help="memory to reserve for the driver (default: 0)")
    add("--python", default="python", help="interpreter on the cluster (default: python)")
    add("--no-follow", action="store_true", help="return immediately, and print only the id of the job")
    add("--dry-run", action="store_true", help="list the files to send, and send nothing")
    add(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="command of the job, with its arguments; write all options of submit before the command",
    )
    submit.set_defaults(run=_run_submit_command, known=commands.choices)  # filled before a command runs

    jobs = commands.add_parser("jobs", help="list, follow and stop the jobs of a Ray cluster")
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help in (
        ("list", "list jobs, newest first"),
        ("status", "print one job as JSON"),
        ("follow", "print the log of a job until it ends, and return its exit status"),
        ("stop", "stop a job"),
    ):
        action = actions.add_parser(name, help=help)
        _add_connection_options(action)
        if name == "list":
            action.add_argument("--team", help="only jobs of this team")
        else:
            action.add_argument("job", help="the id that `submit` printed")
        action.set_defaults(run=_run_jobs_command)


def _run_submit_command(arguments: argparse.Namespace) -> int:
    """Runs `submit`: sends a command as a job and follows its log, unless --no-follow is given. Returns the exit status."""
    from focus_ray.errors import SubmissionError
    from focus_ray.submission import client as submission
    from focus_ray.submission.job_request import build_job_request
    from focus_ray.sweep.settings import load_sweep_config

    labels = dict(item.partition("=")[::2] for item in arguments.label)
    if not all(labels.values()):
        raise SubmissionError(f"--label {arguments.label}: expected KEY=VALUE")
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    job = build_job_request(
        words,
        load_sweep_config,
        commands=arguments.known,
        excludes=arguments.exclude,
        **{name: getattr(arguments, name) for name in _JOB_OPTIONS},
        labels=labels,
    )
    print_message(
        f"{job.submission_id}: {job.entrypoint}\n  sends {job.package}; environment: {', '.join(job.environment) or '-'}"
        + (f"; runtime environment: {', '.join(job.runtime_env)}" if job.runtime_env else "")
    )
    if arguments.dry_run:
        print("\n".join(job.package.names))
        return 0
    client = _connect(arguments)
    name = submission.submit_job(client, job, print_message)
    if arguments.no_follow:
        print(name)
        return 0
    return _follow_job(client, name)


def _follow_job(client: Any, job: str) -> int:
    """Prints the log of a job until the job ends or the user interrupts.

    Returns the exit status of the job; 130 after an interrupt.
    """
    from focus_ray.submission import client as submission

    try:
        status = submission.follow_job_log(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print_message(
            f"\nfocus-ray: no longer following; the job goes on. focus-ray jobs follow {job} | focus-ray jobs stop {job}"
        )
        return 130
    print_message(f"{job}: {submission.describe_job(client, job)['status']}, exit status {status}")
    return status


def _run_jobs_command(arguments: argparse.Namespace) -> int:
    """Runs `jobs list`, `jobs status`, `jobs follow` or `jobs stop`. Returns the exit status."""
    from focus_ray.submission import client as submission

    client = _connect(arguments)
    if arguments.action == "follow":
        return _follow_job(client, arguments.job)
    if arguments.action == "stop":
        print(f"{arguments.job}\t{submission.stop_job(client, arguments.job)}")
    elif arguments.action == "status":
        print(json.dumps(submission.describe_job(client, arguments.job), indent=1, ensure_ascii=False))
    else:
        for job in submission.list_jobs(client, arguments.team):
            print(*(job[key] or "-" for key in ("id", "status", "team", "category", "started", "ended")), sep="\t")
    return 0
