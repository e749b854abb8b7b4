"""`focus-ray train` as a job, alike under `python` and under `ray job submit -- python jobs/train.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
