"""The model of a watch. It is reloaded when its bundle is replaced, or when its alias in the registry has moved."""

from __future__ import annotations

import time
from collections.abc import Callable

from focus_ray.bundle.bundle import MANIFEST
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.published import find_bundles_in_folder_or_registry
from focus_ray.bundle.registry import LATEST
from focus_ray.errors import DataError, FocusRayError
from focus_ray.storage.files import FileStat, join_path, read_file_stat

CHECK_INTERVAL_S = 5.0  # least number of seconds between two checks for a new model


class ReloadableModel:
    """The current model at a URI. `reload_if_changed` loads it again after a change.

    Attributes:
        inspector: Inspector with the loaded model; a reload replaces it by a new one.
    """

    def __init__(
        self,
        uri: str,
        load: Callable[[str], Inspector],
        log: Callable[[str], None],
        *,
        version: str = LATEST,
        category: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            uri: A bundle, the folder of a run, or a registry or a team's folder in a registry.
            load: Loads the bundle at a URI.
            log: Takes messages about loaded models and failed reloads.
            version: Version or alias, if the URI is a registry.
            category: Category of the model; required if the URI has models of several categories.

        Raises:
            DataError: There is no model, or the URI has models of several categories and `category` is None.
            FocusRayError: The model cannot be read, or `load` fails.
        """
        self.uri, self.load, self.log, self.version, self.category = uri, load, log, version, category
        self._last_error, self._checked_at_s = "", time.monotonic()
        self._location = self._find_current_bundle(log)
        self.inspector = load(self._location[0])
        self._log_model()

    def reload_if_changed(self) -> None:
        """Loads the current model if it has changed. Does nothing within `CHECK_INTERVAL_S` seconds after the last check.

        If the current model cannot be loaded, logs the error and keeps the old model.
        """
        if time.monotonic() < self._checked_at_s + CHECK_INTERVAL_S:
            return
        try:
            location = self._find_current_bundle(lambda message: None)
            if location != self._location:
                inspector = self.load(location[0])
                self._location = location
                if inspector.bundle.version != self.inspector.bundle.version:
                    self.inspector = inspector
                    self._log_model()
            self._last_error = ""
        except (FocusRayError, OSError, RuntimeError) as error:  # torch raises RuntimeError if memory is full
            if self._last_error != str(error):
                self.log(f"watch: keeps the model of version {self.inspector.bundle.version[:16]}: {error}")
            self._last_error = str(error)
        self._checked_at_s = time.monotonic()

    def _log_model(self) -> None:
        """Logs category, version and location of the loaded model, and the caveats of its calibration."""
        bundle = self.inspector.bundle
        self.log(f"watch: model of {bundle.category}, version {bundle.version[:16]}, from {self._location[0]}")
        for caveat in bundle.calibration.describe_limits():
            self.log(f"note: {caveat}")

    def _find_current_bundle(self, log: Callable[[str], None]) -> tuple[str, FileStat | None]:
        """Returns the URI of the current bundle and the stamp (time and size) of its manifest, which changes with the manifest.

        The stamp is None if the manifest was just deleted. `log` gets a message for each category without a usable version.

        Raises:
            DataError: There is no model of this category, or `category` is None and there are several models.
            FocusRayError: The folder or registry cannot be read.
        """
        if (manifest_stamp := read_file_stat(join_path(self.uri, MANIFEST))) is not None:
            return self.uri, manifest_stamp
        bundles = find_bundles_in_folder_or_registry(self.uri, self.version, log)
        if self.category is None and len(bundles) > 1:
            raise DataError(f"{self.uri}: has models of {', '.join(sorted(bundles))}: choose one with --category")
        name = self.category or next(iter(bundles))
        if name not in bundles:
            raise DataError(f"{self.uri}: has no model of {name!r}, only of {', '.join(sorted(bundles))}")
        return bundles[name], read_file_stat(join_path(bundles[name], MANIFEST))
