"""The pause before a retry."""

from __future__ import annotations

import random


def compute_retry_pause_s(attempt: int) -> float:
    """Returns the seconds to wait after a failed attempt. The pauses double up to 5 s, and vary between clients.

    Args: attempt: number of the attempt. The pause after attempt 0 is 0.05 s to 0.1 s.
    """
    return min(5.0, 0.1 * 2.0**attempt) * random.uniform(0.5, 1.0)
