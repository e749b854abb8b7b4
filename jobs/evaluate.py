"""`focus-ray evaluate` as a job, alike under `python` and under `ray job submit -- python jobs/evaluate.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
