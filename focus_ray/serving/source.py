"""Sources of models (a registry, or a folder of bundles), time-limited look-ups in them, and a cache of resolved aliases.

A ref is the name of a version, or an alias for a version. To resolve a ref is to find its version. A mark is a text that changes
when a version or alias of a category changes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from focus_ray.bundle.bundle import find_bundles_in_folder, read_bundle_stamps, read_manifest
from focus_ray.bundle.registry import LATEST, Registry, Version
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.serving.logs import log_event
from focus_ray.serving.settings import ServiceSettings
from focus_ray.storage.files import FileStat

T = TypeVar("T")
MAX_LOOKUP_AGE_S = 600.0  # older look-ups are repeated even if marks did not change: old releases publish without marks
LOOKUP_TIMEOUT_S = 10.0  # a request waits this long for the storage; the storage client itself may retry for minutes
LOOKUPS_PER_TEAM, _LOOKUP_THREADS = 4, 32  # at the same time
_REFRESH_THREADS = 4
# A file may change without a new stamp while it is younger than this: S3 stamps count whole seconds, and clocks differ.
_SETTLED_S = 60.0


class FolderModelSource:
    """A source of models in a bundle or in the folder of a run; the class has the reading methods of a registry with one team.

    Each category has one version, named by the hash of its manifest, and the alias `latest`. One listing serves all categories
    until the listing is `refresh_s` seconds old. A manifest is read again only if its file has changed or was changed less than
    `_SETTLED_S` seconds before the last read. Methods that list the bundles raise DataError if the storage fails or there is no
    bundle, and BundleError if a manifest is damaged.
    """

    def __init__(self, place: str, team: str, refresh_s: float = 0.0) -> None:
        """Checks that the place contains a bundle.

        Args:
            place: path or URI of a bundle, or of the folder of a run.
            team: name of the only team.
            refresh_s: largest age of a listing in seconds.

        Raises:
            DataError: the place contains no bundle.
            BundleError: the manifest of a bundle is damaged.
        """
        self.place, self.team, self.refresh_s = place, team, refresh_s
        self._lock = threading.Lock()  # threads that need a listing at the same time share it
        self._entries: dict[str, _CachedManifest] = {}
        self._versions: dict[str, Version] = {}
        self._listed_at = float("-inf")
        find_bundles_in_folder(place)  # searches few levels, so that a wrong folder fails immediately

    def list_teams(self) -> list[str]:
        """Returns a list with the name of the only team."""
        return [self.team]

    def list_categories(self, team: str) -> list[str]:
        """Returns the sorted categories with a bundle; an empty list for another team."""
        return sorted(self._list_versions_by_category(self.refresh_s)) if team == self.team else []

    def list_versions(self, team: str, category: str) -> list[Version]:
        """Returns a list with the only version of a category; an empty list if there is no such category or team."""
        version = self._list_versions_by_category(self.refresh_s).get(category) if team == self.team else None
        return [version] if version else []

    def list_aliases(self, team: str, category: str) -> dict[str, str]:
        """Returns alias -> version name, with `latest` as the only alias; empty if there is no such category or team."""
        versions = self.list_versions(team, category)
        return {LATEST: versions[0].name} if versions else {}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        """Returns the version of a category. Raises: RegistryError: `ref` is neither `latest` nor the name of this version."""
        for version in self.list_versions(team, category):
            if ref in (LATEST, version.name):
                return version
        raise RegistryError(f"{self.place}: there is no {ref!r} of category {category!r}")

    def read_change_marks(self, team: str) -> dict[str, str]:
        """Returns category -> mark, a text that changes with the version of the category; empty for another team.

        Always lists the folder again, because `VersionCache` counts the age of marks from the time of this call.
        """
        versions = self._list_versions_by_category(0.0) if team == self.team else {}
        return {category: get_version_key(version) for category, version in versions.items()}

    def _list_versions_by_category(self, max_age_s: float) -> dict[str, Version]:
        """Returns category -> version; lists the folder again if the last listing is at least `max_age_s` seconds old.

        Raises:
            DataError: there is no bundle, or the storage fails.
            BundleError: the manifest of a bundle is damaged.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._listed_at >= max_age_s:
                stamps = read_bundle_stamps(self.place)
                if not stamps:
                    find_bundles_in_folder(self.place)  # raises DataError with the reason
                self._entries = {uri: self._read_changed_manifest(uri, stamp) for uri, stamp in stamps.items()}
                self._versions = {entry.version.category: entry.version for entry in self._entries.values()}
                self._listed_at = now
            return self._versions

    def _read_changed_manifest(self, uri: str, stamp: FileStat) -> _CachedManifest:
        """Returns the version of a bundle; reads the manifest unless the stamp (time and size) shows that the file is unchanged.

        Args: stamp: current stamp of the manifest file.

        Raises: BundleError: the manifest is damaged, or cannot be read.
        """
        previous = self._entries.get(uri)
        if previous is not None and previous.is_settled and previous.stamp == stamp:
            return previous
        is_settled = time.time() - stamp.mtime_ns / 1e9 > _SETTLED_S
        manifest = read_manifest(uri)
        size = sum(int(entry["num_bytes"]) for entry in manifest["files"].values())
        created_at, sha256 = datetime.fromisoformat(manifest["created_at"]), str(manifest["sha256"])
        version = Version(self.team, str(manifest["category"]), sha256[:16], uri, sha256, created_at, size)
        return _CachedManifest(stamp, is_settled, version)


class _CachedManifest(NamedTuple):
    """The version of a bundle whose manifest was read, and the state of the manifest file at that time.

    Attributes:
        stamp: time of the last change, and size, of the manifest file.
        is_settled: whether the file was old enough when it was read that every later change gives another stamp.
    """

    stamp: FileStat
    is_settled: bool
    version: Version


ModelSource = Registry | FolderModelSource
"""Published models. Methods block. They raise RegistryError if a version is missing, and DataError if the storage fails."""


def open_model_source(settings: ServiceSettings) -> ModelSource:
    """Opens the registry of the settings; without a registry, opens the folder `bundles` as the models of one team.

    Raises:
        DataError: the folder contains no bundle.
        BundleError: a bundle in the folder has a damaged manifest.
    """
    if settings.registry is not None:
        return Registry(settings.registry)
    assert settings.bundles is not None
    return FolderModelSource(settings.bundles, settings.team, settings.refresh_s)


def get_version_key(version: Version) -> str:
    """Returns a text that identifies a version and its content; caches and the routing of Serve use it as a key."""
    return f"{version.team}/{version.category}/{version.name}/{version.sha256[:16]}"


def get_version_labels(version: Version) -> dict[str, Any]:
    """Returns a dictionary with team, category and name of a version, for logs, metrics and answers."""
    return {"team": version.team, "category": version.category, "version": version.name}


class StorageThreads:
    """Runs storage calls that requests wait for in separate threads, with a time limit and at most LOOKUPS_PER_TEAM per team."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # of teams with waiting calls

    async def call_function(
        self, team: str, function: Callable[..., T], *arguments: Any, timeout_s: float | None = None
    ) -> T:
        """Calls a function in a thread, where it may block, and returns its result.

        A call that hangs counts as running after its timeout, so that a team never occupies more than LOOKUPS_PER_TEAM threads.

        Args:
            team: team of the request.
            function: called with `arguments`.
            timeout_s: time limit in seconds; None: LOOKUP_TIMEOUT_S.

        Raises:
            DataError: there was no result within the time limit, which includes the wait for a free thread of the team.
            Exception: any error of the function.
        """
        limit_s, loop = timeout_s or LOOKUP_TIMEOUT_S, asyncio.get_running_loop()
        slots = self._slots.get(team)
        if slots is None:
            slots = self._slots[team] = asyncio.Semaphore(LOOKUPS_PER_TEAM)

        def release_slot(_: Future[T]) -> None:
            """Releases the slot of the team after the call has ended."""
            with suppress(RuntimeError):  # the event loop ended before the call
                loop.call_soon_threadsafe(slots.release)

        async def call_in_slot() -> T:
            """Waits for a slot of the team, and returns the result of the function."""
            await slots.acquire()
            future = self._threads.submit(function, *arguments)
            future.add_done_callback(release_slot)
            return await asyncio.wrap_future(future)

        try:
            return await asyncio.wait_for(call_in_slot(), limit_s)
        except asyncio.TimeoutError:
            raise DataError(f"the storage did not answer within {limit_s:g} s") from None

    def close(self) -> None:
        """Ends the threads. Does not wait for running calls, because a call may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass
class _ResolvedAlias:
    """The version of an alias or version name in the cache; all times are times of `time.monotonic`.

    Attributes:
        mark: text that changes with the models of the category, read before the look-up; None: there was none.
        resolved_at: time of the look-up.
        checked_at: time of the last check that the alias has not moved.
        task: the check that runs now; None: none runs.
    """

    version: Version
    mark: str | None
    resolved_at: float
    checked_at: float
    task: asyncio.Task[None] | None = None


class _TeamChangeMarks(NamedTuple):
    """The marks of the categories of a team, and the time when they were requested.

    A mark is a text that changes when the models of a category change.

    Attributes:
        fetched_at: time of `time.monotonic` before the marks were read.
        by_category: category -> mark.
    """

    fetched_at: float
    by_category: dict[str, str]


class VersionCache:
    """A cache of manifests, and of the version that each alias names.

    A request for an alias whose last check is `refresh_s` seconds old starts a new check, and does not wait for the check. A
    check fetches the marks of the team (texts that change with its models), once for all categories, and looks the alias up if
    the mark of its category has changed. A request waits only for the first look-up of an alias. While the storage fails,
    requests use the cached versions. When an alias has moved, the new version is loaded before it answers requests, so that no
    request waits for a promotion.
    """

    def __init__(
        self,
        source: ModelSource,
        refresh_s: float,
        warm_up_model: Callable[[Version], Awaitable[None]],
        storage_threads: StorageThreads,
    ) -> None:
        """Creates an empty cache.

        Args:
            source: lists and reads the models.
            refresh_s: seconds after which an entry is checked again.
            warm_up_model: loads a version before it answers for an alias that has moved.
            storage_threads: runs the look-ups that requests wait for; checks in the background have their own threads.
        """
        self.source, self.refresh_s, self.warm_up_model = source, refresh_s, warm_up_model
        self.storage_threads = storage_threads
        self._threads = ThreadPoolExecutor(_REFRESH_THREADS, thread_name_prefix="refresh")
        self._entries: dict[tuple[str, str, str], _ResolvedAlias] = {}
        self._manifests: dict[str, dict[str, Any]] = {}
        self._marks: dict[str, _TeamChangeMarks] = {}  # only of teams for which an alias was resolved
        self._mark_tasks: dict[str, asyncio.Task[_TeamChangeMarks]] = {}

    async def resolve_version(self, team: str, category: str, ref: str) -> Version:
        """Returns the version of a ref (alias or version name) from the cache, or from the source if the cache has no entry.

        Raises:
            RegistryError: there is no such version or alias.
            DataError: the storage fails and the cache has no entry.
            BundleError: a manifest in a folder of bundles is damaged and the cache has no entry.
        """
        key = (team, category, ref)
        entry = self._entries.get(key)
        if entry is None:
            # the mark must be older than the look-up: then a change in between shows as a changed mark
            marks, now = self._marks.get(team), time.monotonic()
            mark, checked_at = (marks.by_category.get(category), marks.fetched_at) if marks else (None, float("-inf"))
            version = await self.storage_threads.call_function(team, self.source.resolve, team, category, ref)
            entry = self._entries[key] = _ResolvedAlias(version, mark, now, checked_at)
        elif entry.task is None and time.monotonic() - entry.checked_at >= self.refresh_s:
            entry.task = asyncio.create_task(self._refresh_entry(key, entry))
        return entry.version

    async def _refresh_entry(self, key: tuple[str, str, str], entry: _ResolvedAlias) -> None:
        """Checks whether the alias of a cache entry has moved, and updates the entry. Logs errors instead of raising them.

        A mark is a text that changes with the models of a category. Looks the alias up only if there is no mark, the mark has
        changed, or the last look-up is MAX_LOOKUP_AGE_S old. Removes the entry if the version or alias no longer exists.

        Args: key: team, category, and alias or version name.
        """
        facts: dict[str, Any] = dict(zip(("team", "category", "ref"), key, strict=True))
        now = checked_at = time.monotonic()
        try:
            marks = await self._get_current_marks(key[0])
            mark = marks.by_category.get(key[1])
            if mark is None or mark != entry.mark or now - entry.resolved_at >= MAX_LOOKUP_AGE_S:
                version = await self._call_in_refresh_thread(self.source.resolve, *key)
                if get_version_key(version) != get_version_key(entry.version):
                    await self.warm_up_model(version)
                    log_event("alias moved", former=entry.version.name, version=version.name, **facts)
                    entry.version = version
                entry.mark, entry.resolved_at = mark, now
            else:
                checked_at = marks.fetched_at  # the marks do not show later changes
        except RegistryError:
            self._entries.pop(key, None)  # it was deleted: the next request gets this error
        except Exception as error:  # any error: the cached version continues to answer
            log_event("version not refreshed", error=str(error), **facts)
        finally:
            entry.checked_at, entry.task = checked_at, None

    async def _get_current_marks(self, team: str) -> _TeamChangeMarks:
        """Returns the marks of a team (texts that change with its models), at most `refresh_s` seconds old.

        Simultaneous checks share one request to the source.
        """
        marks = self._marks.get(team)
        if marks is not None and time.monotonic() - marks.fetched_at < self.refresh_s:
            return marks
        task = self._mark_tasks.get(team)
        if task is None:
            task = self._mark_tasks[team] = asyncio.create_task(self._fetch_marks(team))
            task.add_done_callback(lambda _: self._mark_tasks.pop(team, None))
        return await asyncio.shield(task)

    async def _fetch_marks(self, team: str) -> _TeamChangeMarks:
        """Reads the marks of a team (texts that change with its models) from the source, caches them, and returns them.

        Raises: any error of `source.read_change_marks`.
        """
        marks = _TeamChangeMarks(
            time.monotonic(), await self._call_in_refresh_thread(self.source.read_change_marks, team)
        )
        self._marks[team] = marks
        return marks

    def expire_category(self, team: str, category: str) -> None:
        """Makes the next request for each cached alias of a category start a check; called after this process moved an alias."""
        for (entry_team, entry_category, _), entry in self._entries.items():
            if (entry_team, entry_category) == (team, category):
                entry.checked_at, entry.mark = float("-inf"), None

    async def get_manifest(self, version: Version) -> dict[str, Any]:
        """Returns the manifest of the bundle of a version, from the cache if possible.

        Raises:
            BundleError: the manifest is unreadable, or not the published one.
            DataError: the storage does not answer in time.

        The newest 256 manifests are cached.
        """
        key = get_version_key(version)
        manifest = self._manifests.get(key)
        if manifest is None:
            manifest = await self.storage_threads.call_function(version.team, read_manifest, version.uri)
            if manifest["sha256"] != version.sha256:
                raise BundleError(f"{version.uri}: not the bundle that was published as {version.name}")
            while len(self._manifests) >= 256:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[key] = manifest
        return manifest

    async def _call_in_refresh_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in a thread for background checks, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """Ends the threads of the background checks. Does not wait for running calls, because a call may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)
