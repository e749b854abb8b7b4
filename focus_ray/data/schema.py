"""The Parquet schema of a data set, and what is said of a file that was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # category/folder/defect/stem, unique
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train or test
        pa.field("label", pa.int8(), nullable=False),  # 0 normal, 1 anomalous
        pa.field("defect_type", pa.string(), nullable=False),  # "good" where label is 0
        pa.field("image", pa.binary(), nullable=False),  # the file as it came
        pa.field("mask", pa.binary()),  # 1-bit PNG, width x height; null where not known or label is 0
        pa.field("width", pa.int32(), nullable=False),  # pixels, after EXIF rotation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # SHA-256 of size and decoded RGB pixels
        # the part or burst that the image shows; empty: the image is its own group. Sets from before this column lack it.
        pa.field("group", pa.string(), nullable=False),
    ],
    metadata={"focus_ray.schema_version": str(SCHEMA_VERSION)},
)
SPLITS = ("train", "test")
INDEX_COLUMNS = ("id", "split", "label", "defect_type", "width", "height", "site", "content_hash", "group")
INDEX_SCHEMA = pa.schema([SCHEMA.field(name) for name in INDEX_COLUMNS], metadata=SCHEMA.metadata)


def with_groups(table: pa.Table) -> pa.Table:
    """Returns the table with a `group` column, empty in each row if the table comes from before this column."""
    if "group" in table.column_names:
        return table
    return table.append_column(SCHEMA.field("group"), pa.array([""] * table.num_rows, pa.string()))


# of every file that was read for a category, images and masks: what tells that it is the same, and an image's pixels
SOURCE_COLUMNS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # whole: a local path or an s3:// URI
        pa.field("num_bytes", pa.int64(), nullable=False),  # -1: could not be read
        pa.field("stamp", pa.string(), nullable=False),  # ETag, or the time of change in ns
        pa.field("digest", pa.string(), nullable=False),  # SHA-256 hex of the bytes
        pa.field("content_hash", pa.string()),  # of an image that could be used
    ]
)

COMMIT_NAME = "_commit.json"

RejectReason = Literal[
    "empty",
    "not_an_image",
    "unsupported",
    "truncated",
    "too_large",
    "too_slow",
    "unreadable",
    "file_name",
    "missing_file",
    "mask_unreadable",
    "mask_size",
    "mask_on_good",
    "mask_ambiguous",
    "mask_without_image",
    "contradictory_label",
    "duplicate_across_splits",
    "duplicate_in_train",
]


@dataclass(frozen=True)
class Reject:
    """A source file that was left out: path relative to the source, and why."""

    path: str
    category: str
    reason: RejectReason
    detail: str


Row = dict[str, Any]
"""Column of `SCHEMA` -> Python value, of one row."""
