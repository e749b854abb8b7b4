"""Seeds that follow from a run's seed: each draw has a name, so that no two share one and none is a number of its own."""

from __future__ import annotations

import zlib

import numpy as np


def derived_seed(seed: int, what: str, *numbers: int) -> int:
    """A seed, in 0..2**32 - 1, for one kind of draw of a run; the same on every machine.

    Args:
        seed: the run's.  what: names the draw, as in "epoch".  numbers: tell draws of a kind apart, as epoch and rank.
    """
    entropy = [seed, zlib.crc32(what.encode()), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
