"""Averages the distance metrics of many bundles into a shared metric for new categories.

A metric is a learnt projection of embeddings (density.reduction=discriminant). It defines the distance between two embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.bundle.bundle import find_bundles_in_folder, read_manifest, read_statistics
from focus_ray.errors import BundleError
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shared_metric import get_compatibility_settings, write_shared_metric


def average_projections(places: Sequence[str], output: str) -> list[str]:
    """Averages the learnt distance metrics of bundles, and writes the average to a file for the setting density.metric.

    Args:
        places: addresses of bundles, folders of runs, or folders of bundles.
        output: path or URI of the file to write.

    Returns: the sorted categories of the bundles.

    Raises:
        DataError: an address contains no bundle, or the file cannot be written.
        BundleError: a bundle is damaged, stores no statistics, or has not learnt a metric itself; or two bundles have the same
            category or different network settings.
        ConfigError: a manifest has a setting that this version of focus_ray cannot use.
    """
    scatters = {}
    reference: tuple[str, Config] | None = None  # the first bundle: all others must have matching settings
    for uri in (uri for place in places for uri in find_bundles_in_folder(place).values()):
        manifest = read_manifest(uri)
        config = parse_config(manifest["config"], uri, is_fitted=True)
        scatter = read_statistics(uri).residual_scatter
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
        expected = get_compatibility_settings(reference[1])
        differing = [key for key, value in get_compatibility_settings(config).items() if expected[key] != value]
        if differing:
            raise BundleError(
                f"{uri}: {', '.join(differing)} differs from {reference[0]}: give bundles with the same network settings"
            )
        scatters[str(manifest["category"])] = scatter
    assert reference is not None
    write_shared_metric(output, scatters, reference[1])
    return sorted(scatters)
