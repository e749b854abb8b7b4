"""Finds the bundles at an address from a user: a bundle, a run, a folder of bundles, a registry, or a team's folder in it."""

from __future__ import annotations

from collections.abc import Callable

from focus_ray.bundle.bundle import find_bundles_in_folder
from focus_ray.bundle.registry import LATEST, Registry
from focus_ray.errors import DataError, RegistryError
from focus_ray.names import is_valid_name

_NUM_PROBED = 3  # categories of a folder that are looked up to recognise the folder of a team


def find_bundles_in_folder_or_registry(
    place: str, version: str = LATEST, log: Callable[[str], None] = lambda message: None
) -> dict[str, str]:
    """Returns category -> URI of its bundle. `place` may also be a registry, which `find_bundles_in_folder` does not accept.

    Args:
        place: a bundle, the folder of a run, a folder of bundles, a registry, or the folder of a team in a registry.
        version: name of a version (v0007) or of an alias, used only for a registry. A category without this version, or with a
            damaged record of this version, is left out.
        log: receives a message for each category that is left out.

    Raises:
        DataError: the address has no bundle, several teams of a registry have a category of the same name, or the storage fails.
        BundleError: the manifest of a bundle outside a registry is unreadable or damaged, or has an unsupported format version.
        RegistryError: there is no bundle, and `version` is not allowed as a name.
    """
    try:
        return find_bundles_in_folder(place)
    except DataError as error:
        bundles = _find_published_bundles(place, version, log)
        if not bundles:
            raise DataError(f"{error}, or a registry that `focus-ray registry publish` made") from None
        return bundles


def find_single_bundle(place: str) -> str:
    """Returns the URI of the only bundle at an address, for instance the folder that `focus-ray fit` wrote.

    Args: place: see `find_bundles_in_folder_or_registry`; of a registry, the newest version is taken.

    Raises: DataError: there are several bundles; the message names their categories. Otherwise see
        `find_bundles_in_folder_or_registry`.
    """
    bundles = find_bundles_in_folder_or_registry(place)
    if len(bundles) > 1:
        raise DataError(
            f"{place}: has bundles of {', '.join(bundles)}: give a single bundle, for instance {next(iter(bundles.values()))}"
        )
    return next(iter(bundles.values()))


def _find_published_bundles(place: str, version: str, log: Callable[[str], None]) -> dict[str, str]:
    """Returns category -> URI of its bundle, for a registry or the folder of a team in a registry; empty for any other folder.

    Args: as `find_bundles_in_folder_or_registry`.

    Raises: DataError: several teams of the registry have a category of the same name, or the storage fails.
    """
    registry = Registry(place)
    parent, _, name = registry.root.rpartition("/")
    if is_valid_name(name) and not parent.endswith(":/"):  # a bucket has no parent folder
        parent_registry = Registry(parent)
        if any(
            parent_registry.list_versions(name, category)
            for category in parent_registry.list_categories(name)[:_NUM_PROBED]
        ):
            return _find_team_bundles(parent_registry, name, version, log)
    bundles: dict[str, str] = {}
    for team in registry.list_teams():
        team_bundles = _find_team_bundles(registry, team, version, log)
        duplicates = sorted(set(bundles) & set(team_bundles))
        if duplicates:
            raise DataError(
                f"{place}: several teams have a category {duplicates[0]!r}: give the folder of a single team, {place}/{team}"
            )
        bundles.update(team_bundles)
    return bundles


def _find_team_bundles(registry: Registry, team: str, version: str, log: Callable[[str], None]) -> dict[str, str]:
    """Returns category -> URI of the bundle of `version`, for the categories of a team.

    Logs and skips a category without this version, or with a damaged record of this version.
    """
    bundles = {}
    for category in registry.list_categories(team):
        try:
            bundles[category] = registry.resolve(team, category, version).uri
        except RegistryError as error:
            log(f"{team}/{category}: left out: {error}")
    return bundles
