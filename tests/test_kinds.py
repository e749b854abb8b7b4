"""The tables of kinds: each entry is what its table says, and a new kind is a file and a line, from config to report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from places import REPOSITORY
from small_set import draw_parts, make_bundle, small_config

from focus_ray.cli.main import main
from focus_ray.config import parse_config
from focus_ray.data.ingest import ingest
from focus_ray.errors import ConfigError, DataError
from focus_ray.kinds import BACKBONES, DENSITIES, IMPORTERS, METRICS, TRACKERS, Kinds
from focus_ray.sweep.settings import SweepConfig

TABLES: dict[str, Kinds] = {
    "density": DENSITIES,
    "backbone": BACKBONES,
    "format": IMPORTERS,
    "metric": METRICS,
    "tracker": TRACKERS,
}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kinds that CONTRIBUTING.md shows: each block as the file that its first line names, and its line in the table."""
    tables = {"DENSITIES": DENSITIES, "BACKBONES": BACKBONES, "IMPORTERS": IMPORTERS, "METRICS": METRICS}
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "kinds").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "kinds")
    for block in blocks:
        file, table, name, place = re.match(r'# (\w+\.py); in ([A-Z]+): "(\w+)": "([\w:]+)"', block).groups()  # type: ignore[union-attr]
        (tmp_path / "kinds" / file).write_text(block)
        monkeypatch.setitem(tables.pop(table).places, name, place)
    assert not tables, "CONTRIBUTING.md shows one of each kind"


@pytest.mark.parametrize("what", TABLES)
def test_every_entry_of_a_table_can_be_loaded(what: str) -> None:
    for name in TABLES[what]:
        assert TABLES[what][name] is not None


@pytest.mark.parametrize("what", TABLES)
def test_an_unknown_kind_names_the_nearest_and_those_there_are(what: str) -> None:
    first = next(iter(TABLES[what]))
    with pytest.raises(ValueError, match=rf"{what} '{first}x' is not known: did you mean '{first}'\? choose one of"):
        TABLES[what].check(f"{first}x")


def parts_in_the_toys_shape(folder: Path) -> Path:
    drawn = draw_parts(folder / "drawn") / "gear"
    for old, new in (("train/good", "fine"), ("test/good", "checked"), ("test/scratch", "broken")):
        (folder / "plant/gear").mkdir(parents=True, exist_ok=True)
        (drawn / old).rename(folder / "plant/gear" / new)
    return folder / "plant"


def test_a_new_kind_of_each_table_goes_from_config_to_report(
    toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", str(parts_in_the_toys_shape(tmp_path)), str(tmp_path / "data")]) == 0
    assert "format: plant" in capsys.readouterr().out
    model = {"backbone": "patches", "weights": "default", "image_alignment": {"group": "none"}}
    config = small_config(
        str(tmp_path / "data"), tmp_path / "runs", model=model, density={"kind": "distance_to_mean", "num_channels": 16}
    )
    place = make_bundle(config)
    assert main(["evaluate", place, "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["categories"]["gear"]["mean_gap"] == report["mean"]["mean_gap"]
    assert "mean gap" in (tmp_path / "report/report.md").read_text()
    sweep = SweepConfig(base={}, space={"density.num_channels": {"choice": [8]}}, searcher="grid", objective="mean_gap")  # type: ignore[dict-item]
    assert sweep.objective == "mean_gap"


def test_the_docs_tell_every_metric_of_the_table() -> None:
    told = (REPOSITORY / "docs/learn/evaluation.md").read_text()
    for key in METRICS:
        assert f"| `{key}` | {METRICS[key].title} |" in told


def test_a_configuration_refuses_a_kind_that_is_in_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"density.kind: density 'gausian' is not known: did you mean 'gaussian'\?"):
        parse_config({"data": {"uri": "x"}, "density": {"kind": "gausian"}})
    with pytest.raises(ConfigError, match=r"model.backbone: backbone 'resnet81' is not known: did you mean 'resnet18'"):
        parse_config({"data": {"uri": "x"}, "model": {"backbone": "resnet81"}})
    with pytest.raises(DataError, match=r"format='mvtek': expected auto, visa, mvtec, btad, folder"):
        ingest(tmp_path, tmp_path / "out", format="mvtek")
