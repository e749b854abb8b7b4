"""The long description of the package, the links of the README, the release notes and the citation are right."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import yaml
from places import REPOSITORY

from focus_ray import __version__


def load_release_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "release" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


LONG, RELEASE = load_release_script("long_description"), load_release_script("release")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DEAD = re.compile(r"\]\((?!https?://|#)")


def test_without_an_address_the_long_description_has_text_instead_of_links() -> None:
    text = "![a picture](docs/a.png)see [the guide](docs/a.md#b), [Ray](https://ray.io), [up](#up)"
    text = LONG.long_description(text, None, "1")
    assert text == "see the guide, [Ray](https://ray.io), [up](#up)"
    assert not DEAD.search(LONG.long_description(README, None, "1"))


def test_with_an_address_its_links_lead_to_the_files_of_the_version() -> None:
    text = LONG.long_description(
        "![a picture](docs/a.png) [the guide](docs/a.md#b)", "https://git.example/focus-ray/", "1.2"
    )
    base = "https://git.example/focus-ray"
    assert text == f"![a picture]({base}/raw/v1.2/docs/a.png) [the guide]({base}/blob/v1.2/docs/a.md#b)"
    assert not DEAD.search(LONG.long_description(README, base, "1.2"))


def test_links_of_the_readme_lead_to_files() -> None:
    targets = [match[3].partition("#")[0] for match in LONG._LINK.finditer(README)]
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []
    assert targets


def test_release_notes_are_the_first_part_of_the_changelog() -> None:
    notes = RELEASE.notes_of((REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    assert notes.startswith(f"# focus_ray {__version__}\n\n- ")
    assert RELEASE.notes_of("# Changelog\n\n## 2\n\n- new\n\n## 1\n\n- old\n", "2") == "# focus_ray 2\n\n- new\n"


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("# Changelog\n\n## 1\n\n- old\n", "begins with '1': expected a part '## 2'"),
        ("# Changelog\n", "begins with 'nothing'"),
        ("# Changelog\n\n## 2\n\n## 1\n\n- old\n", "says nothing of 2"),
    ],
)
def test_a_version_without_an_entry_in_the_changelog_is_not_released(changelog: str, message: str) -> None:
    with pytest.raises(RELEASE.ReleaseError, match=re.escape(message)):
        RELEASE.notes_of(changelog, "2")


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
