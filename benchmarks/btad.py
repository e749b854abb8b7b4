"""BTAD, its three classes, beside the published figures.

python -m benchmarks.btad --data BTAD_ROOT_OR_PARQUET_URI
"""

from benchmarks.published import main

PUBLISHED: dict[str, dict[str, tuple[float | None, float | None]]] = {"FYD": {"01": (99.6, 96.1)}}

if __name__ == "__main__":
    main("btad", __doc__, PUBLISHED)
