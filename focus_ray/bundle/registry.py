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

Who reads often lists a team's `_changes`, one request a thousand categories, and looks up only what has changed (`marks`).
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from focus_ray.bundle.bundle import copy_bundle, read_manifest
from focus_ray.bundle.recalibrate import set_thresholds
from focus_ray.errors import BundleError, DataError, RegistryError
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
_VERSION = re.compile(r"v[0-9]{4,}")
_ENTRY = re.compile(r"[0-9]{8}\.json")
_BEGUN, _DONE = "begun-", "done-"  # a listing comes in this order: see `marks`
_ATTEMPTS = 1000  # at a number that others take first; each failure means that someone else has come through


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
        """Oldest first; empty where there is no such team or category."""
        return [version for name in self._names(team, category) if (version := self._find(team, category, name))]

    def aliases(self, team: str, category: str) -> dict[str, str]:
        """Alias -> version name."""
        folder = join(self._place(team, category), "_aliases")
        heads = ((name, self._head(team, category, name)) for name in list_names(folder) if is_name(name))
        return {name: str(entry["version"]) for name, (_, entry) in heads if entry}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        """What a version name or an alias stands for.

        Raises: RegistryError: nothing; it says what is there.
        """
        check_name(ref, "version or alias")
        name = ref
        if not _VERSION.fullmatch(ref):
            _, entry = self._head(team, category, ref)
            if not entry:
                raise RegistryError(self._absent(team, category, ref))
            name = str(entry["version"])
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
            number, entry = self._head(team, category, alias)
            if not entry:
                raise RegistryError(self._absent(team, category, alias))
            former = list(entry["before"])
            while former and self._find(team, category, former[0]) is None:
                former.pop(0)
            if not former:
                raise RegistryError(
                    f"team {team!r}, category {category!r}: alias {alias!r} names {entry['version']} and no version "
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
        names, and what it would roll back to.

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
                if now - version.published_at < min_age or version.name in self._named(team, category):
                    continue
                marker = join(place, "_published", f"{version.name}.json")
                record = read_bytes(marker)
                remove_file(marker)
                # an alias may have been moved here meanwhile: its mover looks for the marker after it has moved the alias
                if version.name in self._named(team, category):
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
                claim = json.loads(read_bytes(join(place, "_claims", file)))
                if now - datetime.fromisoformat(claim["at"]) > 2 * CLAIM_LASTS and list_names(join(place, name)):
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
        """A published version; None where there is none, or where its name or a link in it leads out of the team's folder."""
        place = self._place(team, category)
        if not _VERSION.fullmatch(name) or leads_out(join(place, name), join(self.root, team)):
            return None
        try:
            record = _decode(join(place, "_published", f"{name}.json"))
        except FileNotFoundError:
            return None
        published_at = datetime.fromisoformat(record["published_at"])
        return Version(team, category, name, join(place, name), record["sha256"], published_at, record["num_bytes"])

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

    def _head(self, team: str, category: str, alias: str) -> tuple[int, dict[str, Any]]:
        """The alias's last entry and its number; 0 and nothing where there is no such alias."""
        folder = join(self._place(team, category), "_aliases", alias)
        entries = [name for name in list_names(folder) if _ENTRY.fullmatch(name)]
        return (int(entries[-1][:8]), _decode(join(folder, entries[-1]))) if entries else (0, {})

    def _move(self, team: str, category: str, alias: str, name: str, only_forward: bool = False) -> None:
        """Points an alias at a published version. Raises: RegistryError: the version was deleted meanwhile."""
        for _ in range(_ATTEMPTS):
            number, entry = self._head(team, category, alias)
            current = entry.get("version")
            if current == name or (only_forward and current is not None and _number(current) > _number(name)):
                return
            former = [current, *entry["before"]] if current else []
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

    def _named(self, team: str, category: str) -> set[str]:
        """Versions that an alias names or would roll back to."""
        folder = join(self._place(team, category), "_aliases")
        named: set[str] = set()
        for alias in list_names(folder):
            if is_name(alias):
                _, entry = self._head(team, category, alias)
                named.update([entry["version"], *entry["before"][:1]] if entry else [])
        return named

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


def _decode(uri: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(read_bytes(uri))
    except ValueError as error:
        raise RegistryError(f"{uri}: not valid JSON ({error}): the registry is damaged here") from None
    return record
