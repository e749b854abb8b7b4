"""`focus-ray sweep` as a job, alike under `python` and under `ray job submit -- python jobs/sweep.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
