"""The reference of settings is complete, up to date and correct, and needs no heavy import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import REPOSITORY

from focus_ray.cli.config_reference import (
    COMMAND,
    CONFIG_KINDS,
    SettingDescription,
    explain_key,
    iterate_sections,
    render_markdown,
)
from focus_ray.errors import ConfigError
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.settings.sections import iterate_setting_keys
from focus_ray.tracking.settings import TrackerConfig

SETTINGS: dict[str, dict[str, SettingDescription]] = {
    kind.title: {setting.key: setting for section in iterate_sections(kind.model) for setting in section.settings}
    for kind in CONFIG_KINDS
}
RUN, SWEEP, SERVICE = SETTINGS.values()


def test_the_page_is_up_to_date() -> None:
    page = (REPOSITORY / "docs/reference/configuration.md").read_text(encoding="utf-8")
    assert page == render_markdown(), f"docs/reference/configuration.md is out of date with the models: run `{COMMAND}`"


def test_every_setting_has_a_description() -> None:
    assert [key for settings in SETTINGS.values() for key, setting in settings.items() if not setting.description] == []


def test_the_reference_has_exactly_the_keys_of_a_run() -> None:
    assert {key for key in RUN if ".KEY." not in key} == set(iterate_setting_keys(Config))
    assert {key for key in RUN if ".KEY." in key} == {f"trackers.KEY.{key}" for key in TrackerConfig.model_fields}


def test_defaults_are_those_that_a_run_gets() -> None:
    config = parse_config({"data": {"uri": "data"}})
    assert RUN["train.lambda_fine"].default == str(config.train.lambda_fine)
    assert "density.layers" not in RUN
    assert (RUN["data.uri"].default, RUN["data.categories"].default, SERVICE["sink.uri"].default) == (
        None,
        "null",
        None,
    )
    # the field of a section may override a default of the section
    assert (SERVICE["ingress.max_replicas"].default, SERVICE["pool.scaling.max_replicas"].default) == ("4", "1")


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "train.steps": "integer from 0 to 10000000",
        "train.learning_rate": "number above 0, up to 10",
        "data.holdout_fraction": "number from 0, below 1",
        "cluster.memory_gib_per_worker": "number above 0 or null; GiB",
        "model.backbone": ", ".join(BACKBONES),
        "model.image_size_px": "integer from 32 to 2048; pixels",
        "model.weights_sha256": "text of the form ^[0-9a-f]{8,64}$, or null",
        "density.window": "1, 3, 5",
        "cluster.use_gpu": "true, false, or auto",
        "cluster.labels": "mapping of text to text",
        "name": "name",
        "pins[].categories": "list of names, not empty",
        "space.KEY.uniform": "[number, number], or null",
    }.items(),
)
def test_the_allowed_values_of_a_setting_are_described_in_words(key: str, values: str) -> None:
    assert (SERVICE | SWEEP | RUN)[key].values == values


# The explanation of a key


def test_a_key_is_explained_with_its_values_default_and_meaning() -> None:
    explanation = explain_key("train.steps")
    for text in ("train.steps (of a run)", "integer from 0 to 10000000", "default: 0", "Optimiser steps"):
        assert text in explanation
    assert explain_key("base.train.steps") == explanation  # the key as in a sweep
    assert "default: none: it must be set" in explain_key("data.uri")
    assert re.findall(r"^name \((.*)\)", explain_key("name"), re.MULTILINE) == ["of a run", "of a sweep"]


def test_a_section_is_explained_by_the_keys_in_it_and_in_its_sections() -> None:
    explanation = explain_key("model")
    assert "model.backbone " in explanation
    assert "model.image_alignment.group " in explanation
    assert "train." not in explanation


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.step", r"^train\.step: no such key; did you mean train\.steps"),
        ("steps", r"did you mean train\.steps"),
        ("trian", "did you mean train"),
        ("zzzzzz", r"zzzzzz: no such key; docs/reference/configuration\.md has all there are"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain_key(key)


def test_neither_torch_nor_ray_is_imported() -> None:
    code = "import sys, focus_ray.cli.config_reference as c; c.render_markdown(); print({'torch', 'ray'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "set()"
