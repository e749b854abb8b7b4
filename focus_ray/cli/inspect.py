"""The commands `inspect` and `inspect-batch`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focus_ray.cli.options import add_cluster_settings_argument, add_engine_options, add_model_version_option
from focus_ray.cli.output import EXIT_ERROR, check_paths_exist, escape_invalid_utf8, list_image_paths, print_message
from focus_ray.errors import DataError
from focus_ray.progress import track_progress

_NAME_BYTES = 200  # length of an overlay's name without number and .png; a file name may have 255 bytes


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `inspect` and `inspect-batch`."""
    inspect = commands.add_parser("inspect", help="score images; prints JSON lines, and can draw heat maps")
    add = inspect.add_argument
    add("bundle", help="a bundle, or the folder of a run or a registry with a single bundle")
    add("images", nargs="+", help="image files, or folders of them")
    add("--overlays", metavar="FOLDER", help="folder for the heat map over each image")
    add("--csv", metavar="FILE", help="also write a table: one row for each image, after the last image")
    add_engine_options(inspect)
    inspect.set_defaults(run=_run_inspect_command)

    batch = commands.add_parser("inspect-batch", help="score a Parquet data set into Parquet")
    add = batch.add_argument
    add("bundles", help="a bundle, a run's folder, a registry, or a team's folder in a registry")
    add("data", help="Parquet data set: a path or s3:// URI")
    add("output", help="folder of the results: a path or s3:// URI")
    add_cluster_settings_argument(batch)
    add("--split", choices=("train", "test"), help="only these images")
    add("--workers", "--actors", type=int, default=1, metavar="N", help="largest number of workers on Ray (default: 1)")
    add_model_version_option(batch)
    batch.set_defaults(run=_run_inspect_batch_command)


def _run_inspect_command(arguments: argparse.Namespace) -> int:
    """Runs `inspect`: prints one JSON line per image, and can write overlays and a CSV table. Returns the exit status."""
    check_paths_exist(arguments.bundle)
    paths = list_image_paths(arguments.images)
    if arguments.overlays and "://" in arguments.overlays:
        raise DataError(f"--overlays {arguments.overlays}: expected a folder of this machine")
    if arguments.overlays:
        try:
            Path(arguments.overlays).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{arguments.overlays}: cannot make a folder for overlays: {error.strerror}") from error
    if arguments.csv and Path(arguments.csv).is_dir():
        raise DataError(f"{arguments.csv}: a folder: give a file for --csv")
    names = _choose_overlay_names(paths)
    if arguments.overlays:
        _check_replaced_files(Path(arguments.overlays), names)
    print_message(f"inspect: {len(paths)} images with {arguments.bundle}")
    from focus_ray.bundle.inspector import Inspector  # takes seconds to import, so check the paths first
    from focus_ray.bundle.published import find_single_bundle
    from focus_ray.csv_tables import build_verdict_row, format_csv
    from focus_ray.detect.pictures import draw_overlay_with_strip
    from focus_ray.storage.files import write_bytes

    examples = list_image_paths(arguments.examples) if arguments.examples else []
    if arguments.engine != "torch":
        print_message(f"inspect: compiling for {arguments.engine}, checked by {len(examples)} examples")
    bundle = find_single_bundle(arguments.bundle)
    inspector = Inspector.load(bundle, arguments.device, engine=arguments.engine, examples=examples)
    category = inspector.bundle.category
    status = 0
    for caveat in inspector.bundle.calibration.describe_limits():
        print_message(f"note: {caveat}")
    rows: list[dict[str, Any]] = []
    missing_overlays: list[str] = []
    counts: Counter[str] = Counter()
    size = inspector.batch_size
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    for batch in track_progress(batches, "inspecting", len(paths), print_message, count=len):
        for path, data, inspection_or_error in _inspect_image_files(inspector, batch):
            if isinstance(inspection_or_error, str):
                error_line = {"image": escape_invalid_utf8(path), "error": inspection_or_error}
                rows.append(build_verdict_row({**error_line, "category": category}))
                print(json.dumps(error_line, ensure_ascii=False))
                status = EXIT_ERROR
                continue
            line = {"image": escape_invalid_utf8(path), "category": category, **inspection_or_error.to_dict()}
            rows.append(build_verdict_row(line))
            counts[inspection_or_error.verdict] += 1
            counts["trained on"] += inspection_or_error.trained_on
            if arguments.overlays:
                target = Path(arguments.overlays) / names[path]
                try:
                    write_bytes(target, draw_overlay_with_strip(data, inspection_or_error))
                    line["overlay"] = escape_invalid_utf8(target)
                except DataError as error:  # keep the verdict, and try the next overlay
                    line["overlay_error"] = escape_invalid_utf8(str(error))
                    missing_overlays.append(line["overlay_error"])
                    status = EXIT_ERROR
            print(json.dumps(line, ensure_ascii=False))
    if arguments.csv:
        write_bytes(arguments.csv, format_csv(rows).encode())
    if counts["trained on"]:
        print_message(
            f"WARNING: {counts['trained on']} of {len(paths)} images are among those that the model was trained on: their scores "
            "are near zero and say nothing about new parts"
        )
    num_unreadable = len(paths) - counts["anomalous"] - counts["normal"]
    written = [f"{place}" for place in (arguments.overlays, arguments.csv) if place]
    print_message(
        f"{len(paths)} images: {counts['anomalous']} anomalous, {counts['normal']} normal"
        + (f", {num_unreadable} could not be read" if num_unreadable else "")
        + (f"; written: {', '.join(written)}" if written else "")
    )
    if missing_overlays:
        print_message(f"WARNING: {len(missing_overlays)} overlays are missing, the first: {missing_overlays[0]}")
    return status


def _inspect_image_files(inspector: Any, paths: Sequence[Path]) -> list[tuple[Path, bytes, Any]]:
    """Returns path, bytes and inspection of each file, in order. If a file cannot be used, the reason replaces the inspection."""
    results: list[tuple[Path, bytes, Any]] = []
    for path in paths:
        try:
            results.append((path, path.read_bytes(), None))
        except OSError as error:
            results.append((path, b"", f"cannot read the file: {error.strerror or error}"))
    readable = [number for number, (_, _, reason) in enumerate(results) if reason is None]
    inspections = inspector.inspect_or_return_errors([results[number][1] for number in readable])
    for number, inspection in zip(readable, inspections, strict=True):
        results[number] = (*results[number][:2], str(inspection) if isinstance(inspection, DataError) else inspection)
    return results


def _check_replaced_files(folder: Path, names: Mapping[Path, str]) -> None:
    """Checks that no overlay replaces an inspected image, or another file that is not an overlay.

    Raises:
        DataError: An overlay would replace such a file.
    """
    from focus_ray.drawing.mark import is_file_drawn_by_focus_ray

    images = {os.path.realpath(path): path for path in names}
    for path, name in names.items():
        if (image := images.get(os.path.realpath(folder / name))) is not None:
            raise DataError(
                f"--overlays {folder}: the overlay of {escape_invalid_utf8(path)} would replace the image "
                f"{escape_invalid_utf8(image)}: give another folder"
            )
        target = folder / name
        if os.path.isfile(target) and os.path.getsize(target) and not is_file_drawn_by_focus_ray(target):
            raise DataError(
                f"--overlays {folder}: the overlay of {escape_invalid_utf8(path)} would replace "
                f"{escape_invalid_utf8(target)}, which is not an overlay: give another folder"
            )


def _choose_overlay_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns a unique file name for the overlay of each image.

    The name is <stem>.png. If images share a stem, the names of their folders come before the stem; if the names are still equal,
    a number follows. Names that are too long for a file system are cut.
    """
    num_same_stem = Counter(path.stem for path in set(paths))
    names: dict[Path, str] = {}
    used_names: set[str] = set()
    for path in dict.fromkeys(paths):
        name = path.stem if num_same_stem[path.stem] == 1 else "-".join([*path.parts[-3:-1], path.stem])
        while len(os.fsencode(name)) > _NAME_BYTES:
            name = name[:-1]
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        name = next(candidate for candidate in numbered if candidate not in used_names)
        used_names.add(name)
        names[path] = f"{name}.png"
    return names


def _run_inspect_batch_command(arguments: argparse.Namespace) -> int:
    """Runs `inspect-batch`: inspects a data set and prints the counts as JSON. Returns the exit status."""
    from focus_ray.cluster.settings import parse_cluster_settings

    cluster = parse_cluster_settings(arguments.override)
    check_paths_exist(arguments.bundles, arguments.data)
    print_message(f"inspect-batch: {arguments.data} with {arguments.bundles} -> {arguments.output}")
    from focus_ray.bundle.published import find_bundles_in_folder_or_registry
    from focus_ray.evaluation.batch_inspection import inspect_dataset

    counts = inspect_dataset(
        find_bundles_in_folder_or_registry(arguments.bundles, arguments.version_of, print_message),
        arguments.data,
        arguments.output,
        split=arguments.split,
        num_actors=arguments.workers,
        cluster=cluster,
        log=print_message,
    )
    print(json.dumps(counts, indent=1, ensure_ascii=False))
    return EXIT_ERROR if any(count["num_errors"] for count in counts.values()) else 0
