"""The registry on a disk and on a real S3 server: concurrent publishers lose nothing, and aliases move and roll back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import S3Server
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import MANIFEST, read_bundle, read_manifest
from focus_ray.bundle.published import resolve_bundles
from focus_ray.bundle.registry import CLAIM_LASTS, Registry, check_name
from focus_ray.cli.main import main
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.storage.files import create_bytes, join, list_names, read_bytes, write_bytes

NO_AGE = timedelta(0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    return make_bundle(small_config(ingest_parts(folder), folder, model={"image_alignment": {"group": "none"}}))


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return Registry(server.new_uri())
    return Registry(tmp_path / "registry")


def names(registry: Registry) -> list[str]:
    return [version.name for version in registry.versions("press", "gear")]


def test_a_registry_resolves_to_the_bundles_of_a_version_or_alias(
    registry: Registry, bundle: str, tmp_path: Path
) -> None:
    folder = tmp_path / "board"
    board = make_bundle(
        small_config(ingest_parts(folder), folder, model={"image_alignment": {"group": "none"}}), "board"
    )
    registry.publish(bundle, "press", "gear", aliases=["production"])
    registry.publish(bundle, "press", "gear")
    registry.publish(board, "press", "board")
    expected = {name: join(registry.root, "press", name, v) for name, v in (("gear", "v0002"), ("board", "v0001"))}
    assert resolve_bundles(f"{registry.root}/press") == expected
    assert resolve_bundles(registry.root) == expected
    messages: list[str] = []
    assert resolve_bundles(f"{registry.root}/press", "production", messages.append) == {
        "gear": join(registry.root, "press/gear/v0001")
    }
    assert messages[0].startswith("press/board: left out: ")
    registry.publish(bundle, "weld", "gear")
    with pytest.raises(DataError, match=r"several teams have a category 'gear': .*/weld"):
        resolve_bundles(registry.root)


def test_a_place_without_bundles_or_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no bundle here: .*, or a registry that `focus-ray registry publish` made"):
        resolve_bundles(str(tmp_path))


# Publishing


def test_a_published_bundle_equals_the_trained_bundle(registry: Registry, bundle: str) -> None:
    version = registry.publish(bundle, "press", "gear", aliases=["candidate"])
    assert (version.team, version.category, version.name) == ("press", "gear", "v0001")
    assert read_manifest(version.uri) == read_manifest(bundle)
    assert read_bundle(version.uri).version == version.sha256
    sizes = [len(read_bytes(join(version.uri, name))) for name in list_names(version.uri)]
    assert version.num_bytes == sum(sizes)
    for ref in ("latest", "candidate", "v0001"):
        assert registry.resolve("press", "gear", ref) == version
    assert (registry.teams(), registry.categories("press")) == (["press"], ["gear"])
    assert registry.aliases("press", "gear") == {"latest": "v0001", "candidate": "v0001"}
    assert registry.versions("press", "gear") == [version]


def test_each_publication_has_the_next_number_and_latest_follows(registry: Registry, bundle: str) -> None:
    for number in (1, 2, 3):
        registry.publish(bundle, "press")
        assert registry.resolve("press", "gear").name == f"v000{number}"
    assert names(registry) == ["v0001", "v0002", "v0003"]
    assert registry.versions("weld", "gear") == []


def test_a_bundle_of_another_category_is_refused(tmp_path: Path, bundle: str) -> None:
    with pytest.raises(RegistryError, match="a bundle of category 'gear' cannot be published as 'bolt'"):
        Registry(tmp_path).publish(bundle, "press", "bolt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
            "not published: .*: the file was changed or cut short",
        ),
        (Path.unlink, "not published: .* is missing: copy the whole folder"),
    ],
)
def test_a_damaged_bundle_is_not_published(tmp_path: Path, bundle: str, damage: object, message: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (path,) = copy.glob("density-*")
    damage(path)  # type: ignore[operator]
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match=message):
        registry.publish(copy, "press")
    assert registry.versions("press", "gear") == []
    with pytest.raises(RegistryError, match="nothing is published for team 'press', category 'gear'"):
        registry.resolve("press", "gear")


def test_a_folder_without_a_bundle_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Registry(tmp_path / "registry").publish(tmp_path, "press")


def test_a_version_is_visible_only_when_it_is_complete(registry: Registry, bundle: str) -> None:
    registry.publish(bundle, "press")
    place = join(registry.root, "press", "gear")
    assert create_bytes(join(place, "_claims", "v0002.json"), b'{"at": "2000-01-01T00:00:00+00:00"}')
    write_bytes(join(place, "v0002", MANIFEST), read_bytes(join(bundle, MANIFEST)))
    assert names(registry) == ["v0001"]
    with pytest.raises(RegistryError, match=r"has no 'v0002'; there are v0001, latest"):
        registry.resolve("press", "gear", "v0002")
    assert registry.publish(bundle, "press").name == "v0003"


PUBLISH = """
import sys
from focus_ray.bundle.published import resolve_bundles
from focus_ray.bundle.registry import Registry
registry, bundle, count, alias = Registry(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(count):
    print(registry.publish(bundle, "press", aliases=[alias]).name, flush=True)
"""


def test_concurrent_publishers_lose_no_version(registry: Registry, bundle: str) -> None:
    arguments = [sys.executable, "-c", PUBLISH, registry.root, bundle, "4"]
    processes = [
        subprocess.Popen([*arguments, alias], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for alias in ("production", "production", "candidate")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # started first and read now, so that both run at the same time
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    names_by_process = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    every = [f"v{number:04}" for number in range(1, 13)]
    assert sorted(name for batch in names_by_process for name in batch) == every
    assert names(registry) == every
    assert registry.resolve("press", "gear").name == every[-1]
    for version in registry.versions("press", "gear"):
        assert read_bundle(version.uri).version == version.sha256
    # each of the eight promotions is in the history of the alias: none was overwritten
    seen = [registry.resolve("press", "gear", "production").name]
    while len(seen) < 8:
        seen.append(registry.roll_back("press", "gear", "production").name)
    assert sorted(seen) == sorted(names_by_process[0] + names_by_process[1])


def test_a_killed_publisher_changes_no_other_version(tmp_path: Path, bundle: str) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(bundle, "press")
    die = "import os, focus_ray.bundle.registry as r; r.write_bytes = lambda *a: os.kill(os.getpid(), 9)\n"
    arguments = [sys.executable, "-c", die + PUBLISH, registry.root, bundle, "1", "production"]
    ended = subprocess.run(arguments, input="go\n", capture_output=True, text=True, timeout=120)
    assert ended.returncode == -9
    assert names(registry) == ["v0001"]
    assert registry.publish(bundle, "press").name == "v0003"


# Aliases


@pytest.fixture
def three(tmp_path: Path, bundle: str) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry")
    for _ in range(3):
        registry.publish(bundle, "press")
    return registry


def test_an_alias_rolls_back_step_by_step_and_forward_again(three: Registry) -> None:
    for ref in ("v0001", "v0002", "latest"):
        three.promote("press", "gear", ref, "production")
    assert three.resolve("press", "gear", "production").name == "v0003"
    assert [three.roll_back("press", "gear", "production").name for _ in range(2)] == ["v0002", "v0001"]
    with pytest.raises(RegistryError, match=r"none of its earlier versions .* v0001, v0002"):
        three.roll_back("press", "gear", "production")
    three.promote("press", "gear", "v0003", "production")
    assert three.roll_back("press", "gear", "production").name == "v0001"
    assert three.aliases("press", "gear") == {"latest": "v0003", "production": "v0001"}


def test_promoting_the_current_version_keeps_the_history_of_an_alias(three: Registry) -> None:
    for ref in ("v0001", "v0002", "v0002"):
        three.promote("press", "gear", ref, "production")
    assert three.roll_back("press", "gear", "production").name == "v0001"


@given(moves=st.lists(st.sampled_from(["v0001", "v0002", "v0003", "back"]), max_size=12))
def test_an_alias_is_a_stack_of_its_earlier_versions(
    moves: list[str], tmp_path_factory: pytest.TempPathFactory, bundle: str
) -> None:
    registry = Registry(tmp_path_factory.getbasetemp() / "stack")
    while len(registry.versions("press", "gear")) < 3:
        registry.publish(bundle, "press")
    alias = f"a{len(list_names(join(registry.root, 'press/gear/_aliases')))}"
    stack: list[str] = []
    for move in moves:
        if move != "back":
            registry.promote("press", "gear", move, alias)
            stack += [move] if stack[-1:] != [move] else []
        elif len(stack) > 1:
            stack.pop()
            assert registry.roll_back("press", "gear", alias).name == stack[-1]
        else:
            with pytest.raises(RegistryError):
                registry.roll_back("press", "gear", alias)
    assert registry.aliases("press", "gear").get(alias) == (stack[-1] if stack else None)


def test_a_slow_publisher_does_not_move_latest_backwards(three: Registry) -> None:
    three._move("press", "gear", "latest", "v0001", only_forward=True)
    assert three.resolve("press", "gear").name == "v0003"


def test_the_error_for_an_unknown_version_lists_the_existing_names(three: Registry) -> None:
    with pytest.raises(RegistryError, match=r"has no 'gold'; there are v0001, v0002, v0003, latest"):
        three.resolve("press", "gear", "gold")
    with pytest.raises(RegistryError, match=r"has no 'v0009'; there are v0001"):
        three.promote("press", "gear", "v0009", "production")
    with pytest.raises(RegistryError, match="has no 'gold'"):
        three.roll_back("press", "gear", "gold")
    with pytest.raises(RegistryError, match="nothing is published for team 'press', category 'bolt'"):
        three.resolve("press", "bolt")


def test_an_alias_cannot_look_like_a_version(three: Registry) -> None:
    with pytest.raises(RegistryError, match="alias 'v1'"):
        three.promote("press", "gear", "latest", "v1")


@pytest.mark.parametrize("name", ["", ".", "..", "../press", "a/b", "_aliases", "a\\b", "a b", "ä", "a\n", "x" * 101])
def test_names_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for use in (
        lambda: check_name(name),
        lambda: registry.resolve(name, "gear"),
        lambda: registry.resolve("press", name),
        lambda: registry.resolve("press", "gear", name),
        lambda: registry.versions(name, "gear"),
        lambda: registry.categories(name),
        lambda: registry.promote("press", "gear", "latest", name),
    ):
        with pytest.raises(RegistryError, match=r"expected a letter or digit, then letters, digits"):
            use()


def test_every_change_of_a_name_changes_the_mark_of_the_category(registry: Registry, bundle: str) -> None:
    marks = []

    def changed() -> None:
        mark = registry.marks("press")["gear"]
        assert mark not in marks
        assert registry.marks("press") == {"gear": mark}
        marks.append(mark)
        assert len(list_names(join(registry.root, "press", "_changes"))) == 1

    assert registry.marks("press") == {}
    for _ in range(2):
        registry.publish(bundle, "press", aliases=["production"])
        changed()
    registry.roll_back("press", "gear", "production")
    changed()
    registry.promote("press", "gear", "v0002", "production")
    changed()
    registry.promote("press", "gear", "v0002", "candidate")
    changed()
    registry.publish(bundle, "press")
    registry.promote("press", "gear", "v0003", "production")
    registry.promote("press", "gear", "v0003", "candidate")
    changed()
    assert registry.collect_garbage("press", "gear", 1, min_age=NO_AGE) == ["v0001"]
    changed()
    assert (registry.teams(), registry.categories("press")) == (["press"], ["gear"])


# Garbage


def test_old_versions_are_deleted_unless_an_alias_names_or_rolls_back_to_them(registry: Registry, bundle: str) -> None:
    for _ in range(6):
        registry.publish(bundle, "press")
    for ref in ("v0001", "v0002", "v0003"):
        registry.promote("press", "gear", ref, "production")
    assert registry.collect_garbage("press", "gear", 1) == []  # all are younger than an hour
    assert registry.collect_garbage("press", "gear", 1, min_age=NO_AGE) == ["v0001", "v0004"]
    assert names(registry) == ["v0002", "v0003", "v0005", "v0006"]
    assert list_names(join(registry.root, "press/gear/v0004")) == []
    for name in names(registry):
        read_bundle(registry.resolve("press", "gear", name).uri)
    assert registry.roll_back("press", "gear", "production").name == "v0002"
    with pytest.raises(RegistryError, match="none of its earlier versions"):
        registry.roll_back("press", "gear", "production")  # v0001 was deleted
    assert registry.publish(bundle, "press").name == "v0007"


def test_the_number_of_a_deleted_version_is_not_reused(three: Registry, bundle: str) -> None:
    three.promote("press", "gear", "v0001", "latest")
    three.promote("press", "gear", "v0002", "latest")
    assert three.collect_garbage("press", "gear", 0, min_age=NO_AGE) == ["v0003"]
    assert three.publish(bundle, "press").name == "v0004"


def test_files_of_a_dead_publisher_are_deleted_after_its_claim_expires(three: Registry) -> None:
    place = Path(three.root) / "press/gear"
    for name, at in (("v0004", "2000-01-01T00:00:00+00:00"), ("v0005", "2999-01-01T00:00:00+00:00")):
        (place / "_claims" / f"{name}.json").write_text(json.dumps({"at": at}))
        (place / name).mkdir()
        (place / name / "network-0.safetensors").write_bytes(b"part")
    messages: list[str] = []
    assert three.collect_garbage("press", "gear", 9, log=messages.append) == []
    assert not (place / "v0004").exists()
    assert (place / "v0005").exists()
    assert [message.partition(":")[0] for message in messages] == ["press/gear/v0004"]


def test_a_publisher_that_exceeds_its_claim_is_refused(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.bundle.registry.CLAIM_LASTS", -CLAIM_LASTS)
    with pytest.raises(RegistryError, match=r"copying the bundle took"):
        Registry(tmp_path).publish(bundle, "press")


def test_an_alias_moves_back_if_its_version_is_deleted_during_promotion(
    three: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.promote("press", "gear", "v0002", "production")
    deleted = three.resolve("press", "gear", "v0001")
    three.collect_garbage("press", "gear", 2, min_age=NO_AGE)
    monkeypatch.setattr(three, "resolve", lambda *names: deleted)  # the version existed at this moment
    with pytest.raises(RegistryError, match=r"v0001: .*garbage collection"):
        three.promote("press", "gear", "v0001", "production")
    assert three.aliases("press", "gear")["production"] == "v0002"


def test_a_negative_number_to_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="keep=-1: expected 0 or more"):
        Registry(tmp_path).collect_garbage("press", "gear", -1)


def test_a_damaged_record_is_named(three: Registry) -> None:
    (Path(three.root) / "press/gear/_published/v0002.json").write_text("{")
    assert [version.name for version in three.versions("press", "gear")] == ["v0001", "v0003"]
    with pytest.raises(RegistryError, match=r"v0002\.json: .*damaged.*Invalid JSON"):
        three.resolve("press", "gear", "v0002")


@pytest.mark.s3
def test_an_identity_with_read_access_resolves_and_gets_an_error_when_it_publishes(
    s3: S3Server, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(s3.new_uri())
    registry.publish(bundle, "press")
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    assert registry.resolve("press", "gear").name == "v0001"
    with pytest.raises(DataError, match=r"S3 bucket '.*', key '.*/_claims/v0002\.json' .*cannot create: access denied"):
        registry.publish(bundle, "press")


# The command


def test_the_command_publishes_promotes_lists_rolls_back_and_collects(
    tmp_path: Path, bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "registry")

    def run(*arguments: str) -> list[list[str]]:
        assert main(["registry", *arguments]) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    run_folder = str(Path(bundle).parents[1])
    assert run("publish", root, run_folder, "--team", "press", "--alias", "production")[0][:3] == [
        "press",
        "gear",
        "v0001",
    ]
    run("publish", root, bundle, "--team", "press", "--category", "gear")
    assert run("promote", root, "press", "gear", "latest", "production")[0][2] == "v0002"
    titles, *lines = run("list", root)
    assert titles[:3] == ["team", "category", "version"]
    assert [(line[2], line[6]) for line in lines] == [("v0001", "-"), ("v0002", "latest,production")]
    assert run("list", root, "press", "gear")[1:] == lines
    assert run("rollback", root, "press", "gear", "production")[0][2] == "v0001"
    run("publish", root, bundle, "--team", "press")
    assert run("gc", root, "press", "gear", "--keep", "1", "--min-age-hours", "0") == []  # rolls back to v0002
    assert main(["registry", "publish", root, bundle, "--team", "press", "--category", "bolt"]) == 1
    assert "no bundle of category 'bolt'; there are gear" in capsys.readouterr().err
