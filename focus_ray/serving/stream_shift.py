"""Detects distribution shift in service: compares the latest scores of each version with its calibration scores.

Calibration scores are the scores of the normal images that set the threshold. Each ingress replica (a process that receives
requests) tests its own share of the images. Tests run in the background.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.shift import ScoreShift, StreamShiftMonitor, compare_stream_with_calibration
from focus_ray.serving.logs import log_event
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.source import get_version_key, get_version_labels

MAX_VERSIONS = 1024  # with scores in memory, about 10 kB each; the version that was idle for longest is dropped first


class StreamShiftDetector:
    """Holds the latest scores of each version that answered requests, and tests them for distribution shift."""

    def __init__(self, read_manifest: Callable[[Version], Awaitable[dict[str, Any]]], metrics: MetricsRecorder) -> None:
        """Creates an empty store of scores. Logs each shift once, and each test that fails.

        Args:
            read_manifest: returns the manifest of a version, which contains its calibration scores.
            metrics: receives the result of each test.
        """
        self._read_manifest, self._metrics = read_manifest, metrics
        self._recent_scores: OrderedDict[str, StreamShiftMonitor] = OrderedDict()
        self._tests: dict[str, asyncio.Task[None]] = {}

    def add_scores(self, version: Version, results: Sequence[Inspection | ImageError]) -> None:
        """Adds the scores of a request to the scores of a version, and starts a test if enough scores are new.

        Images that cannot be read have no score. No test starts while a test of the version runs. If there are more than
        MAX_VERSIONS versions, forgets the scores of the version that was idle for longest.
        """
        key = get_version_key(version)
        recent_scores = self._recent_scores.setdefault(key, StreamShiftMonitor())
        self._recent_scores.move_to_end(key)
        if len(self._recent_scores) > MAX_VERSIONS:
            self._recent_scores.popitem(last=False)
        is_test_due = recent_scores.add([result.score for result in results if not isinstance(result, ImageError)])
        if is_test_due and key not in self._tests:
            task = self._tests[key] = asyncio.create_task(self._test_for_shift(version, recent_scores))
            task.add_done_callback(lambda _: self._tests.pop(key, None))

    def get_latest_shift(self, version: Version) -> ScoreShift | None:
        """Returns the result of the last test of a version; None if there is no result."""
        recent_scores = self._recent_scores.get(get_version_key(version))
        return None if recent_scores is None else recent_scores.shift

    async def close(self) -> None:
        """Waits until the running tests have ended, at most 10 s."""
        if self._tests:
            await asyncio.wait(self._tests.values(), timeout=10)

    async def _test_for_shift(self, version: Version, recent_scores: StreamShiftMonitor) -> None:
        """Compares the latest scores of a version with its calibration scores; records the result, and logs a new shift.

        If the test fails, logs the reason instead of raising the error.
        """
        facts = get_version_labels(version)
        try:
            calibration = (await self._read_manifest(version))["calibration"]["image_scores"]
            shift = await asyncio.to_thread(
                compare_stream_with_calibration, calibration, recent_scores.take_scores_for_test()
            )
        except Exception as error:  # any error: the requests already have their answers
            log_event("shift not tested", level=logging.WARNING, error=str(error) or type(error).__name__, **facts)
            return
        notice = recent_scores.report_shift_once(shift)
        if shift is not None:
            self._metrics.record("shift_p_value", shift.p_higher, direction="higher", **facts)
            self._metrics.record("shift_p_value", shift.p_lower, direction="lower", **facts)
        if notice is not None:
            log_event("shift", level=logging.WARNING, notice=notice, **facts)
