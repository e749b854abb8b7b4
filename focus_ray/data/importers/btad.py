"""The importer for the public data set BTAD, where ok/ contains good images and ko/ defective images."""

from __future__ import annotations

from focus_ray.data.importers.base import FolderImporter
from focus_ray.data.importers.mvtec import is_btad_folder, plan_mvtec_import

BTAD = FolderImporter("train/ok with test/ok and test/ko", is_btad_folder, plan_mvtec_import)
