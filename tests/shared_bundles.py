"""A data set of small parts and its bundles, made once for all tests that only read them."""

from __future__ import annotations

import pytest

PLAIN = {"image_alignment": {"group": "none"}}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root of the data set of `small_set.ingest_parts`. Tests must not change it."""
    from small_set import ingest_parts

    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def data(parts: str) -> str:
    """Another name of `parts`."""
    return parts


@pytest.fixture(scope="session")
def part_bundles(parts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Category -> its bundle, without alignment and with the hashes of its training images. Tests must not change them."""
    from small_set import CATEGORIES, make_bundle, small_config

    from focus_ray.fitting.split import compute_split_plan

    config = small_config(parts, tmp_path_factory.mktemp("runs"))
    hashes = {category: compute_split_plan(config, category).fit_hashes.tolist() for category in CATEGORIES}
    return {category: make_bundle(config, category, fit_hashes=hashes[category]) for category in CATEGORIES}


@pytest.fixture(scope="session")
def aligned_bundle(parts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a bundle of gears that aligns every image. Tests must not change it."""
    from small_set import make_bundle, small_config

    model = {"image_alignment": {"min_drop": 0.0}}
    return make_bundle(small_config(parts, tmp_path_factory.mktemp("runs"), model=model))
