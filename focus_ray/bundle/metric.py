"""Averages the metrics of many bundles into a shared metric for new categories."""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.bundle.bundle import find_bundles, read_manifest, read_statistics
from focus_ray.errors import BundleError
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shared_metric import matching_settings, write_shared_metric


def share_metric(places: Sequence[str], output: str) -> list[str]:
    """Averages the metrics of bundles and writes a file for the setting density.metric.

    Args:
        places: bundles, folders of runs or folders of bundles.
        output: address of the file.

    Returns: the sorted categories of the bundles.

    Raises:
        DataError: an address contains no bundle, or the file cannot be written.
        BundleError: a bundle stores no metric of its own, two bundles have the same category, or the networks differ.
    """
    scatters = {}
    reference: tuple[str, Config] | None = None  # the first bundle: all others must have matching settings
    for uri in (uri for place in places for uri in find_bundles(place).values()):
        manifest = read_manifest(uri)
        config = parse_config(manifest["config"], uri, is_fitted=True)
        scatter = read_statistics(uri).scatter
        if scatter is None or config.density.metric is not None:
            raise BundleError(
                f"{uri}: the bundle stores no metric of its own: train it with density.reduction=discriminant and without "
                "density.metric"
            )
        if manifest["category"] in scatters:
            raise BundleError(
                f"{uri}: another bundle has the same category {manifest['category']!r}: give a single bundle for each category"
            )
        reference = reference or (uri, config)
        expected = matching_settings(reference[1])
        differing = [key for key, value in matching_settings(config).items() if expected[key] != value]
        if differing:
            raise BundleError(
                f"{uri}: {', '.join(differing)} differs from {reference[0]}: give bundles with the same network settings"
            )
        scatters[str(manifest["category"])] = scatter
    assert reference is not None
    write_shared_metric(output, scatters, reference[1])
    return sorted(scatters)
