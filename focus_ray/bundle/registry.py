"""The registry: published bundles by team and category, numbered for ever, with aliases that move in one step and back.

    <root>/<team>/<category>/
      v0007/                            the bundle, as training wrote it
      _claims/v0007.json                who took the number; stays when the version goes, so no number is given twice
      _published/v0007.json             makes the version count; written last
      _aliases/production/00000003.json the alias's third target and those before it; the highest number counts
    <root>/<team>/_changes/
      bolt@begun-20260131T120000-<token>.json  someone is changing what a name of the category stands for
      bolt@done-<token>.json                   when that was last done; goes once a newer one is there

Every file is created and never written over, and claims and alias entries are created on the condition that there is none
(a hard link on a disk, `If-None-Match: *` on S3). So of several publishers each gets a number of its own, of several that
move one alias each sees the others' moves, and readers see a version whole or not at all. There is no lock to be left behind.

A record may be damaged, by a disk, a person or an attacker. Lists leave it out and log its path, an alias stands for what it
named before, and only who asks for that very version gets an error, which names the record.

Who reads often lists a team's `_changes`, one request a thousand categories, and looks up only what has changed (`marks`).
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, StrictInt, StrictStr, ValidationError

from focus_ray.bundle.bundle import copy_bundle, read_manifest
from focus_ray.bundle.recalibrate import set_thresholds
from focus_ray.errors import BundleError, DataError, RegistryError, StorageError
from focus_ray.names import NAME_WORDS, is_name
from focus_ray.storage import (
    create_bytes,
    join,
    leads_out,
    list_names,
    read_bytes,
    remove_file,
    remove_folder,
    write_bytes,
)

LATEST = "latest"
MAX_STEPS_BACK = 32  # an alias remembers so many former targets
CLAIM_LASTS = timedelta(hours=12)  # a publisher that takes longer is refused; its leftovers go after twice as long
_CHANGES, _TIME = "_changes", "%Y%m%dT%H%M%S"
_MAX_RECORD_BYTES = 65536  # a record of this registry has 2 KiB at most
_VERSION = re.compile(r"v[0-9]{4,18}")
_ENTRY = re.compile(r"[0-9]{8,18}\.json")
_BEGUN, _DONE = "begun-", "done-"  # a listing comes in this order: see `marks`
_ATTEMPTS = 1000  # at a number that others take first; each failure means that someone else has come through

_LOG = logging.getLogger(__name__)
_VersionName = Annotated[StrictStr, Field(pattern=f"^{_VERSION.pattern}$")]


class _Publication(BaseModel):
    """A record of `_published`."""

    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
    published_at: AwareDatetime
    num_bytes: Annotated[StrictInt, Field(ge=0, lt=2**63)]


class _Target(BaseModel):
    """A record of `_aliases`."""

    version: _VersionName
    before: list[_VersionName]


class _Claim(BaseModel):
    """A record of `_claims`."""

    at: AwareDatetime


_Record = TypeVar("_Record", bound=BaseModel)


class _Head(NamedTuple):
    """Where an alias stands. number: of its last record, 0 without one.  target: of the last record that can be read.

    is_damaged: whether the last record cannot.
    """

    number: int
    target: _Target | None
    is_damaged: bool


@dataclass(frozen=True)
class Version:
    """A published bundle.

    uri: the bundle's directory, for `Inspector.load`.  sha256: of its manifest, `Bundle.version`.  published_at: UTC.
    """

    team: str
    category: str
    name: str
    uri: str
    sha256: str
    published_at: datetime
    num_bytes: int


def check_name(name: str, what: str = "name") -> str:
    """Returns: the name. Raises: RegistryError: it is none of team, category, version or alias."""
    if not is_name(name):
        raise RegistryError(f"{what} {name!r}: expected {NAME_WORDS}")
    return name


class Registry:
    """The registry under a local path or s3:// URI. Holds no state but the place; safe to use from many processes."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") if "://" in str(root) else str(Path(root).expanduser().absolute())

    # ---- reading
    def teams(self) -> list[str]:
        return [name for name in list_names(self.root) if is_name(name)]

    def categories(self, team: str) -> list[str]:
        """Those that something was published to, or is being published to for the first time."""
        return [name for name in list_names(join(self.root, check_name(team, "team"))) if is_name(name)]

    def versions(self, team: str, category: str) -> list[Version]:
        """Oldest first; empty where there is no such team or category. A damaged record is logged and left out."""
        return [
            version for name in self._names(team, category) if (version := self._find_readable(team, category, name))
        ]

    def aliases(self, team: str, category: str) -> dict[str, str]:
        """Alias -> version name."""
        folder = join(self._place(team, category), "_aliases")
        heads = ((name, self._head(team, category, name)) for name in list_names(folder) if is_name(name))
        return {name: head.target.version for name, head in heads if head.target}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        """What a version name or an alias stands for.

        Raises: RegistryError: nothing; it says what is there. Or the version's record is damaged; its path is told.
        """
        check_name(ref, "version or alias")
        name = ref
        if not _VERSION.fullmatch(ref):
            target = self._head(team, category, ref).target
            if target is None:
                raise RegistryError(self._absent(team, category, ref))
            name = target.version
        version = self._find(team, category, name)
        if version is None:
            raise RegistryError(self._absent(team, category, ref))
        return version

    def marks(self, team: str) -> dict[str, str]:
        """Category -> its mark: while it stays, every name of the category stands for what it did. One listing.

        A category has none while someone changes it (or died doing so), and where it was last changed by a focus_ray that
        made no marks; it has to be looked up.
        """
        folder = join(self.root, check_name(team, "team"), _CHANGES)
        found: dict[str, list[str]] = {}
        for category, kind in (_split_mark(name) for name in list_names(folder)):
            if is_name(category):
                found.setdefault(category, []).append(kind)
        # The mark of a change is done before its beginning goes, and S3 lists in the names' order, beginnings first: so a
        # listing of several pages shows one of the two. A mark goes only for a newer one, so what changed never looks as before.
        return {
            category: " ".join(sorted(kinds))
            for category, kinds in found.items()
            if all(kind.startswith(_DONE) for kind in kinds)
        }

    # ---- writing
    def publish(
        self, bundle: str | Path, team: str, category: str | None = None, *, aliases: Sequence[str] = ()
    ) -> Version:
        """Copies a bundle in, verified byte by byte, under the next number, and then moves `latest` forward to it.

        Args:
            bundle: a bundle's directory.  category: refuse a bundle of another one; None takes the bundle's own.
            aliases: moved too, once the version is there.

        Raises: BundleError: damaged or no bundle.  RegistryError: of another category, or a name that cannot be.
        """
        manifest = read_manifest(bundle)
        own = str(manifest["category"])
        if category not in (None, own):
            raise RegistryError(f"{bundle}: a bundle of category {own!r} cannot be published as {category!r}")
        place = self._place(team, own)
        for alias in aliases:
            _check_alias(alias)
        name = self._claim(place)
        claimed = datetime.now(timezone.utc)
        target = join(place, name)
        try:
            num_bytes = copy_bundle(bundle, manifest, target)
        except BundleError as error:
            raise RegistryError(f"not published: {error}") from error
        now = datetime.now(timezone.utc)
        if now - claimed > CLAIM_LASTS:
            remove_folder(target)
            raise RegistryError(f"{target}: copying took {now - claimed}, {CLAIM_LASTS} at most: publish again")
        record = {"sha256": manifest["sha256"], "published_at": now.isoformat(), "num_bytes": num_bytes, **_author()}
        write_bytes(join(place, "_published", f"{name}.json"), _encode(record))
        self._move(team, own, LATEST, name, only_forward=True)
        for alias in aliases:
            self._move(team, own, alias, name)
        return Version(team, own, name, target, str(manifest["sha256"]), now, num_bytes)

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        """Points an alias at a version, or at what another alias stands for.

        Raises: RegistryError: `ref` is not there, or the alias's name is a version's.
        """
        _check_alias(alias)
        version = self.resolve(team, category, ref)
        self._move(team, category, alias, version.name)
        return version

    def roll_back(self, team: str, category: str, alias: str) -> Version:
        """Points an alias at what it named before its last promotion; once more, at what it named before that.

        Raises: RegistryError: no such alias, or no former version is left.
        """
        _check_alias(alias)
        for _ in range(_ATTEMPTS):
            number, target, _ = self._head(team, category, alias)
            if target is None:
                raise RegistryError(self._absent(team, category, alias))
            former = list(target.before)
            while former and self._find_readable(team, category, former[0]) is None:
                former.pop(0)
            if not former:
                raise RegistryError(
                    f"team {team!r}, category {category!r}: alias {alias!r} names {target.version} and no version "
                    f"that it named before is left: promote one of "
                    f"{', '.join(self._names(team, category)) or 'none'}"
                )
            if self._append(team, category, alias, number + 1, former[0], former[1:], "rolled back"):
                version = self._find(team, category, former[0])
                if version is not None:
                    return version
        raise RegistryError(f"alias {alias!r} of {team}/{category} kept being moved by others: try again")

    def collect_garbage(
        self,
        team: str,
        category: str,
        keep: int,
        *,
        min_age: timedelta = timedelta(hours=1),
        log: Callable[[str], None] = lambda message: None,
    ) -> list[str]:
        """Deletes old versions, and what publishers that died have left.

        Kept are the `keep` newest, those published less than `min_age` ago (someone may be loading them), what an alias
        names, and what it would roll back to. While the last record of an alias is damaged, nothing is deleted: nobody knows what
        the alias names.

        Returns: the names of the versions that went.
        """
        if keep < 0:
            raise RegistryError(f"keep={keep}: expected 0 or more versions to keep besides those that an alias names")
        place = self._place(team, category)
        now = datetime.now(timezone.utc)
        versions = self.versions(team, category)
        removed = []
        with self._changing(team, category) if versions else nullcontext():
            for version in versions[: max(0, len(versions) - keep)]:
                if now - version.published_at < min_age or self._is_named(team, category, version.name):
                    continue
                marker = join(place, "_published", f"{version.name}.json")
                record = read_bytes(marker, max_bytes=_MAX_RECORD_BYTES)
                remove_file(marker)
                # an alias may have been moved here meanwhile: its mover looks for the marker after it has moved the alias
                if self._is_named(team, category, version.name):
                    write_bytes(marker, record)
                    continue
                remove_folder(version.uri)
                removed.append(version.name)
                log(f"{team}/{category}/{version.name}: deleted, {version.num_bytes} bytes")
        published = set(self._names(team, category))
        folders = set(list_names(place))
        for file in list_names(join(place, "_claims")):
            name = file.removesuffix(".json")
            if _VERSION.fullmatch(name) and name in folders - published:
                claim = _read_or_log(join(place, "_claims", file), _Claim)
                if claim and now - claim.at > 2 * CLAIM_LASTS and list_names(join(place, name)):
                    remove_folder(join(place, name))
                    log(f"{team}/{category}/{name}: deleted, never finished by its publisher")
        return removed

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version:
        """Publishes a version's model under thresholds that a person chose, as the next version.

        Raises: DataError, BundleError, RegistryError: as `recalibrate.set_thresholds` and `publish`.
        """
        with tempfile.TemporaryDirectory() as folder:
            set_thresholds(version.uri, folder, image_threshold=image_threshold, pixel_threshold=pixel_threshold, by=by)
            return self.publish(folder, version.team, version.category)

    # ---- within
    def _place(self, team: str, category: str) -> str:
        return join(self.root, check_name(team, "team"), check_name(category, "category"))

    def _names(self, team: str, category: str) -> list[str]:
        """Published versions, oldest first."""
        found = (name.removesuffix(".json") for name in list_names(join(self._place(team, category), "_published")))
        return sorted((name for name in found if _VERSION.fullmatch(name)), key=_number)

    def _find(self, team: str, category: str, name: str) -> Version | None:
        """Returns a published version, or None if there is none or if its name or a link in it leads out of the team's folder.

        Raises: RegistryError: its record is damaged.
        """
        place = self._place(team, category)
        if not _VERSION.fullmatch(name) or leads_out(join(place, name), join(self.root, team)):
            return None
        try:
            record = _read_record(join(place, "_published", f"{name}.json"), _Publication)
        except FileNotFoundError:
            return None
        return Version(team, category, name, join(place, name), record.sha256, record.published_at, record.num_bytes)

    def _find_readable(self, team: str, category: str, name: str) -> Version | None:
        """As `_find`; None too where the record is damaged, which is logged."""
        try:
            return self._find(team, category, name)
        except RegistryError as error:
            _LOG.warning("left out: %s", error)
            return None

    def _claim(self, place: str) -> str:
        """Takes the next number for good. Returns: the version's name."""
        folder = join(place, "_claims")
        names = (name.removesuffix(".json") for name in list_names(folder))
        number = max((_number(name) for name in names if _VERSION.fullmatch(name)), default=0)
        for _ in range(_ATTEMPTS):
            number += 1
            name = f"v{number:04}"
            record = {"at": datetime.now(timezone.utc).isoformat(), **_author()}
            if create_bytes(join(folder, f"{name}.json"), _encode(record)):
                return name
        raise RegistryError(f"{place}: other publishers kept taking the next number: publish again")

    def _head(self, team: str, category: str, alias: str) -> _Head:
        """Reads the alias's last record, and while records are damaged the record before, `MAX_STEPS_BACK` at most."""
        folder = join(self._place(team, category), "_aliases", alias)
        entries = sorted((name for name in list_names(folder) if _ENTRY.fullmatch(name)), key=_entry_number)
        number = _entry_number(entries[-1]) if entries else 0
        for steps, name in enumerate(reversed(entries[-MAX_STEPS_BACK:])):
            target = _read_or_log(join(folder, name), _Target)
            if target is not None:
                return _Head(number, target, steps > 0)
        return _Head(number, None, bool(entries))

    def _move(self, team: str, category: str, alias: str, name: str, only_forward: bool = False) -> None:
        """Points an alias at a published version. Raises: RegistryError: the version was deleted meanwhile."""
        for _ in range(_ATTEMPTS):
            number, target, is_damaged = self._head(team, category, alias)
            current = target.version if target else None
            is_ahead = only_forward and current is not None and _number(current) > _number(name)
            if (current == name and not is_damaged) or is_ahead:
                return
            former: list[str] = []
            if target is not None:
                former = target.before if current == name else [target.version, *target.before]
            if self._append(team, category, alias, number + 1, name, former, "promoted"):
                break
        else:
            raise RegistryError(f"alias {alias!r} of {team}/{category} kept being moved by others: try again")
        if self._find(team, category, name) is None:
            if former:
                self._append(team, category, alias, number + 2, former[0], former[1:], "rolled back")
            raise RegistryError(f"{team}/{category}/{name}: deleted by a garbage collection while it was promoted")

    def _append(
        self, team: str, category: str, alias: str, number: int, name: str, former: Sequence[str], action: str
    ) -> bool:
        """Whether the entry could be made: False where another has taken the number."""
        record = {
            "version": name,
            "before": list(former[:MAX_STEPS_BACK]),
            "action": action,
            "at": datetime.now(timezone.utc).isoformat(),
            **_author(),
        }
        place = join(self._place(team, category), "_aliases", alias, f"{number:08}.json")
        with self._changing(team, category):
            return create_bytes(place, _encode(record))

    @contextmanager
    def _changing(self, team: str, category: str) -> Iterator[None]:
        """Around all that changes what a name stands for: marks the category before and after (`marks`).

        Raises: DataError: the beginning cannot be marked; nothing is changed then.
        """
        folder = join(self.root, team, _CHANGES)
        now, token = datetime.now(timezone.utc), uuid.uuid4().hex
        # a beginning that is older was left by one who died; a younger one is another's, who is still at it
        dead = f"{_BEGUN}{now - 2 * CLAIM_LASTS:{_TIME}}"
        former = [
            name
            for name in list_names(folder)
            for of, kind in [_split_mark(name)]
            if of == category and (kind.startswith(_DONE) or kind < dead)
        ]
        begun = f"{category}@{_BEGUN}{now:{_TIME}}-{token}.json"
        record = _encode({"at": now.isoformat(), **_author()})
        write_bytes(join(folder, begun), record)
        try:
            yield
        finally:
            # what was to be changed is changed by now; with a beginning left behind readers only look up more often
            with suppress(DataError):
                write_bytes(join(folder, f"{category}@{_DONE}{token}.json"), record)
                for name in [begun, *former]:
                    with suppress(DataError):  # another has deleted it first, or this identity may not delete
                        remove_file(join(folder, name))

    def _is_named(self, team: str, category: str, version: str) -> bool:
        """Whether an alias names a version or would roll back to it; true too while the last record of an alias is damaged."""
        aliases = [name for name in list_names(join(self._place(team, category), "_aliases")) if is_name(name)]
        for _, target, is_damaged in (self._head(team, category, alias) for alias in aliases):
            if is_damaged or (target and version in [target.version, *target.before[:1]]):
                return True
        return False

    def _absent(self, team: str, category: str, ref: str) -> str:
        names, aliases = self._names(team, category), self.aliases(team, category)
        if not names:
            return f"{self.root}: nothing is published for team {team!r}, category {category!r}"
        known = ", ".join([*names[-10:], *sorted(aliases)])
        more = f" and {len(names) - 10} older" if len(names) > 10 else ""
        return f"team {team!r}, category {category!r} has no {ref!r}; there are {known}{more}"


def _check_alias(alias: str) -> None:
    check_name(alias, "alias")
    if re.fullmatch(r"v[0-9]+", alias):
        raise RegistryError(f"alias {alias!r}: v and digits name a version: give another name")


def _split_mark(name: str) -> tuple[str, str]:
    """A file of `_changes`: its category, and which mark it is."""
    category, _, kind = name.partition("@")
    return category, kind


def _number(version: str) -> int:
    return int(version[1:])


def _author() -> dict[str, str]:
    """Who and where, for people; and a random part, which `create_bytes` needs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return {"by": f"{user}@{socket.gethostname()}", "token": uuid.uuid4().hex}


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _entry_number(file: str) -> int:
    return int(file.removesuffix(".json"))


def _read_record(uri: str, kind: type[_Record]) -> _Record:
    """Raises: FileNotFoundError: none there.  RegistryError: the record is damaged.  StorageError: the storage fails."""
    try:
        return kind.model_validate_json(read_bytes(uri, max_bytes=_MAX_RECORD_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole record"
        reason = f"{place}: {first['msg']}"
    except StorageError:
        raise
    except DataError as error:  # too large
        reason = str(error)
    raise RegistryError(f"{uri}: a damaged record of the registry ({reason}): write it anew or delete it")


def _read_or_log(uri: str, kind: type[_Record]) -> _Record | None:
    """As `_read_record`; None where the record is damaged or gone, which is logged."""
    try:
        return _read_record(uri, kind)
    except (RegistryError, FileNotFoundError) as error:
        _LOG.warning("left out: %s", error)
        return None
