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
from focus_ray.errors import DataError
from focus_ray.features.backbones.registry import BACKBONES
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
def test_every_kind_can_be_imported_and_an_unknown_kind_is_refused_with_the_nearest_name(component: str) -> None:
    table = TABLES[component]
    assert all(table[name] is not None for name in table)
    first = next(iter(table))
    with pytest.raises(ValueError, match=rf"{component} '{first}x' is not known: did you mean '{first}'"):
        table.check_name(f"{first}x")


def test_a_new_kind_of_each_table_works_from_ingestion_to_report(
    example_kinds: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = draw_parts(tmp_path / "drawn") / "gear"
    (tmp_path / "plant/gear").mkdir(parents=True)
    for old, new in (("train/good", "fine"), ("test/good", "checked"), ("test/scratch", "broken")):
        (drawn / old).rename(tmp_path / "plant/gear" / new)
    assert main(["ingest", str(tmp_path / "plant"), str(tmp_path / "data")]) == 0
    assert "format: plant" in capsys.readouterr().out
    model = {"backbone": "patches", "weights": "default"}
    density = {"kind": "distance_to_mean", "num_channels": 16}
    bundle = make_bundle(small_config(str(tmp_path / "data"), tmp_path / "runs", model=model, density=density))
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


def test_ingestion_refuses_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format='mvtek'"):
        ingest(tmp_path, tmp_path / "out", format="mvtek")
