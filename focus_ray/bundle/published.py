"""The bundles of a place that a command is given: a bundle, a run, a folder of bundles, a registry, or a team's part of one."""

from __future__ import annotations

from collections.abc import Callable

from focus_ray.bundle.bundle import find_bundles
from focus_ray.bundle.registry import LATEST, Registry
from focus_ray.errors import DataError, RegistryError
from focus_ray.names import is_name


def bundles_at(place: str, version: str = LATEST, log: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """Category -> bundle.

    Args:
        version: of a registry's models, a version's name or an alias; a category that has none of it is told and left out.

    Raises: DataError: nothing there, or teams of a registry have categories of one name.
    """
    try:
        return find_bundles(place)
    except DataError as error:
        found = _published(place, version, log)
        if not found:
            raise DataError(f"{error}, or a registry that `focus-ray registry publish` made") from None
        return found


def _published(place: str, version: str, log: Callable[[str], None]) -> dict[str, str]:
    registry = Registry(place)
    parent, _, name = registry.root.rpartition("/")
    if is_name(name) and not parent.endswith(":/"):  # of a bucket there is no folder above
        within = Registry(parent)
        if any(within.versions(name, category) for category in within.categories(name)[:_LOOKED_AT]):
            return _of_team(within, name, version, log)
    found: dict[str, str] = {}
    for team in registry.teams():
        new = _of_team(registry, team, version, log)
        twice = sorted(set(found) & set(new))
        if twice:
            raise DataError(
                f"{place}: several teams have a category {twice[0]!r}: give one team's folder, {place}/{team}"
            )
        found.update(new)
    return found


_LOOKED_AT = 3  # names in a folder, to tell a team's from others


def _of_team(registry: Registry, team: str, version: str, log: Callable[[str], None]) -> dict[str, str]:
    found = {}
    for category in registry.categories(team):
        try:
            found[category] = registry.resolve(team, category, version).uri
        except RegistryError as error:
            log(f"{team}/{category}: left out: {error}")
    return found
