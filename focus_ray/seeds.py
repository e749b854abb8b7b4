"""Derives the seed of every random draw from the seed of a run. Each draw has a name, so that no two draws share a seed."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, draw: str, *numbers: int) -> int:
    """Returns a seed from 0 to 2**32 - 1 for one random draw of a run. The result is the same on every machine.

    Args:
        seed: the seed of the run.
        draw: name of the kind of draw, as in "order".
        numbers: distinguish draws of the same kind, for instance pass and rank.
    """
    entropy = [seed, zlib.crc32(draw.encode()), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
