"""The model that watches: taken anew when its bundle is replaced, or its registry names another version."""

from __future__ import annotations

import time
from collections.abc import Callable

from focus_ray.bundle.bundle import MANIFEST
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.published import bundles_at
from focus_ray.bundle.registry import LATEST
from focus_ray.errors import DataError, FocusRayError
from focus_ray.storage import FileStamp, join, read_stamp

LOOK_EVERY_S = 5.0


class WatchedModel:
    """The inspector of a place as it is now."""

    def __init__(
        self,
        place: str,
        load: Callable[[str], Inspector],
        log: Callable[[str], None],
        *,
        version: str = LATEST,
        category: str | None = None,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        """
        Args:
            place: a bundle, a run's folder, or a registry or a team's folder of one.
            load: reads a bundle.
            version: of a registry's models, a version's name or an alias.
            category: which, where the place has several.

        Raises: FocusRayError: there is no model, or more than one, or it cannot be read.
        """
        self.place, self.load, self.log = place, load, log
        self.version, self.category, self.look_every_s = version, category, look_every_s
        self._stamp, self._trouble = self._find(log), ""
        self._looked = time.monotonic()
        self.inspector = load(self._stamp[0])
        self._tell()

    def look(self) -> None:
        """Loads what is there now where it is another; what cannot be read is told, and the model stays as it is."""
        if time.monotonic() < self._looked + self.look_every_s:
            return
        try:
            found = self._find(lambda message: None)
            if found != self._stamp:
                inspector = self.load(found[0])
                self._stamp = found
                if inspector.bundle.version != self.inspector.bundle.version:
                    self.inspector = inspector
                    self._tell()
            self._trouble = ""
        except (
            FocusRayError,
            OSError,
            RuntimeError,
        ) as error:  # torch's, where a second model has no room beside the first
            if self._trouble != str(error):
                self.log(f"watch: the model stays at {self.inspector.bundle.version[:16]}: {error}")
            self._trouble = str(error)
        self._looked = time.monotonic()

    def _tell(self) -> None:
        bundle = self.inspector.bundle
        self.log(f"watch: model of {bundle.category}, version {bundle.version[:16]}, from {self._stamp[0]}")
        for caveat in bundle.calibration.caveats():
            self.log(f"note: {caveat}")

    def _find(self, log: Callable[[str], None]) -> tuple[str, FileStamp | None]:
        """The bundle, and its manifest's stamp."""
        if (own := read_stamp(join(self.place, MANIFEST))) is not None:
            return self.place, own
        found = bundles_at(self.place, self.version, log)
        if self.category is None and len(found) > 1:
            raise DataError(f"{self.place}: models of {', '.join(sorted(found))}: choose one with --category")
        name = self.category or next(iter(found))
        if name not in found:
            raise DataError(f"{self.place}: no model of {name!r}, only of {', '.join(sorted(found))}")
        return found[name], read_stamp(join(found[name], MANIFEST))
