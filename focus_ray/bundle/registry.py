"""The registry: published bundles of each team and category, with permanent version numbers and movable aliases.

    <root>/<team>/<category>/
      v0007/                            the bundle, as training wrote it
      _claims/v0007.json                who took the number; stays after the version is deleted: no number is used twice
      _published/v0007.json             makes the version visible; written last
      _aliases/production/00000003.json the third version that the alias names, and earlier versions; the highest number counts
    <root>/<team>/_changes/
      bolt@begun-20260131T120000-<token>.json  a process is changing the versions or aliases of category bolt
      bolt@done-<token>.json                   the last finished change; deleted when a newer one is written

A record is one of these JSON files. No file is ever overwritten. Claims and alias records are created only if they do not exist
yet (a hard link on a disk, `If-None-Match: *` on S3). So concurrent publishers get different numbers, processes that move the
same alias see each other's moves, and readers see a version completely or not at all. There are no locks, so a dead process
cannot leave a lock behind.

A disk, a person or an attacker may damage a record. Listings skip a damaged record and log its path. An alias with a damaged
last record keeps its previous version. Only `resolve` of the damaged version raises an error, which names the record.

A process that polls lists a team's `_changes`, with a request for each thousand categories, and looks up only changed
categories (`read_change_marks`).
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import socket
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, StrictInt, StrictStr, ValidationError

from focus_ray.bundle.bundle import copy_bundle, read_manifest
from focus_ray.bundle.recalibrate import set_thresholds
from focus_ray.errors import BundleError, DataError, RegistryError, StorageError
from focus_ray.names import NAME_WORDS, is_valid_name
from focus_ray.storage.files import (
    join_path,
    leads_outside_root,
    list_folder_entries,
    read_bytes,
    remove_file,
    remove_folder,
    write_bytes,
    write_bytes_if_absent,
)

LATEST = "latest"
MAX_STEPS_BACK = 32  # number of earlier targets in an alias record
CLAIM_LASTS = timedelta(hours=12)  # a slower publication is refused; its files are deleted after twice this time
_CHANGES, _TIME = "_changes", "%Y%m%dT%H%M%S"
_MAX_RECORD_BYTES = 65536  # a record of this registry has 2 KiB at most
_VERSION = re.compile(r"v[0-9]{4,18}")
_ENTRY = re.compile(r"[0-9]{8,18}\.json")
_BEGUN, _DONE = "begun-", "done-"  # in the alphabetical order of a listing: see `read_change_marks`
_ATTEMPTS = 1000  # at creating the next number; each failure means that another process succeeded, so there is progress

_LOG = logging.getLogger(__name__)
_VersionName = Annotated[StrictStr, Field(pattern=f"^{_VERSION.pattern}$")]


class _PublishedRecord(BaseModel):
    """Content of the JSON file in `_published` that makes a version visible: manifest hash, time, and size in bytes."""

    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
    published_at: AwareDatetime
    num_bytes: Annotated[StrictInt, Field(ge=0, lt=2**63)]


class _AliasTarget(BaseModel):
    """Content of a JSON file in `_aliases`: the version that the alias names, and earlier versions (`before`), latest first."""

    version: _VersionName
    before: list[_VersionName]


class _VersionClaim(BaseModel):
    """Content of a JSON file in `_claims`, which reserves a version number. at: time of the reservation."""

    at: AwareDatetime


_Record = TypeVar("_Record", bound=BaseModel)


class _AliasState(NamedTuple):
    """The current state of an alias in a registry, from its last record file.

    Attributes:
        number: number of the alias's last record file, such as 3 for 00000003.json; 0 if there is no file.
        target: content of the last readable record file; None if the last `MAX_STEPS_BACK` files are unreadable or missing.
        is_damaged: whether the last record file is unreadable.
    """

    number: int
    target: _AliasTarget | None
    is_damaged: bool


@dataclass(frozen=True)
class Version:
    """A published version of a bundle in a registry.

    Attributes:
        name: name of the version, such as v0007.
        uri: folder of the bundle, for `Inspector.load`.
        sha256: hash of the bundle's manifest (`Bundle.version`).
        published_at: time of the publication in UTC.
        num_bytes: size of the bundle in bytes.
    """

    team: str
    category: str
    name: str
    uri: str
    sha256: str
    published_at: datetime
    num_bytes: int


def check_name(name: str, kind: str = "name") -> str:
    """Returns `name` unchanged if it is allowed as a name of a team, category, version or alias.

    Args:
        kind: what the name belongs to, such as "team", for the message.

    Raises: RegistryError: the name is not allowed (see `is_valid_name`).
    """
    if not is_valid_name(name):
        raise RegistryError(f"{kind} {name!r}: expected {NAME_WORDS}")
    return name


class Registry:
    """A registry of published bundles in a local folder or under an s3:// URI. Many processes may use a registry at once.

    The object stores only the address. All methods raise `RegistryError` for a name of a team or category that is not allowed,
    and `DataError` (its subclass `StorageError`) if the storage fails.
    """

    def __init__(self, root: str | Path) -> None:
        """Stores the address of a registry, a local folder or an s3:// URI. The folder need not exist yet."""
        self.root = str(root).rstrip("/") if "://" in str(root) else str(Path(root).expanduser().absolute())

    # ---- reading
    def list_teams(self) -> list[str]:
        """Returns the names of all teams that have a folder in the registry. Folders whose name is not allowed are left out."""
        return _list_valid_names(self.root)

    def list_categories(self, team: str) -> list[str]:
        """Returns the names of a team's categories, including a category whose first version is still being published."""
        return _list_valid_names(join_path(self.root, check_name(team, "team")))

    def list_versions(self, team: str, category: str) -> list[Version]:
        """Returns the published versions of a category, oldest first; empty if there is no such team or category.

        A version with a damaged record file is logged and left out.
        """
        return [
            version
            for name in self._list_version_names(team, category)
            if (version := self._find_readable_version(team, category, name))
        ]

    def list_aliases(self, team: str, category: str) -> dict[str, str]:
        """Returns alias -> name of its version, for the aliases of a category. Leaves out an alias without a readable record."""
        states = self._read_alias_states(team, category).items()
        return {alias: state.target.version for alias, state in states if state.target}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        """Returns the published version that a version name or an alias stands for.

        Args: ref: version name, such as v0007, or alias; by default the latest version.

        Raises: RegistryError: a name is not allowed, there is no such version or alias (the message lists existing names), or
            the record file of the version is damaged (the message has the path of this file).
        """
        check_name(ref, "version or alias")
        name: str | None = ref
        if not _VERSION.fullmatch(ref):
            target = self._read_alias_state(team, category, ref).target
            name = target.version if target else None
        version = self._find_version(team, category, name) if name else None
        if version is None:
            raise RegistryError(self._describe_missing_version(team, category, ref))
        return version

    def read_change_marks(self, team: str) -> dict[str, str]:
        """Returns category -> mark, a text that changes with every change of the category's versions or aliases.

        Needs a single listing. While the mark of a category stays equal, its versions and aliases are unchanged. A category is
        missing in the result during a change, after a process died during a change, and if no change wrote a mark. The caller
        must then look up the versions and aliases of this category.
        """
        folder = join_path(self.root, check_name(team, "team"), _CHANGES)
        marks_of: defaultdict[str, list[str]] = defaultdict(list)
        for name in list_folder_entries(folder):
            category, _, mark = name.partition("@")
            marks_of[category].append(mark)
        # A change writes "done" before it deletes "begun", and S3 lists "begun" names first. So a listing of several pages
        # shows at least one of the two. A "done" mark is deleted only after a newer one exists, so a changed category never
        # gets an earlier mark again.
        return {
            category: " ".join(sorted(marks))
            for category, marks in marks_of.items()
            if is_valid_name(category) and all(mark.startswith(_DONE) for mark in marks)
        }

    # ---- writing
    def publish(
        self, bundle: str | Path, team: str, category: str | None = None, *, aliases: Sequence[str] = ()
    ) -> Version:
        """Copies a bundle into the registry under the next version number, and moves the alias `latest` forward to it.

        Args:
            bundle: folder of the bundle; every byte is verified.
            category: expected category of the bundle; None: any category.
            aliases: more aliases to move to the version after it is published.

        Returns: the published version.

        Raises:
            BundleError: the manifest of the bundle is missing or damaged.
            RegistryError: a tensor file of the bundle is missing or damaged, the bundle has another category, or a name is not
                allowed.
            RegistryError: copying took longer than `CLAIM_LASTS`, a garbage collection deleted the new version, or other
                processes were faster at every attempt.
            DataError: the registry cannot be read or written.
        """
        manifest = read_manifest(bundle)
        bundle_category = str(manifest["category"])
        if category not in (None, bundle_category):
            raise RegistryError(
                f"{bundle}: a bundle of category {bundle_category!r} cannot be published as {category!r}"
            )
        folder = self._get_category_folder(team, bundle_category)
        for alias in aliases:
            _check_alias_name(alias)
        name = self._claim_version_number(folder)
        claimed_at = datetime.now(timezone.utc)
        target = join_path(folder, name)
        try:
            num_bytes = copy_bundle(bundle, manifest, target)
        except BundleError as error:
            raise RegistryError(f"not published: {error}") from error
        now = datetime.now(timezone.utc)
        if now - claimed_at > CLAIM_LASTS:  # garbage collection may delete the files of an older claim
            remove_folder(target)
            raise RegistryError(
                f"{target}: copying the bundle took {now - claimed_at}, but the limit is {CLAIM_LASTS}: publish again"
            )
        record = {"sha256": manifest["sha256"], "published_at": now.isoformat(), "num_bytes": num_bytes}
        write_bytes(join_path(folder, "_published", f"{name}.json"), _encode_record(record))
        self._move_alias_to_version(team, bundle_category, LATEST, name, only_forward=True)
        for alias in aliases:
            self._move_alias_to_version(team, bundle_category, alias, name)
        return Version(team, bundle_category, name, target, str(manifest["sha256"]), now, num_bytes)

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        """Moves an alias to a version, creates the alias if it does not exist, and returns the version.

        Args: ref: name of the version, or another alias that names it.

        Raises: RegistryError: `ref` does not exist, a name is not allowed, the alias has the form of a version name, a garbage
            collection deleted the version meanwhile, or other processes moved the alias at every attempt.
        """
        _check_alias_name(alias)
        version = self.resolve(team, category, ref)
        self._move_alias_to_version(team, category, alias, version.name)
        return version

    def roll_back(self, team: str, category: str, alias: str) -> Version:
        """Moves an alias back to its previous version that still exists, and returns this version.

        Each further call goes back another step, up to `MAX_STEPS_BACK` steps.

        Raises: RegistryError: the alias does not exist or has no earlier version that still exists, a name is not allowed, or
            other processes moved the alias at every attempt.
        """
        _check_alias_name(alias)

        def choose_earlier_versions(state: _AliasState) -> list[str]:
            """Returns the earlier versions of the alias, latest first, from the first one that still exists."""
            if state.target is None:
                raise RegistryError(self._describe_missing_version(team, category, alias))
            earlier = list(
                dropwhile(lambda name: not self._find_readable_version(team, category, name), state.target.before)
            )
            if not earlier:
                raise RegistryError(
                    f"team {team!r}, category {category!r}: alias {alias!r} names {state.target.version}, and none of its "
                    f"earlier versions exists: promote another version; the category has "
                    f"{', '.join(self._list_version_names(team, category)) or 'none'}"
                )
            return earlier

        while True:  # again if a garbage collection deleted the version meanwhile
            _, versions = self._move_alias(team, category, alias, "rolled back", choose_earlier_versions)
            if (version := self._find_version(team, category, versions[0])) is not None:
                return version

    def collect_garbage(
        self,
        team: str,
        category: str,
        keep: int,
        *,
        min_age: timedelta = timedelta(hours=1),
        log: Callable[[str], None] = lambda message: None,
    ) -> list[str]:
        """Deletes old versions of a category, and the files of publications that did not finish within `2 * CLAIM_LASTS`.

        These versions stay: the newest `keep` versions, versions that are younger than `min_age` (a process may be loading
        them), and the current and the previous version of every alias. No version is deleted while the last record file of an
        alias is damaged, because the alias may name any version.

        Args:
            log: receives a message for each deletion.

        Returns: names of the deleted versions, without unfinished publications.

        Raises: RegistryError: `keep` is negative, or a name is not allowed.
        """
        if keep < 0:
            raise RegistryError(
                f"keep={keep}: expected 0 or more versions to keep in addition to versions with an alias"
            )
        folder = self._get_category_folder(team, category)
        now = datetime.now(timezone.utc)
        versions = self.list_versions(team, category)
        removed = []
        with self._announce_change(team, category) if versions else nullcontext():
            for version in versions[: max(0, len(versions) - keep)]:
                if now - version.published_at < min_age or self._is_named_by_alias(team, category, version.name):
                    continue
                marker = join_path(folder, "_published", f"{version.name}.json")
                record = read_bytes(marker, max_bytes=_MAX_RECORD_BYTES)
                remove_file(marker)
                # another process may have moved an alias here since the check above. It looks for the marker after its move,
                # so either it finds the marker missing, or this second check finds the alias.
                if self._is_named_by_alias(team, category, version.name):
                    write_bytes(marker, record)
                    continue
                remove_folder(version.uri)
                removed.append(version.name)
                log(f"{team}/{category}/{version.name}: deleted, {version.num_bytes} bytes")
        unpublished = set(list_folder_entries(folder)) - set(self._list_version_names(team, category))
        for name in _list_recorded_versions(join_path(folder, "_claims")):
            if name not in unpublished:
                continue
            claim = _read_record_or_log(join_path(folder, "_claims", f"{name}.json"), _VersionClaim)
            if claim and now - claim.at > 2 * CLAIM_LASTS and list_folder_entries(join_path(folder, name)):
                remove_folder(join_path(folder, name))
                log(f"{team}/{category}/{name}: deleted, its publisher never finished")
        return removed

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version:
        """Publishes a copy of a version with thresholds that a person chose, and returns the new version.

        The alias `latest` then names the new version.

        Args:
            image_threshold, pixel_threshold: None: the threshold of `version`.
            by: name of the person, for the provenance.

        Raises: DataError, BundleError, RegistryError: see `recalibrate.set_thresholds` and `publish`.
        """
        with tempfile.TemporaryDirectory() as folder:
            set_thresholds(version.uri, folder, image_threshold=image_threshold, pixel_threshold=pixel_threshold, by=by)
            return self.publish(folder, version.team, version.category)

    # ---- implementation
    def _get_category_folder(self, team: str, category: str) -> str:
        """Returns the path or URI of a category's folder. Raises: RegistryError: a name is not allowed."""
        return join_path(self.root, check_name(team, "team"), check_name(category, "category"))

    def _list_version_names(self, team: str, category: str) -> list[str]:
        """Returns the names of a category's published versions, oldest first. Does not read their record files."""
        return _list_recorded_versions(join_path(self._get_category_folder(team, category), "_published"))

    def _find_version(self, team: str, category: str, name: str) -> Version | None:
        """Returns a published version; None if it does not exist, or if its folder is a link to a place outside the team.

        Args: name: name of the version; None is returned if it does not have the form v0007.

        Raises: RegistryError: the record file of the version is damaged.
        """
        folder = self._get_category_folder(team, category)
        if not _VERSION.fullmatch(name) or leads_outside_root(join_path(folder, name), join_path(self.root, team)):
            return None
        try:
            record = _read_record(join_path(folder, "_published", f"{name}.json"), _PublishedRecord)
        except FileNotFoundError:
            return None
        return Version(
            team, category, name, join_path(folder, name), record.sha256, record.published_at, record.num_bytes
        )

    def _find_readable_version(self, team: str, category: str, name: str) -> Version | None:
        """Returns a published version as `_find_version` does, but for a damaged record file logs a warning and returns None."""
        try:
            return self._find_version(team, category, name)
        except RegistryError as error:
            _LOG.warning("left out: %s", error)
            return None

    def _claim_version_number(self, category_folder: str) -> str:
        """Reserves the next version number permanently, and returns the name of the version.

        Raises:
            RegistryError: other publishers took the next number at every attempt.
            DataError: the storage cannot be written.
        """
        folder = join_path(category_folder, "_claims")
        claimed = _list_recorded_versions(folder)
        first = _parse_number(claimed[-1]) + 1 if claimed else 1
        for number in range(first, first + _ATTEMPTS):
            name = f"v{number:04}"
            if write_bytes_if_absent(join_path(folder, f"{name}.json"), _encode_record({})):
                return name
        raise RegistryError(f"{category_folder}: other publishers took the next number at every attempt: publish again")

    def _read_alias_state(self, team: str, category: str, alias: str) -> _AliasState:
        """Returns the state of an alias from its last readable record file, among the last `MAX_STEPS_BACK` files."""
        folder = join_path(self._get_category_folder(team, category), "_aliases", alias)
        entries = sorted((name for name in list_folder_entries(folder) if _ENTRY.fullmatch(name)), key=_parse_number)
        number = _parse_number(entries[-1]) if entries else 0
        for steps, name in enumerate(reversed(entries[-MAX_STEPS_BACK:])):
            target = _read_record_or_log(join_path(folder, name), _AliasTarget)
            if target is not None:
                return _AliasState(number, target, steps > 0)
        return _AliasState(number, None, bool(entries))

    def _read_alias_states(self, team: str, category: str) -> dict[str, _AliasState]:
        """Returns alias -> its state, for all aliases of a category."""
        aliases = _list_valid_names(join_path(self._get_category_folder(team, category), "_aliases"))
        return {alias: self._read_alias_state(team, category, alias) for alias in aliases}

    def _move_alias_to_version(
        self, team: str, category: str, alias: str, name: str, only_forward: bool = False
    ) -> None:
        """Moves an alias to the published version `name`.

        Does nothing if the alias names this version already, unless its last record file is damaged.

        Args:
            only_forward: also do nothing if the alias names a newer version.

        Raises: RegistryError: the version was deleted during the move, or other processes moved the alias at every attempt.
        """

        def choose_versions(state: _AliasState) -> list[str]:
            """Returns `name`, followed by the earlier versions of the alias, latest first; an empty list: no move."""
            if state.target is None:
                return [name]
            current, before = state.target.version, state.target.before
            is_ahead = only_forward and _parse_number(current) > _parse_number(name)
            if (current == name and not state.is_damaged) or is_ahead:
                return []
            return [name, *before] if current == name else [name, current, *before]

        number, versions = self._move_alias(team, category, alias, "promoted", choose_versions)
        # a garbage collection may have deleted the version before it could see the new alias record: undo the move
        if versions and self._find_version(team, category, name) is None:
            if earlier := versions[1:]:
                self._create_alias_record(team, category, alias, number + 1, earlier, "rolled back")
            raise RegistryError(
                f"{team}/{category}/{name}: a garbage collection deleted the version during its promotion"
            )

    def _move_alias(
        self, team: str, category: str, alias: str, action: str, choose: Callable[[_AliasState], list[str]]
    ) -> tuple[int, list[str]]:
        """Moves an alias by a new record file with the next number. Tries the next number again if another process took it.

        Args:
            action: "promoted" or "rolled back", stored in the file for people.
            choose: receives the state of the alias, and returns the version that the alias moves to, followed by its earlier
                versions, latest first; an empty list: no move.

        Returns: (number of the new record file, the list from `choose`); the number is 0 without a move.

        Raises: RegistryError: other processes moved the alias at every attempt.
        """
        for _ in range(_ATTEMPTS):
            state = self._read_alias_state(team, category, alias)
            versions = choose(state)
            if not versions:
                return 0, versions
            if self._create_alias_record(team, category, alias, state.number + 1, versions, action):
                return state.number + 1, versions
        raise RegistryError(
            f"alias {alias!r} of {team}/{category}: other processes moved it at every attempt: try again"
        )

    def _create_alias_record(
        self, team: str, category: str, alias: str, number: int, versions: Sequence[str], action: str
    ) -> bool:
        """Creates the record file `number` of an alias. Returns False if another process has created this file before.

        Args:
            versions: the version that the alias moves to, followed by its earlier versions, latest first.
            action: see `_move_alias`.

        Raises: DataError: the file or a mark (`_announce_change`) cannot be written.
        """
        record = {"version": versions[0], "before": versions[1 : MAX_STEPS_BACK + 1], "action": action}
        file = join_path(self._get_category_folder(team, category), "_aliases", alias, f"{number:08}.json")
        with self._announce_change(team, category):
            return write_bytes_if_absent(file, _encode_record(record))

    @contextmanager
    def _announce_change(self, team: str, category: str) -> Iterator[None]:
        """Context manager: announces a change of versions or aliases of a category to readers of `read_change_marks`.

        It writes a file "begun" before the body and a file "done" after the body, and then deletes "begun" and older marks.

        Raises: DataError: the marks cannot be listed, or "begun" cannot be written. The body of the context then does not run.
        """
        folder = join_path(self.root, team, _CHANGES)
        now, token = datetime.now(timezone.utc), uuid.uuid4().hex
        # an older "begun" belongs to a process that died; a younger one to a process that is still changing the category
        prefix = f"{category}@"
        done_prefix, oldest_live_mark = f"{prefix}{_DONE}", f"{prefix}{_BEGUN}{now - 2 * CLAIM_LASTS:{_TIME}}"
        marks = [name for name in list_folder_entries(folder) if name.startswith(prefix)]
        obsolete_marks = [name for name in marks if name.startswith(done_prefix) or name < oldest_live_mark]
        begun = f"{prefix}{_BEGUN}{now:{_TIME}}-{token}.json"
        record = _encode_record({})
        write_bytes(join_path(folder, begun), record)
        try:
            yield
        finally:
            # the change is complete, so errors are ignored: a remaining "begun" only makes readers look up the category
            with suppress(DataError):
                write_bytes(join_path(folder, f"{done_prefix}{token}.json"), record)
                for name in [begun, *obsolete_marks]:
                    with suppress(DataError):  # another process deleted the mark, or this process may not delete files
                        remove_file(join_path(folder, name))

    def _is_named_by_alias(self, team: str, category: str, version: str) -> bool:
        """Returns whether an alias names the version, named it before its last move, or has a damaged last record file."""
        return any(
            is_damaged or (target is not None and version in [target.version, *target.before[:1]])
            for _, target, is_damaged in self._read_alias_states(team, category).values()
        )

    def _describe_missing_version(self, team: str, category: str, ref: str) -> str:
        """Returns an error message for an unknown version or alias `ref`.

        It lists the aliases and the ten newest versions of the category, or says that nothing is published.
        """
        names, aliases = self._list_version_names(team, category), self.list_aliases(team, category)
        if not names:
            return f"{self.root}: nothing is published for team {team!r}, category {category!r}"
        existing_names = ", ".join([*names[-10:], *sorted(aliases)])
        older = f" and {len(names) - 10} older" if len(names) > 10 else ""
        return f"team {team!r}, category {category!r} has no {ref!r}; there are {existing_names}{older}"


def _check_alias_name(alias: str) -> None:
    """Checks the name of an alias before a change.

    Raises: RegistryError: the name is not allowed, or is v with digits, like the name of a version.
    """
    check_name(alias, "alias")
    if re.fullmatch(r"v[0-9]+", alias):
        raise RegistryError(f"alias {alias!r}: v with digits is the name of a version: give another name")


def _list_valid_names(folder: str) -> list[str]:
    """Returns the names in a folder that are allowed as names of teams, categories and aliases."""
    return [name for name in list_folder_entries(folder) if is_valid_name(name)]


def _list_recorded_versions(folder: str) -> list[str]:
    """Returns the names of the versions that have a JSON file in a folder (v0007 for v0007.json), in ascending order."""
    names = (name.removesuffix(".json") for name in list_folder_entries(folder))
    return sorted((name for name in names if _VERSION.fullmatch(name)), key=_parse_number)


def _parse_number(name: str) -> int:
    """Returns the number in the name of a version or of an alias record file, such as 7 for v0007 and for 00000007.json."""
    return int(name.removeprefix("v").removesuffix(".json"))


def _encode_record(entries: dict[str, Any]) -> bytes:
    """Returns a record file: the entries, time and user@machine for people, and a random token, as a line of JSON.

    The token makes the content unique, which `write_bytes_if_absent` needs.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        user = "unknown"
    now = datetime.now(timezone.utc).isoformat()
    record = {**entries, "at": now, "by": f"{user}@{socket.gethostname()}", "token": uuid.uuid4().hex}
    return (json.dumps(record) + "\n").encode()


def _read_record(uri: str, kind: type[_Record]) -> _Record:
    """Reads and validates a record file of the registry.

    Args: kind: class of the content.

    Raises:
        FileNotFoundError: the file does not exist.
        RegistryError: the file is damaged or has more than `_MAX_RECORD_BYTES`.
        StorageError: the storage fails.
    """
    try:
        return kind.model_validate_json(read_bytes(uri, max_bytes=_MAX_RECORD_BYTES))
    except StorageError:
        raise
    except (ValidationError, DataError) as error:  # DataError: the file is too large
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'the whole record'}: {first['msg']}"
        raise RegistryError(
            f"{uri}: this record of the registry is damaged ({reason}): write it again or delete it"
        ) from None


def _read_record_or_log(uri: str, kind: type[_Record]) -> _Record | None:
    """Reads a record file as `_read_record` does, but for a damaged or missing file logs a warning and returns None.

    Raises: StorageError: the storage fails.
    """
    try:
        return _read_record(uri, kind)
    except (RegistryError, FileNotFoundError) as error:
        _LOG.warning("left out: %s", error)
        return None
