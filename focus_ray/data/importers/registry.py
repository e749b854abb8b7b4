"""The importers by name. A new importer is one file in this folder and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focus_ray.settings.kinds import LazyRegistry

if TYPE_CHECKING:
    from focus_ray.data.importers.base import Importer

# in the order in which they are compared with a folder
IMPORTERS: LazyRegistry[Importer] = LazyRegistry(
    "format",
    {
        "visa": "focus_ray.data.importers.visa:VISA",
        "mvtec": "focus_ray.data.importers.mvtec:MVTEC",
        "btad": "focus_ray.data.importers.btad:BTAD",
        "folder": "focus_ray.data.importers.folder:FOLDER",
    },
)
