"""ADEval's pixel AUROC and AUPRO of the maps of an .npz file; needs ADEval in its environment."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

if not hasattr(np, "trapz"):  # ADEval 1.1 calls it; numpy 2.4 has it under its new name alone
    np.trapz = np.trapezoid  # type: ignore[attr-defined]
from adeval import auroc_aupr_aupro

held = np.load(sys.argv[1])
maps, masks = held["maps"], held["masks"]
taken = []
for _ in range(5):
    start = time.perf_counter()
    area, _, overlap = auroc_aupr_aupro(maps, masks)
    taken.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(taken)[2], "pixel_auroc": float(area), "aupro": float(overlap)}))
