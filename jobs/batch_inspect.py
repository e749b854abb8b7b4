"""`focus-ray inspect-batch` as a job, alike under `python` and under `ray job submit -- python jobs/batch_inspect.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect-batch", *sys.argv[1:]]))
