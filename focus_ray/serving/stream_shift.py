"""Distribution shift in service: the latest scores of each version, compared with the scores that set its threshold.

Belongs to one ingress replica, which sees its share of the images. Tests run behind the answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.shift import RecentScores, Shift, compare_stream
from focus_ray.serving.measures import Measures
from focus_ray.serving.source import version_key

MAX_VERSIONS = 1024  # whose scores are kept, about 10 kB each; the one that was idle for longest goes first


class StreamShifts:
    """The latest scores of each version that answered, and what their last test showed."""

    def __init__(
        self, manifest: Callable[[Version], Awaitable[dict[str, Any]]], measures: Measures, log: Callable[..., None]
    ) -> None:
        """
        Args:
            manifest: gives a version's manifest, whose calibration scores are compared with.
            measures: told of each test.  log: told once of each shift.
        """
        self._manifest, self._measures, self._log = manifest, measures, log
        self._recent: OrderedDict[str, RecentScores] = OrderedDict()
        self._tests: dict[str, asyncio.Task[None]] = {}

    def add(self, version: Version, results: Sequence[Inspection | ImageError]) -> None:
        """Takes the results of a request, and begins a test where one is due."""
        key = version_key(version)
        recent = self._recent.setdefault(key, RecentScores())
        self._recent.move_to_end(key)
        if len(self._recent) > MAX_VERSIONS:
            self._recent.popitem(last=False)
        due = recent.add([result.score for result in results if not isinstance(result, ImageError)])
        if due and key not in self._tests:
            task = self._tests[key] = asyncio.create_task(self._test(version, recent))
            task.add_done_callback(lambda _: self._tests.pop(key, None))

    def of(self, version: Version) -> Shift | None:
        """The last test of a version's images; None before the first."""
        recent = self._recent.get(version_key(version))
        return None if recent is None else recent.shift

    async def close(self) -> None:
        """Waits for the tests under way."""
        if self._tests:
            await asyncio.wait(self._tests.values(), timeout=10)

    async def _test(self, version: Version, recent: RecentScores) -> None:
        facts = {"team": version.team, "category": version.category, "version": version.name}
        try:
            calibration = (await self._manifest(version))["calibration"]["image_scores"]
            shift = await asyncio.to_thread(compare_stream, calibration, recent.take())
        except Exception as error:  # whatever it is, the requests have their answers
            self._log("shift not tested", level=logging.WARNING, error=str(error) or type(error).__name__, **facts)
            return
        notice = recent.report_once(shift)
        if shift is not None:
            self._measures.shift(version, shift)
        if notice is not None:
            self._log("shift", level=logging.WARNING, notice=notice, **facts)
