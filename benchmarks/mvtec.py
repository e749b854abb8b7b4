"""MVTec AD, all categories it is given, beside the published figures.

python -m benchmarks.mvtec --data MVTEC_ROOT_OR_PARQUET_URI [--backbone wide_resnet50_2] [--num-workers 4]
"""

from benchmarks.published import main

PUBLISHED = {
    "FYD": {"mean": (97.7, 98.2)},
    "PaDiM R18": {"mean": (89.1, 96.7), "bottle": (None, 98.1), "screw": (None, 97.4)},
    "PaDiM WR50": {"mean": (95.3, 97.5)},
    "PatchCore 1 % WR50": {"mean": (99.0, 98.0), "bottle": (100.0, 98.5), "screw": (96.4, 99.2)},
    "PatchCore 10 % WR50": {"mean": (99.0, 98.1), "bottle": (100.0, 98.6), "screw": (97.0, 99.4)},
}

if __name__ == "__main__":
    main("mvtec", __doc__, PUBLISHED)
