"""Where models come from: a registry, or a folder of bundles that is served as if it were one; and what is known of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from focus_ray.bundle.bundle import find_bundles, read_manifest
from focus_ray.bundle.registry import LATEST, Registry, Version
from focus_ray.errors import BundleError, RegistryError

T = TypeVar("T")


class Source(Protocol):
    """What the service asks of a registry. Raises: RegistryError: not there.  DataError: the storage fails."""

    def teams(self) -> list[str]: ...

    def categories(self, team: str) -> list[str]: ...

    def versions(self, team: str, category: str) -> list[Version]: ...

    def aliases(self, team: str, category: str) -> dict[str, str]: ...

    def resolve(self, team: str, category: str, ref: str = ...) -> Version: ...

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version: ...

    def roll_back(self, team: str, category: str, alias: str) -> Version: ...

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version: ...


class FolderSource:
    """A bundle, or a run's folder, as a registry of one team; a category's one version is named by its hash."""

    def __init__(self, place: str, team: str) -> None:
        """Raises: DataError: no bundle there."""
        self.place, self.team = place, team
        self._bundles()

    def teams(self) -> list[str]:
        return [self.team]

    def categories(self, team: str) -> list[str]:
        return sorted(self._bundles()) if team == self.team else []

    def versions(self, team: str, category: str) -> list[Version]:
        place = self._bundles().get(category) if team == self.team else None
        if place is None:
            return []
        manifest = read_manifest(place)
        size = sum(int(entry["num_bytes"]) for entry in manifest["files"].values())
        made = datetime.fromisoformat(manifest["created_at"])
        return [Version(team, category, manifest["sha256"][:16], place, manifest["sha256"], made, size)]

    def aliases(self, team: str, category: str) -> dict[str, str]:
        versions = self.versions(team, category)
        return {LATEST: versions[0].name} if versions else {}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        for version in self.versions(team, category):
            if ref in (LATEST, version.name):
                return version
        raise RegistryError(f"{self.place}: there is no {ref!r} of category {category!r}")

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        raise RegistryError("a folder of bundles has no aliases to move: serve a registry")

    def roll_back(self, team: str, category: str, alias: str) -> Version:
        raise RegistryError("a folder of bundles has no aliases to move: serve a registry")

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version:
        raise RegistryError(
            "a folder of bundles keeps no versions, so thresholds are not saved in it: serve a registry"
        )

    def _bundles(self) -> dict[str, str]:
        return find_bundles(self.place)


def open_source(registry: str | None, bundles: str | None, team: str) -> Source:
    """Raises: DataError: no bundle in the folder."""
    if registry is not None:
        return Registry(registry)
    assert bundles is not None
    return FolderSource(bundles, team)


def version_key(version: Version) -> str:
    """Names one artifact in one place: what a model is cached, routed and told apart by."""
    return f"{version.team}/{version.category}/{version.name}/{version.sha256[:16]}"


@dataclass
class _Entry:
    version: Version
    checked: float
    task: asyncio.Task[None] | None = None


class Directory:
    """Which version an alias stands for, looked up again every `refresh_s` behind the answers.

    A request never waits for a look-up that has been made before, and goes on with what is known while the storage fails.
    When an alias has moved, the new version is warmed first and answers only then, so that a promotion costs no request.
    """

    def __init__(
        self,
        source: Source,
        refresh_s: float,
        warm: Callable[[Version], Awaitable[None]],
        log: Callable[..., None] = lambda message, **facts: None,
    ) -> None:
        self.source, self.refresh_s, self.warm, self.log = source, refresh_s, warm, log
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._manifests: dict[str, dict[str, Any]] = {}

    async def resolve(self, team: str, category: str, ref: str) -> Version:
        """Raises: RegistryError: nothing of that name.  DataError: the storage fails, and nothing is known yet."""
        key = (team, category, ref)
        entry = self._entries.get(key)
        if entry is None:
            version = await asyncio.to_thread(self.source.resolve, team, category, ref)
            entry = self._entries[key] = _Entry(version, time.monotonic())
        elif entry.task is None and time.monotonic() - entry.checked >= self.refresh_s:
            entry.task = asyncio.create_task(self._refresh(key, entry))
        return entry.version

    async def _refresh(self, key: tuple[str, str, str], entry: _Entry) -> None:
        facts = dict(zip(("team", "category", "ref"), key, strict=True))
        try:
            version = await asyncio.to_thread(self.source.resolve, *key)
            if version_key(version) != version_key(entry.version):
                await self.warm(version)
                self.log("alias moved", former=entry.version.name, version=version.name, **facts)
                entry.version = version
        except RegistryError:
            self._entries.pop(key, None)  # gone: the next request is told so
        except Exception as error:  # whatever it is, what is known goes on answering
            self.log("version not refreshed", error=str(error), **facts)
        finally:
            entry.checked, entry.task = time.monotonic(), None

    def forget(self, team: str, category: str) -> None:
        """Lets the next look-up of a category come at once, after its alias was moved through this very process."""
        for (of_team, of_category, _), entry in self._entries.items():
            if (of_team, of_category) == (team, category):
                entry.checked = float("-inf")

    async def manifest(self, version: Version) -> dict[str, Any]:
        """The bundle's manifest. Raises: BundleError: not what was published, or unreadable."""
        key = version_key(version)
        found = self._manifests.get(key)
        if found is None:
            found = await asyncio.to_thread(read_manifest, version.uri)
            if found["sha256"] != version.sha256:
                raise BundleError(f"{version.uri}: not the bundle that was published as {version.name}")
            while len(self._manifests) >= 256:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[key] = found
        return found

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls the source in a thread."""
        return await asyncio.to_thread(function, *arguments)
