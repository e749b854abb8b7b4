"""`focus-ray registry publish` as a job, alike under `python` and under `ray job submit -- python jobs/publish.py`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["registry", "publish", *sys.argv[1:]]))
