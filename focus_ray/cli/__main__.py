"""`python -m focus_ray.cli`."""

import sys

from focus_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
