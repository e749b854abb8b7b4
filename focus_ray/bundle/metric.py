"""The metrics of many bundles to one that a new category can be given."""

from __future__ import annotations

from collections.abc import Sequence

from focus_ray.bundle.bundle import find_bundles, read_manifest, read_statistics
from focus_ray.config import Config, parse_config
from focus_ray.errors import BundleError
from focus_ray.fitting.shared_metric import matching_settings, write_shared_metric


def share_metric(places: Sequence[str], output: str) -> list[str]:
    """Averages the metrics of bundles, runs' folders or folders of bundles into a file for density.metric.

    Returns: the categories that it is made of.

    Raises: DataError: a place holds no bundle, or the file cannot be written.  BundleError: a bundle keeps no metric of its own,
        two are of one category, or of two kinds of network.
    """
    scatters = {}
    first: tuple[str, Config] | None = None
    for uri in (uri for place in places for uri in find_bundles(place).values()):
        manifest = read_manifest(uri)
        config = parse_config(manifest["config"], source=uri)
        scatter = read_statistics(uri).scatter
        if scatter is None or config.density.metric is not None:
            raise BundleError(
                f"{uri}: keeps no metric of its own: train it with density.reduction=discriminant, without density.metric"
            )
        if manifest["category"] in scatters:
            raise BundleError(f"{uri}: category {manifest['category']!r} is there twice: name each category once")
        first = first or (uri, config)
        if matching_settings(config) != matching_settings(first[1]):
            differing = [
                key for key, value in matching_settings(config).items() if matching_settings(first[1])[key] != value
            ]
            raise BundleError(
                f"{uri}: another {', '.join(differing)} than {first[0]}: share metrics of one kind of network"
            )
        scatters[str(manifest["category"])] = scatter
    assert first is not None
    write_shared_metric(output, scatters, first[1])
    return sorted(scatters)
