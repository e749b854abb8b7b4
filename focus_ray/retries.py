"""The pauses before retries."""

from __future__ import annotations

import random

_LONGEST_PAUSE_S = 5.0


def compute_retry_pause_s(attempt: int) -> float:
    """Returns the seconds to wait after a failed attempt. The pauses double up to 5 s, and vary between clients.

    Args: attempt: number of the attempt. The pause after attempt 0 is 0.05 s to 0.1 s.
    """
    return min(_LONGEST_PAUSE_S, 0.1 * 2.0**attempt) * random.uniform(0.5, 1.0)


def compute_longest_wait_s(num_attempts: int) -> float:
    """Returns the longest sum of the pauses between attempts, in seconds."""
    return sum(min(_LONGEST_PAUSE_S, 0.1 * 2.0**attempt) for attempt in range(1, num_attempts))
