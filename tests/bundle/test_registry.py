"""The registry on a disk and on a real S3 server: concurrent publishers lose nothing, and aliases move and roll back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import S3Server
from worker_processes import get_fork_context

from focus_ray.bundle import registry as registry_module
from focus_ray.bundle.bundle import MANIFEST, read_bundle, read_manifest
from focus_ray.bundle.published import find_bundles_in_folder_or_registry
from focus_ray.bundle.registry import CLAIM_LASTS, Registry, check_name
from focus_ray.cli.main import main
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.storage.files import join_path, list_folder_entries, read_bytes, write_bytes, write_bytes_if_absent

NO_AGE = timedelta(0)
GEAR = "press", "gear"


@pytest.fixture(scope="module")
def bundle(part_bundles: dict[str, str]) -> str:
    return part_bundles["gear"]


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return Registry(server.new_uri())
    return Registry(tmp_path / "registry")


@pytest.fixture
def three(tmp_path: Path, bundle: str) -> Registry:
    """A registry with three versions."""
    registry = Registry(tmp_path / "registry")
    for _ in range(3):
        registry.publish(bundle, "press")
    return registry


def names(registry: Registry) -> list[str]:
    return [version.name for version in registry.list_versions(*GEAR)]


def roll_back(registry: Registry, alias: str = "production") -> str:
    return registry.roll_back(*GEAR, alias).name


def test_a_registry_resolves_to_the_bundles_of_a_version_or_alias(
    registry: Registry, part_bundles: dict[str, str]
) -> None:
    gear, board = part_bundles["gear"], part_bundles["board"]
    registry.publish(gear, "press", "gear", aliases=["production"])
    registry.publish(gear, "press", "gear")
    registry.publish(board, "press", "board")
    team, first = join_path(registry.root, "press"), join_path(registry.root, "press/gear/v0001")
    expected = {"gear": join_path(team, "gear/v0002"), "board": join_path(team, "board/v0001")}
    assert find_bundles_in_folder_or_registry(team) == find_bundles_in_folder_or_registry(registry.root) == expected
    messages: list[str] = []
    assert find_bundles_in_folder_or_registry(team, "production", messages.append) == {"gear": first}
    assert messages[0].startswith("press/board: left out: ")
    registry.publish(gear, "weld", "gear")
    with pytest.raises(DataError, match=r"several teams have a category 'gear': .*/weld"):
        find_bundles_in_folder_or_registry(registry.root)


def test_a_place_without_bundles_or_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no bundle here: .*, or a registry"):
        find_bundles_in_folder_or_registry(str(tmp_path))


# Publishing


def test_a_published_bundle_equals_the_trained_bundle(registry: Registry, bundle: str) -> None:
    version = registry.publish(bundle, "press", "gear", aliases=["candidate"])
    assert (version.team, version.category, version.name) == (*GEAR, "v0001")
    assert read_manifest(version.uri) == read_manifest(bundle)
    assert read_bundle(version.uri).version == version.sha256
    assert version.num_bytes == sum(
        len(read_bytes(join_path(version.uri, name))) for name in list_folder_entries(version.uri)
    )
    assert [registry.resolve(*GEAR, ref) for ref in ("latest", "candidate", "v0001")] == [version] * 3
    assert (registry.list_teams(), registry.list_categories("press")) == (["press"], ["gear"])
    assert registry.list_aliases(*GEAR) == {"latest": "v0001", "candidate": "v0001"}
    assert registry.list_versions(*GEAR) == [version]


def test_each_publication_has_the_next_number_and_latest_follows(registry: Registry, bundle: str) -> None:
    for number in (1, 2, 3):
        registry.publish(bundle, "press")
        assert registry.resolve(*GEAR).name == f"v000{number}"
    assert names(registry) == ["v0001", "v0002", "v0003"]
    assert registry.list_versions("weld", "gear") == []


def change_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(("damage", "message"), [(change_last_byte, "changed or cut short"), (Path.unlink, "missing")])
def test_a_damaged_bundle_is_not_published(
    tmp_path: Path, bundle: str, damage: Callable[[Path], Any], message: str
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (path,) = copy.glob("density-*")
    damage(path)
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match=f"not published: .*{message}"):
        registry.publish(copy, "press")
    assert registry.list_versions(*GEAR) == []
    with pytest.raises(RegistryError, match="nothing is published for team 'press', category 'gear'"):
        registry.resolve(*GEAR)


def test_a_bundle_of_another_category_or_no_bundle_is_not_published(tmp_path: Path, bundle: str) -> None:
    with pytest.raises(RegistryError, match="category 'gear' cannot be published as 'bolt'"):
        Registry(tmp_path).publish(bundle, "press", "bolt")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Registry(tmp_path).publish(tmp_path, "press")
    assert list(tmp_path.iterdir()) == []


def test_a_version_is_visible_only_when_it_is_complete(registry: Registry, bundle: str) -> None:
    registry.publish(bundle, "press")
    place = join_path(registry.root, *GEAR)
    assert write_bytes_if_absent(join_path(place, "_claims", "v0002.json"), b'{"at": "2000-01-01T00:00:00+00:00"}')
    write_bytes(join_path(place, "v0002", MANIFEST), read_bytes(join_path(bundle, MANIFEST)))
    assert names(registry) == ["v0001"]
    with pytest.raises(RegistryError, match=r"has no 'v0002'; there are v0001, latest"):
        registry.resolve(*GEAR, "v0002")
    assert registry.publish(bundle, "press").name == "v0003"


def publish_twice(root: str, bundle: str, environment: dict[str, str], start: Barrier, names: SimpleQueue[str]) -> None:
    """Publishes two versions in a process of its own, after all publishers have reached the barrier."""
    os.environ.update(environment)
    start.wait(60)
    for _ in range(2):
        names.put(Registry(root).publish(bundle, "press", aliases=["production"]).name)


def test_concurrent_publishers_lose_no_version(registry: Registry, bundle: str) -> None:
    context = get_fork_context()
    start, published = context.Barrier(2), context.SimpleQueue()
    arguments = (registry.root, bundle, dict(os.environ), start, published)
    processes = [context.Process(target=publish_twice, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    every = [f"v{number:04}" for number in range(1, 5)]
    assert sorted(published.get() for _ in every) == every == names(registry)
    assert registry.resolve(*GEAR).name == every[-1]
    for version in registry.list_versions(*GEAR):
        assert read_bundle(version.uri).version == version.sha256
    # each of the four promotions is in the history of the alias: none was overwritten
    history = [registry.resolve(*GEAR, "production").name, *(roll_back(registry) for _ in range(3))]
    assert sorted(history) == every


def publish_and_die(root: str, bundle: str) -> None:
    registry_module.write_bytes = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    Registry(root).publish(bundle, "press")


def test_a_killed_publisher_changes_no_other_version(tmp_path: Path, bundle: str) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(bundle, "press")
    process = get_fork_context().Process(target=publish_and_die, args=(registry.root, bundle))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert names(registry) == ["v0001"]
    assert registry.publish(bundle, "press").name == "v0003"


# Aliases


@settings(max_examples=30)
@given(moves=st.lists(st.sampled_from(["v0001", "v0002", "v0003", "back"]), max_size=12))
def test_an_alias_is_a_stack_of_its_earlier_versions(
    moves: list[str], tmp_path_factory: pytest.TempPathFactory, bundle: str
) -> None:
    registry = Registry(tmp_path_factory.getbasetemp() / "stack")
    while len(registry.list_versions(*GEAR)) < 3:
        registry.publish(bundle, "press")
    alias = f"a{len(list_folder_entries(join_path(registry.root, 'press/gear/_aliases')))}"
    stack: list[str] = []
    for move in moves:
        if move != "back":
            registry.promote(*GEAR, move, alias)
            stack += [move] if stack[-1:] != [move] else []
        elif len(stack) > 1:
            stack.pop()
            assert roll_back(registry, alias) == stack[-1]
        else:
            with pytest.raises(RegistryError, match=alias):
                roll_back(registry, alias)
    assert registry.list_aliases(*GEAR).get(alias) == (stack[-1] if stack else None)


def test_a_slow_publisher_does_not_move_latest_backwards(three: Registry) -> None:
    three._move_alias_to_version(*GEAR, "latest", "v0001", only_forward=True)
    assert three.resolve(*GEAR).name == "v0003"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda registry: registry.resolve(*GEAR, "gold"), "no 'gold'; there are v0001, v0002, v0003, latest"),
        (lambda registry: registry.promote(*GEAR, "v0009", "production"), "no 'v0009'; there are v0001"),
        (lambda registry: registry.roll_back(*GEAR, "gold"), "no 'gold'"),
        (lambda registry: registry.resolve("press", "bolt"), "team 'press', category 'bolt'"),
        (lambda registry: registry.promote(*GEAR, "latest", "v1"), "alias 'v1'"),
        (lambda registry: registry.collect_garbage(*GEAR, -1), "keep=-1"),
    ],
)
def test_a_wrong_name_or_number_is_refused_with_the_existing_names(
    three: Registry, use: Callable[[Registry], Any], message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        use(three)


@pytest.mark.parametrize("name", ["", ".", "..", "../press", "a/b", "_aliases", "a\\b", "a b", "ä", "a\n", "x" * 101])
def test_names_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for use in (
        lambda: check_name(name),
        lambda: registry.resolve(name, "gear"),
        lambda: registry.resolve("press", name),
        lambda: registry.resolve("press", "gear", name),
        lambda: registry.list_versions(name, "gear"),
        lambda: registry.list_categories(name),
        lambda: registry.promote("press", "gear", "latest", name),
    ):
        with pytest.raises(RegistryError, match="expected a letter or digit"):
            use()


def test_every_change_of_a_name_changes_the_mark_of_the_category(registry: Registry, bundle: str) -> None:
    assert registry.read_change_marks("press") == {}
    marks = []
    for change in (
        lambda: registry.publish(bundle, "press", aliases=["production"]),
        lambda: registry.publish(bundle, "press", aliases=["production"]),
        lambda: registry.roll_back(*GEAR, "production"),
        lambda: registry.promote(*GEAR, "v0002", "production"),
        lambda: registry.promote(*GEAR, "v0002", "candidate"),
        lambda: registry.publish(bundle, "press", aliases=["production", "candidate"]),
        lambda: registry.collect_garbage(*GEAR, 1, min_age=NO_AGE),
    ):
        change()
        marks.append(registry.read_change_marks("press")["gear"])
        assert registry.read_change_marks("press") == {"gear": marks[-1]}
        assert len(list_folder_entries(join_path(registry.root, "press", "_changes"))) == 1
    assert len(set(marks)) == len(marks)
    assert (names(registry), registry.list_categories("press")) == (["v0002", "v0003"], ["gear"])


# Garbage


def test_old_versions_are_deleted_unless_an_alias_names_or_rolls_back_to_them(registry: Registry, bundle: str) -> None:
    for _ in range(6):
        registry.publish(bundle, "press")
    for ref in ("v0001", "v0002", "v0003"):
        registry.promote(*GEAR, ref, "production")
    assert registry.collect_garbage(*GEAR, 1) == []  # all are younger than an hour
    assert registry.collect_garbage(*GEAR, 1, min_age=NO_AGE) == ["v0001", "v0004"]
    assert names(registry) == ["v0002", "v0003", "v0005", "v0006"]
    assert list_folder_entries(join_path(registry.root, "press/gear/v0004")) == []
    for name in names(registry):
        read_bundle(registry.resolve(*GEAR, name).uri)
    assert roll_back(registry) == "v0002"
    with pytest.raises(RegistryError, match=r"none of its earlier versions .* v0002"):
        roll_back(registry)  # v0001 was deleted
    assert registry.publish(bundle, "press").name == "v0007"


def test_the_number_of_a_deleted_version_is_not_reused(three: Registry, bundle: str) -> None:
    three.promote(*GEAR, "v0001", "latest")
    three.promote(*GEAR, "v0002", "latest")
    assert three.collect_garbage(*GEAR, 0, min_age=NO_AGE) == ["v0003"]
    assert three.publish(bundle, "press").name == "v0004"


def test_files_of_a_dead_publisher_are_deleted_after_its_claim_expires(three: Registry) -> None:
    place = Path(three.root, *GEAR)
    for name, year in (("v0004", 2000), ("v0005", 2999)):
        (place / "_claims" / f"{name}.json").write_text(json.dumps({"at": f"{year}-01-01T00:00:00+00:00"}))
        (place / name).mkdir()
        (place / name / "network-0.safetensors").write_bytes(b"part")
    messages: list[str] = []
    assert three.collect_garbage(*GEAR, 9, log=messages.append) == []
    assert [(place / name).exists() for name in ("v0004", "v0005")] == [False, True]
    assert [message.partition(":")[0] for message in messages] == ["press/gear/v0004"]


def test_a_publisher_that_exceeds_its_claim_is_refused(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.bundle.registry.CLAIM_LASTS", -CLAIM_LASTS)
    with pytest.raises(RegistryError, match="took"):
        Registry(tmp_path).publish(bundle, "press")


def test_an_alias_moves_back_if_its_version_is_deleted_during_promotion(
    three: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.promote(*GEAR, "v0002", "production")
    deleted = three.resolve(*GEAR, "v0001")
    three.collect_garbage(*GEAR, 2, min_age=NO_AGE)
    monkeypatch.setattr(three, "resolve", lambda *names: deleted)  # the version existed at this moment
    with pytest.raises(RegistryError, match=r"v0001: .*garbage collection"):
        three.promote(*GEAR, "v0001", "production")
    assert three.list_aliases(*GEAR)["production"] == "v0002"


@pytest.mark.s3
def test_an_identity_with_read_access_resolves_and_gets_an_error_when_it_publishes(
    s3: S3Server, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(s3.new_uri())
    registry.publish(bundle, "press")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    assert registry.resolve(*GEAR).name == "v0001"
    with pytest.raises(DataError, match=r"_claims/v0002\.json' .*access denied"):
        registry.publish(bundle, "press")


def test_the_command_publishes_promotes_lists_rolls_back_and_collects(
    tmp_path: Path, part_bundles: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, bundle = str(tmp_path / "registry"), part_bundles["gear"]

    def run(*arguments: str) -> list[list[str]]:
        assert main(["registry", *arguments]) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    run_folder = str(Path(bundle).parents[1])
    lines = run("publish", root, run_folder, "--team", "press", "--alias", "production")
    assert [line[:3] for line in lines] == [["press", "board", "v0001"], ["press", "gear", "v0001"]]
    run("publish", root, bundle, "--team", "press", "--category", "gear")
    assert run("promote", root, *GEAR, "latest", "production")[0][2] == "v0002"
    titles, *lines = run("list", root, *GEAR)
    assert titles[:3] == ["team", "category", "version"]
    assert [(line[2], line[6]) for line in lines] == [("v0001", "-"), ("v0002", "latest,production")]
    assert [line for line in run("list", root) if line[1] == "gear"] == lines
    assert run("rollback", root, *GEAR, "production")[0][2] == "v0001"
    run("publish", root, bundle, "--team", "press")
    assert run("gc", root, *GEAR, "--keep", "1", "--min-age-hours", "0") == []  # rolls back to v0002
    assert main(["registry", "publish", root, bundle, "--team", "press", "--category", "bolt"]) == 1
    assert "no bundle of category 'bolt'; there are gear" in capsys.readouterr().err
