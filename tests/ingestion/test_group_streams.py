"""Groups on a cluster: streams that train on whole groups."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ingested import commit_of, ingest_quietly
from made_sources import pixels, save
from small_set import small_config

from focus_ray.data import store
from focus_ray.data.read import decode_rows
from focus_ray.fitting.shards import ImageBlock
from focus_ray.fitting.split import compute_split_plan
from focus_ray.training.streams import read_blocks_with_ray_data

pytestmark = pytest.mark.ray


def drop_group_of_a_part(root: Path) -> None:
    """Removes the column `group` from the first part file and from its rows in the index."""
    folder = root / "category=bolt"
    commit = commit_of(root)
    entry = commit["files"][0]
    table = pq.ParquetFile(folder / entry["name"]).read().drop(["group"])
    pq.write_table(table, folder / entry["name"], compression="none")
    assert commit["index"] is not None
    index_path = folder / commit["index"]["name"]
    index = pq.read_table(index_path)
    groups = ["" if row < table.num_rows else group for row, group in enumerate(index["group"].to_pylist())]
    field = index.schema.field("group")
    pq.write_table(index.set_column(index.schema.get_field_index("group"), field, [groups]), index_path)
    entry["num_bytes"] = (folder / entry["name"]).stat().st_size
    commit["index"]["sha256"] = hashlib.sha256(index_path.read_bytes()).hexdigest()
    for path in (folder / "_commit.json", folder / f"_commits/{commit['run_id']}.json"):
        path.write_text(json.dumps(commit))


def test_a_stream_gives_the_images_that_the_plan_trains_on_with_and_without_the_column(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 12)
    monkeypatch.setattr(store, "FILE_BYTES", 1)
    for number in range(30):
        save(tmp_path / f"bolt/good/p{number % 10}_{number}.png", pixels(number))
    ingest_quietly(tmp_path / "bolt", tmp_path / "out", group_by=r"name:^(p\d+)_")
    drop_group_of_a_part(tmp_path / "out")
    config = small_config(str(tmp_path / "out"), "unused", model={"image_size_px": 32})
    plan = compute_split_plan(config, "bolt")
    assert 0 < len(plan.fit) < 30
    blocks = [ImageBlock("bolt", plan.version, rows) for rows in np.array_split(plan.fit.rows, 4)]
    streamed = np.concatenate(list(read_blocks_with_ray_data(config, blocks)))
    assert np.array_equal(streamed, np.concatenate(list(decode_rows(config.data.uri, "bolt", plan.fit.rows, 32))))
