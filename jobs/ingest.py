"""`focus-ray ingest` as a job, alike under `python` and under `ray job submit -- python jobs/ingest.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
