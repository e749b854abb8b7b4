"""Any title gives a valid name for a category, which resembles the title."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from focus_ray.data.read import list_categories
from focus_ray.errors import DataError
from focus_ray.ingestion.ingest import ingest
from focus_ray.names import is_valid_name, make_valid_name


@given(st.text())
def test_every_title_gives_a_valid_name_and_a_valid_name_does_not_change(title: str) -> None:
    name = make_valid_name(title)
    assert is_valid_name(name)
    assert make_valid_name(name) == name


@pytest.mark.parametrize(
    ("title", "name"),
    [("Deckel Fotos", "Deckel-Fotos"), ("Müller", "Mueller"), ("Größe 3", "Groesse-3"), ("line_3.a", "line_3.a")],
)
def test_a_name_resembles_its_title(title: str, name: str) -> None:
    assert make_valid_name(title) == name


def test_titles_in_other_scripts_get_different_names() -> None:
    assert make_valid_name("部品") != make_valid_name("歯車")


def test_a_folder_with_any_title_is_a_category_unless_two_titles_give_one_name(parts: str, tmp_path: Path) -> None:
    images = Path(parts).parent / "images/gear"
    shutil.copytree(images, tmp_path / "images/Deckel Fotos")
    report = ingest(tmp_path / "images", tmp_path / "data", progress=False)
    assert list_categories(tmp_path / "data") == ["Deckel-Fotos"]
    assert "'Deckel Fotos'" in str(report)
    assert "unchanged" in str(
        ingest(tmp_path / "images", tmp_path / "data", categories=["Deckel Fotos"], progress=False)
    )
    shutil.copytree(images, tmp_path / "images/Deckel-Fotos")
    with pytest.raises(DataError, match="two categories have the same name"):
        ingest(tmp_path / "images", tmp_path / "data", progress=False)
