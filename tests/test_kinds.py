"""The tables of kinds: every entry can be imported, and a new kind needs a new file and a line in a table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from places import REPOSITORY
from small_set import draw_parts, make_bundle, small_config

from focus_ray.cli.main import main
from focus_ray.data.importers.registry import IMPORTERS
from focus_ray.density.registry import DENSITIES
from focus_ray.errors import ConfigError, DataError
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.fitting.settings import parse_config
from focus_ray.ingestion.ingest import ingest
from focus_ray.metrics.registry import METRICS
from focus_ray.settings.kinds import LazyRegistry
from focus_ray.sweep.settings import SweepConfig
from focus_ray.tracking.registry import TRACKERS

TABLES: dict[str, LazyRegistry] = {
    "density": DENSITIES,
    "backbone": BACKBONES,
    "format": IMPORTERS,
    "metric": METRICS,
    "tracker": TRACKERS,
}


@pytest.fixture
def example_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writes the example kinds of CONTRIBUTING.md to files, and adds them to the tables."""
    tables = {"DENSITIES": DENSITIES, "BACKBONES": BACKBONES, "IMPORTERS": IMPORTERS, "METRICS": METRICS}
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "kinds").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "kinds")
    for block in blocks:
        file, table, name, import_path = re.match(r'# (\w+\.py); in ([A-Z]+): "(\w+)": "([\w:]+)"', block).groups()  # type: ignore[union-attr]
        (tmp_path / "kinds" / file).write_text(block)
        monkeypatch.setitem(tables.pop(table).import_paths, name, import_path)
    assert not tables, "CONTRIBUTING.md shows one example for each table"


@pytest.mark.parametrize("component", TABLES)
def test_every_entry_of_a_table_can_be_imported(component: str) -> None:
    for name in TABLES[component]:
        assert TABLES[component][name] is not None


@pytest.mark.parametrize("component", TABLES)
def test_an_unknown_kind_is_refused_with_the_nearest_name(component: str) -> None:
    first = next(iter(TABLES[component]))
    with pytest.raises(ValueError, match=rf"{component} '{first}x' is not known: did you mean '{first}'"):
        TABLES[component].check_name(f"{first}x")


def parts_in_the_example_layout(folder: Path) -> Path:
    drawn = draw_parts(folder / "drawn") / "gear"
    for old, new in (("train/good", "fine"), ("test/good", "checked"), ("test/scratch", "broken")):
        (folder / "plant/gear").mkdir(parents=True, exist_ok=True)
        (drawn / old).rename(folder / "plant/gear" / new)
    return folder / "plant"


def test_a_new_kind_of_each_table_works_from_ingestion_to_report(
    example_kinds: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", str(parts_in_the_example_layout(tmp_path)), str(tmp_path / "data")]) == 0
    assert "format: plant" in capsys.readouterr().out
    model = {"backbone": "patches", "weights": "default", "image_alignment": {"group": "none"}}
    config = small_config(
        str(tmp_path / "data"), tmp_path / "runs", model=model, density={"kind": "distance_to_mean", "num_channels": 16}
    )
    bundle = make_bundle(config)
    assert main(["evaluate", bundle, "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["categories"]["gear"]["mean_gap"] == report["mean"]["mean_gap"]
    assert "mean gap" in (tmp_path / "report/report.md").read_text()
    sweep = SweepConfig(base={}, space={"density.num_channels": {"choice": [8]}}, searcher="grid", objective="mean_gap")  # type: ignore[dict-item]
    assert sweep.objective == "mean_gap"


def test_the_docs_list_every_metric() -> None:
    page = (REPOSITORY / "docs/learn/evaluation.md").read_text()
    for key in METRICS:
        assert f"| `{key}` | {METRICS[key].title} |" in page


def test_a_configuration_with_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"density.kind: density 'gausian' is not known: did you mean 'gaussian'\?"):
        parse_config({"data": {"uri": "x"}, "density": {"kind": "gausian"}})
    with pytest.raises(ConfigError, match=r"model.backbone: backbone 'resnet81' is not known: did you mean 'resnet18'"):
        parse_config({"data": {"uri": "x"}, "model": {"backbone": "resnet81"}})
    with pytest.raises(DataError, match="format='mvtek'"):
        ingest(tmp_path, tmp_path / "out", format="mvtek")
