"""Configurations: unknown keys, invalid values, overrides, writing and reading YAML, and every shipped file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import CONFIGS

from focus_ray.density.settings import DensityConfig
from focus_ray.errors import ConfigError
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.fitting.settings import convert_earlier_settings, load_config, parse_config
from focus_ray.settings.sections import config_to_yaml
from focus_ray.settings.yaml_text import load_yaml

CONFIGS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("sweep*.yaml")))  # test_search loads those


def tree_with(**changes: Any) -> dict[str, Any]:
    """Returns a valid tree of settings with changes: dotted key -> value."""
    tree: dict[str, Any] = {"data": {"uri": "images"}}
    for key, value in changes.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("data: {uri: images}\ntrain: {learning_rate: 1e-3}\n")
    return path


# Keys


def test_all_errors_of_a_file_are_in_a_single_message(file: Path) -> None:
    file.write_text("data: {uri: images}\ntrain: {steps: -1, learning_rate: 20}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.steps: .*got -1.*; train\.learning_rate: .*got 20"):
        load_config(file)


# Values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": 1}, r"^configuration: trian: unknown key; did you mean 'train'\?$"),
        ({"train.step": 1}, r"train\.step: unknown key; did you mean 'steps'\?"),
        ({"model.image_alignment.grupp": 1}, r"model\.image_alignment\.grupp: unknown key; did you mean 'group'\?"),
        ({"scoring.zzz": 1}, r"scoring\.zzz: unknown key; known keys: .*image_score"),
        ({"data": {}}, r"^configuration: data\.uri: missing; set it$"),
        ({"model.image_size_px": 100}, "100 must be a multiple of 16, .* layer 3 of .*: the nearest are 96 and 112"),
        ({"model.image_size_px": 16}, r"greater than or equal to 32 \(got 16\)"),
        ({"density.layers": ["layer2"]}, r"layers is always \['layer1', 'layer2', 'layer3'\].*got \['layer2'\]"),
        ({"density.shrinkage": 0}, r"above 0, up to 1000.*\(got 0\)"),
        ({"density.shrinkage": "0.01 percent"}, r"or '0\.01 absolute' \(got '0\.01 percent'\)"),
        ({"data.categories": ["bolt", "nut", "bolt"]}, r"lists a name twice: \['bolt', 'nut', 'bolt'\]"),
        ({"model.backbone": "resnet19"}, r"backbone 'resnet19' is not known: did you mean 'resnet18'\?"),
        ({"density.kind": "gausian"}, r"density.kind: density 'gausian' is not known: did you mean 'gaussian'\?"),
        ({"model.weights_sha256": "XYZ"}, r"pattern.*\(got 'XYZ'\)"),
        ({"train.seed": 2**31}, "less than 2147483648"),
        ({"name": "../up"}, r"pattern.*\(got '\.\./up'\)"),
        ({"train": None}, r"^configuration: train: .*\(got None\)"),
        (
            {"model.backbone": "dinov2_vits14", "model.image_size_px": 256},
            "256 must be a multiple of 14, .*dinov2_vits14: the nearest are 252 and 266",
        ),
        (
            {"model.backbone": "resnet50", "model.image_size_px": 252},
            "252 must be a multiple of 16, .*resnet50: the nearest are 240 and 256",
        ),
        (
            {"model.backbone": "convnext_tiny", "model.image_size_px": 48},
            "reflect with convnext_tiny needs an image_size_px of at least 64, got 48",
        ),
        (
            {"model.backbone": "efficientnet_lite2", "model.image_size_px": 32},
            "reflect with efficientnet_lite2 needs .* at least 48, got 32",
        ),
        (
            {"model.backbone": "dinov2_vitb14", "model.feature_alignment": {"layer1": "rotation", "layer3": "affine"}},
            r"dinov2_vitb14 hands tokens .*set model\.feature_alignment\.layer1=none, model\.feature_alignment\.layer3=none",
        ),
    ],
)
def test_an_unknown_key_or_invalid_value_is_refused_with_the_valid_ones(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree_with(**changes))


def test_the_default_size_is_valid_for_every_backbone_and_gives_the_expected_map() -> None:
    for name in BACKBONES:
        model = parse_config({"data": {"uri": "x"}, "model": {"backbone": name}}).model
        places = {stride: model.location_side_px(DensityConfig(map_stride_px=stride).map_layer) for stride in (4, 8)}
        patch_px = {"dinov2": 14, "dinov3": 16}.get(name.partition("_")[0])
        assert places == ({4: patch_px, 8: patch_px} if patch_px else {4: 4, 8: 8})
    small = {"backbone": "convnext_tiny", "image_size_px": 48, "padding": "zeros"}
    assert parse_config({"data": {"uri": "x"}, "model": small}).model.image_size_px == 48


def test_cross_calibration_needs_no_held_out_images() -> None:
    for method in ("auto", "cross", "leave_one_out"):
        parse_config(tree_with(**{"data.holdout_fraction": 0.0, "calibration.method": method}))
    with pytest.raises(ConfigError, match=r"set data\.holdout_fraction above 0, or calibration\.method=leave_one_out"):
        parse_config(tree_with(**{"data.holdout_fraction": 0.0, "calibration.method": "split"}))


# Files and overrides


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [", "not valid YAML"),
        (b"- data", "expected a mapping of sections at the top, got list"),
        (b"", "data: missing"),
        (b"name: caf\xe9\n", "cannot read the configuration"),
        (None, "cannot read the configuration"),
    ],
)
def test_an_invalid_file_gets_an_error_with_the_reason(file: Path, content: bytes | None, message: str) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml: {message}"):
        load_config(file)


def test_overrides_have_the_types_of_yaml(file: Path) -> None:
    config = load_config(
        file,
        [
            "train.steps=7",
            "train.learning_rate=5e-4",
            "density.coreset=0",
            "data.categories=[bolt, nut]",
            "data.uri=s3://bucket/images?x=1",
            "model.image_alignment.group=rotation",
            "density.per_place=null",
            "cluster.use_gpu=auto",
        ],
    )
    assert (config.train.steps, config.train.learning_rate, config.density.coreset) == (7, 5e-4, 0)
    assert (config.data.categories, config.data.uri) == (("bolt", "nut"), "s3://bucket/images?x=1")
    assert config.model.image_alignment.group == "rotation"
    assert (config.density.per_place, config.cluster.use_gpu) == (None, "auto")


def test_numbers_that_yaml_1_1_reads_as_text_are_numbers(file: Path) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    assert load_config(file).train.learning_rate == 1e-3
    assert load_config(file, ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4


def test_an_override_of_an_empty_section_fills_it(file: Path) -> None:
    file.write_text("data: {uri: images}\ntrain:\n")
    assert load_config(file, ["train.steps=3"]).train.steps == 3


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.steps", "override 'train.steps': expected key=value, for instance train.steps=10"),
        ("=3", "override '=3': expected key=value"),
        ("train..steps=3", "override 'train..steps=3': expected key=value"),
        ("data.categories=[bolt", "override 'data.categories=[bolt': the value is not valid YAML"),
        ("data.uri.host=x", "override 'data.uri.host=x': 'uri' holds a value, not a section"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
        ("train.steps=many", "(got 'many')"),
        ("train={seed: 1, seed: 2}", "'seed' appears twice"),
        # numbers that versions of YAML read differently
        ("train.seed=010", '"010"'),
        ("train.seed=-017", '"-017"'),
        ("train.seed=1:30", '"1:30"'),
        ("name=007", '"007"'),
        ("name=12:30:45.5", '"12:30:45.5"'),
        ("data.categories=[bolt, 0_1]", '"0_1"'),
        # text that YAML reads as another type: the message shows the quotes
        ("name=123", """'name="123"'"""),
        ("data.categories=[bolt, 1.5]", """'data.categories=["1.5"]'"""),
        ("storage=2024-01-31", """'storage="2024-01-31"'"""),
        ("name=no", """'name="TEXT"'"""),
        ("data.uri=null", """'data.uri="TEXT"'"""),
        ("cluster.labels={zone: 3}", """'cluster.labels.zone="3"'"""),
        # values that YAML cannot construct
        ("name=2024-13-45", "not valid YAML"),
        ("name=0x_", "not valid YAML"),
        (f"name={'[' * 5000}", "not valid YAML"),
    ],
    ids=lambda text: text[:40],
)
def test_an_invalid_or_ambiguous_override_is_refused_with_the_reason(file: Path, override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        load_config(file, [override])


# Text that YAML reads differently than the writer meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {uri: a}\ntrain:\n  seed: 1\nmodel: {}\ntrain: {steps: 2}\n", "'train' .* line 2 and in line 5"),
        ("data: {uri: a}\ntrain:\n  seed: 1\n  steps: 3\n  seed: 2\n", "'seed' .* line 3 and in line 5"),
        ("data: {uri: a,\n uri: b}\n", "'uri' .* line 1 and in line 2"),
        ("data: {uri: a}\ntrain:\n'train': {seed: 1}\n", "'train' .* line 2 and in line 3"),
        ("data:\n  uri: a\n  regions:\n    - {x: 1,\n       x: 2}\n", "'x' .* line 4 and in line 5"),
    ],
)
def test_a_key_that_appears_twice_is_refused_with_its_lines(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*{message}"):
        load_config(file)


def test_a_key_may_override_a_key_of_a_merged_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: &first {uri: a, holdout_fraction: 0.3}\nname: x\n")
    assert load_config(path).data.uri == "a"
    tree = load_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: *b\n")
    assert (tree["b"], tree["c"], tree["d"]) == ({"x": 3, "y": 2}, {"x": 3, "y": 4}, {"x": 3, "y": 2})


def test_quoted_numbers_are_text_and_plain_numbers_are_numbers(file: Path) -> None:
    overrides = ["name='x'", 'name="007"', "data.categories=['001', 08]", "train.seed=10", "train.learning_rate=0.010"]
    config = load_config(file, overrides)  # the last override of a key counts
    assert (config.name, config.data.categories) == ("007", ("001", "08"))
    assert (config.train.seed, config.train.learning_rate) == (10, 0.01)


# Writing and reading


@given(
    steps=st.integers(0, 10_000),
    rate=st.floats(1e-12, 10.0),
    share=st.floats(0.0, 1.0, exclude_max=True),
    uri=st.text(max_size=30),
    categories=st.none() | st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4, unique=True),
    group=st.sampled_from(["none", "rotation", "affine"]),
    use_gpu=st.sampled_from([True, False, "auto"]),
)
def test_a_resolved_configuration_read_again_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps, rate, share, uri, categories, group, use_gpu
) -> None:
    config = parse_config(
        {
            "data": {"uri": uri, "categories": categories},
            "train": {"steps": steps, "learning_rate": rate},
            "model": {"feature_alignment": {"layer2": group}},
            "selection": {"fraction": share},
            "cluster": {"use_gpu": use_gpu},
        }
    )
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_shipped_configuration_loads() -> None:
    assert CONFIGS
    for path in CONFIGS:
        assert load_config(path).name == path.stem


@pytest.mark.parametrize("is_fitted", [False, True])
def test_a_fixed_setting_may_have_its_value(is_fitted: bool) -> None:
    tree = {"data": {"uri": "images"}, "train": {"momentum": 0.9}, "scoring": {"smoothing_sigma_px": 4}}
    tree["density"] = {"layers": ["layer1", "layer2", "layer3"], "gaussian_share": 0.9, "precision": "auto"}
    assert parse_config(tree, is_fitted=is_fitted) == parse_config({"data": {"uri": "images"}})


@pytest.mark.parametrize(
    ("section", "setting", "is_fitted"),
    [
        ("train", {"momentum": 0.5}, False),
        ("scoring", {"smoothing_sigma_px": 2.0}, False),
        ("scoring", {"smoothing_sigma_px": 2.0}, True),
        ("density", {"gaussian_share": 0.0}, False),
        ("density", {"smooth_layers": []}, False),
        ("density", {"precision": "bf16"}, False),
        ("cluster", {"max_failures": 5}, False),
    ],
)
def test_a_fixed_setting_with_another_value_is_refused(
    section: str, setting: dict[str, float], is_fitted: bool
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"{section}(: |\.){name} is always"):
        parse_config({"data": {"uri": "images"}, section: setting}, is_fitted=is_fitted)


def test_a_fixed_setting_that_changes_no_score_does_not_keep_a_bundle_from_being_read() -> None:
    tree = {"data": {"uri": "images"}, "train": {"momentum": 0.5}}
    assert parse_config(tree, is_fitted=True) == parse_config({"data": {"uri": "images"}})


def test_a_bundle_keeps_a_value_that_users_cannot_change_when_it_is_written_again() -> None:
    density = {"gaussian_share": 0.0, "coreset_channels": 16, "smooth_layers": ["layer3"], "precision": "bf16"}
    config = parse_config({"data": {"uri": "images"}, "density": density}, is_fitted=True)
    again = parse_config(config.model_dump(mode="json"), is_fitted=True)
    assert again == config
    assert {name: again.density.model_dump(mode="json")[name] for name in density} == density


def test_settings_of_earlier_versions_are_converted() -> None:
    earlier = {"density": {"shrinkage": 0.01, "shrinkage_unit": "absolute"}, "selection": {"enabled": True}}
    config = parse_config({"data": {"uri": "images"}, **earlier})
    assert (config.density.shrinkage, config.selection.fraction) == ("0.01 absolute", 0.1)
    assert not parse_config({"data": {"uri": "x"}, "selection": {"enabled": False, "fraction": 0.3}}).selection.enabled


@pytest.mark.parametrize(("cluster", "size"), [({}, 12), ({"num_workers": 3}, 36), ({"num_workers": 1}, 12)])
def test_the_batch_size_per_worker_of_earlier_versions_becomes_that_of_all_workers_of_the_run(
    cluster: dict[str, int], size: int
) -> None:
    earlier = {"data": {"uri": "images"}, "train": {"batch_size_per_worker": 12, "epochs": 2}, "cluster": cluster}
    config = parse_config(earlier, is_fitted=True)
    assert (config.train.batch_size, config.train.steps) == (size, 2)
    assert parse_config(convert_earlier_settings(earlier)) == config
    message = rf"train\.batch_size_per_worker=12 is now train\.batch_size.*set train\.batch_size={size} instead"
    with pytest.raises(ConfigError, match=message):
        parse_config({**earlier, "train": {"batch_size_per_worker": 12}})


def test_epochs_of_earlier_versions_are_refused_with_the_way_to_count_steps_but_0_means_no_training() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs=10 .*train\.steps.*epochs x images / train\.batch_size"):
        parse_config({"data": {"uri": "images"}, "train": {"epochs": 10}})
    assert parse_config({"data": {"uri": "images"}, "train": {"epochs": 0}}).train.steps == 0


def test_a_training_with_more_workers_than_images_in_a_batch_is_refused() -> None:
    workers = {"train.batch_size": 4, "cluster.num_workers": 5}
    with pytest.raises(ConfigError, match=r"train\.batch_size=4 .* cluster\.num_workers=5"):
        parse_config(tree_with(**workers, **{"train.steps": 1}))
    assert (
        parse_config(tree_with(**workers)).train.steps == 0
    )  # without training by gradient, there are no batches to share


def test_grid_and_memory_follow_the_settings_that_decide_them() -> None:
    config = parse_config({"data": {"uri": "x"}, "model": {"precision": "fp32"}, "density": {"map_stride_px": 4}})
    assert (config.density.precision, config.density.smooth_layers) == ("fp32", ())


def test_a_bundle_with_training_settings_of_an_earlier_version_is_read() -> None:
    earlier = {
        "epochs": 10, "learning_rate": 1e-4, "learning_rate_head": 0.05, "learning_rate_feature_alignment": 0.05,
        "warmup_epochs": 0.0, "symmetric": False, "checkpoint_every_epochs": 1,
    }  # fmt: skip
    config = parse_config({"data": {"uri": "parts"}, "train": earlier}, is_fitted=True)
    assert config.train.steps == 10
    with pytest.raises(ConfigError, match="learning_rate_head"):
        parse_config({"data": {"uri": "parts"}, "train": {"steps": 10, "learning_rate_head": 0.05}})


def test_a_setting_may_be_named_by_the_last_part_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {uri: parts}\n")
    config = load_config(tmp_path / "run.yaml", ["target_fpr=0.01", "name=a", "steps=7"])
    assert (config.calibration.target_fpr, config.name, config.train.steps) == (0.01, "a", 7)
    with pytest.raises(ConfigError, match=r"target_fpt: no such setting; did you mean 'target_fpr'"):
        load_config(tmp_path / "run.yaml", ["target_fpt=0.01"])
    with pytest.raises(ConfigError, match=r"method: matches model\.image_alignment\.method and"):
        load_config(tmp_path / "run.yaml", ["method=split"])


def test_a_percentage_is_refused_with_the_share() -> None:
    with pytest.raises(ConfigError, match=r"5 % is 0\.05"):
        parse_config({"data": {"uri": "parts"}, "calibration": {"target_fpr": 5}})
