"""The command `fit`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_ray.cli.data import add_group_by_option
from focus_ray.cli.output import check_paths_exist, print_message

if TYPE_CHECKING:
    from focus_ray.fitting.settings import Config


def add_parsers(commands: Any) -> None:
    """Adds the parser of `fit`."""
    fit = commands.add_parser(
        "fit",
        help="make a model and its report from a folder of photographs, in one step on this machine",
        description="Ingests the images, trains with the standard configuration in this process, and measures the model on "
        "the labelled test images, if there are any. OUTPUT is a run's folder, as `train` makes it, with the ingested images "
        "in data/.",
    )
    fit.add_argument("source", help="folder of photographs of good parts; or good/ bad/ masks/, MVTec AD, BTAD, VisA")
    fit.add_argument("output", help="new folder for bundles/, report.html, report/ and data/")
    fit.add_argument("override", nargs="*", help="key=value for any setting, for instance model.weights=resnet18.pth")
    add_group_by_option(fit)
    fit.set_defaults(run=_run_fit_command)


def _run_fit_command(arguments: argparse.Namespace) -> int:
    """Runs `fit`: ingests images, trains, evaluates on test images if there are any, and prints the report's path.

    Returns the exit status.
    """
    check_paths_exist(arguments.source)
    from focus_ray.errors import DataError
    from focus_ray.fitting.settings import load_config
    from focus_ray.names import NAME_WORDS, is_valid_name, make_valid_name
    from focus_ray.settings.standard import find_config_file

    output = Path(arguments.output).absolute()
    if not is_valid_name(output.name):
        raise DataError(
            f"{output}: {output.name!r} cannot name a run: expected {NAME_WORDS}, for instance {make_valid_name(output.name)}"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: not empty: give a new folder")
    data = str(output / "data")
    places = {"data.uri": data, "storage": str(output.parent), "name": output.name}
    # in quotes, because YAML reads a folder such as 007 as a number
    words = [*arguments.override, *(f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in places.items())]
    config = load_config(find_config_file("default", "run"), words)
    print_message(f"fit: {arguments.source} -> {output}")
    from focus_ray.fitting.fit import check_fit_prerequisites

    check_fit_prerequisites(config)  # before the ingestion, which may take long
    try:
        return _ingest_and_train(arguments, config, output)
    except BaseException:
        # without a bundle, the folder has only data that blocks a second attempt
        if not any(output.glob("bundles/*/manifest.json")):
            shutil.rmtree(output, ignore_errors=True)
        raise


def _ingest_and_train(arguments: argparse.Namespace, config: Config, output: Path) -> int:
    """Ingests the images, trains and evaluates for `fit`. Returns the exit status.

    Args: output: folder of the run.
    """
    from focus_ray.api import link_images_into_good_folder
    from focus_ray.cli.main import build_parser
    from focus_ray.cli.train import print_threshold_caveats
    from focus_ray.ingestion.ingest import ingest
    from focus_ray.training.training import train

    data = config.data.uri
    with tempfile.TemporaryDirectory() as scratch:
        ingested = ingest(
            link_images_into_good_folder(Path(arguments.source), Path(scratch)), data, group_by=arguments.group_by
        )
    print_message(str(ingested))
    bundles = train(config, log=print_message)
    tested = any(category.num_test_normal + category.num_test_anomalous for category in ingested.categories)
    status = 0
    if tested:
        evaluation = build_parser().parse_args(["evaluate", str(output)])
        status = evaluation.run(evaluation)
    else:
        print_message("there are no labelled test images, so the share of defects that the model finds is not known")
        print_threshold_caveats(bundles)
    place = next(iter(bundles.values()))
    print(f"{output / ('report/report.html' if tested else 'report.html')}")
    print_message(f"next: focus-ray inspect {place} IMAGES --overlays heat")
    print_message(f"      focus-ray serve {output}   # a page on http://127.0.0.1:8000")
    return max(status, ingested.exit_status)
