"""The site of the documentation builds without a warning, has every page, and loads nothing from other servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY
from serving_set import create_service

from focus_ray.serving.api import create_api
from focus_ray.serving.settings import parse_service_settings

FETCHED = re.compile(r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//|<link[^>]+href=["'](?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, (
        f"the site has warnings; a page that is not in mkdocs.yml's nav is one:\n{finished.stderr}"
    )
    return folder


def test_every_page_is_built_and_in_the_search_index(site: Path) -> None:
    docs = REPOSITORY / "docs"
    pages = [path.relative_to(docs).with_suffix(".html") for path in docs.rglob("*.md")]
    assert pages
    assert [str(page) for page in pages if not (site / page).is_file()] == []
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    assert all(f'"location":"{name}' in index for name in ("start/", "learn/", "use/", "operate/", "reference/"))


def test_no_page_loads_anything_from_other_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    external_resources = [
        (page.name, match) for page in pages for match in FETCHED.findall(page.read_text(encoding="utf-8"))
    ]
    assert external_resources == []
    styles = [path.name for path in site.rglob("*.css") if re.search(r"url\(\s*[\"']?https?:", path.read_text())]
    assert styles == []


def test_the_http_reference_lists_every_path_of_the_service() -> None:
    settings = parse_service_settings({"registry": "registry", "open_to_all": True})
    paths = create_api(create_service(settings)).openapi()["paths"]
    page = (REPOSITORY / "docs/reference/http.md").read_text(encoding="utf-8")
    named = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert named
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []


def test_pictures_are_small() -> None:
    pictures = [path for path in (REPOSITORY / "docs").rglob("*") if path.suffix in (".png", ".svg")]
    assert pictures
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []
