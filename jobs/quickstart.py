"""The main job on an embedded default: made-up parts -> Parquet -> training -> report -> one inspected image."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from focus_ray.cli.main import main as focus_ray

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def run_command(*arguments: str) -> None:
    print(f"\n$ focus-ray {' '.join(arguments)}", file=sys.stderr, flush=True)
    status = focus_ray(arguments)
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="quickstart", help="folder for all that is made; replaced if it is there")
    root = Path(parser.parse_args().output)
    start = time.monotonic()
    if root.exists():
        if root.is_dir() and (not any(root.iterdir()) or (root / "images").is_dir()):
            shutil.rmtree(root)  # an earlier quickstart's, or empty
        else:
            sys.exit(f"{root}: holds something else than an earlier quickstart: give another --output")
    images, data, run = root / "images", root / "data", root / "runs" / "quickstart"
    run_command("samples", str(images))
    run_command("ingest", str(images), str(data))
    run_command("train", str(CONFIG), f"data.uri={data}", f"storage={root / 'runs'}")
    run_command("evaluate", str(run))
    category = sorted(path.name for path in images.iterdir())[0]
    defect = sorted(path.name for path in (images / category / "test").iterdir() if path.name != "good")[0]
    picture = sorted((images / category / "test" / defect).iterdir())[0]
    run_command("inspect", str(run / "bundles" / category), str(picture), "--overlays", str(root / "overlays"))
    print(
        f"\nquickstart: {time.monotonic() - start:.0f} s\n"
        f"  report    {run / 'report' / 'report.html'}\n"
        f"  bundles   {run / 'bundles'}\n"
        f"  heat map  {root / 'overlays' / (picture.stem + '.png')}"
    )


if __name__ == "__main__":
    main()
