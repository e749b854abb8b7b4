"""The Parquet schemas of a data set, and the description of a rejected source file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from focus_ray.data.image_errors import Reason

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # category/folder/defect/stem, unique in the category
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train or test
        pa.field("label", pa.int8(), nullable=False),  # 0 normal, 1 anomalous
        pa.field("defect_type", pa.string(), nullable=False),  # "good" where label is 0
        pa.field("image", pa.binary(), nullable=False),  # the bytes of the source file, unchanged
        pa.field("mask", pa.binary()),  # 1-bit PNG, width x height; null if there is no mask or label is 0
        pa.field("width", pa.int32(), nullable=False),  # pixels, after EXIF rotation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("site", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),  # SHA-256 of size and decoded RGB pixels
        # name of the part or burst that the image shows; empty: the image is its own group. Older data sets lack this column.
        pa.field("group", pa.string(), nullable=False),
    ],
    metadata={"focus_ray.schema_version": str(SCHEMA_VERSION)},
)
SPLITS = ("train", "test")
INDEX_COLUMNS = ("id", "split", "label", "defect_type", "width", "height", "site", "content_hash", "group")
INDEX_SCHEMA = pa.schema([SCHEMA.field(name) for name in INDEX_COLUMNS], metadata=SCHEMA.metadata)


def add_missing_group_column(table: pa.Table) -> pa.Table:
    """Returns the table with a `group` column. In tables of older data sets, which lack it, an empty column is added."""
    if "group" in table.column_names:
        return table
    return table.append_column(SCHEMA.field("group"), pa.array([""] * table.num_rows, pa.string()))


# The source manifest: one row per source file of a category (images and masks), to recognise unchanged files.
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # complete: a local path or an s3:// URI
        pa.field("num_bytes", pa.int64(), nullable=False),  # -1: the file could not be read
        pa.field("stamp", pa.string(), nullable=False),  # ETag on S3, time of the last change in ns on a disk
        pa.field("digest", pa.string(), nullable=False),  # SHA-256 hex of the file's bytes
        pa.field("content_hash", pa.string()),  # of an image without errors; null for masks and rejected images
    ]
)

COMMIT_NAME = "_commit.json"

RejectReason = Literal[
    Reason,
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
class RejectedFile:
    """A source file that was not ingested: its path relative to the source, category, reason code and explanation."""

    path: str
    category: str
    reason: RejectReason
    detail: str


Row = dict[str, Any]
"""One row of a data set: column of `SCHEMA` -> Python value."""
