"""Inspects images with an export of `focus-ray export --to torch`: torch alone, without focus_ray.

pip install numpy pillow torch
python inspect_torch.py bottle-torch-fp32 IMAGE [IMAGE ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

folder = Path(sys.argv[1])
about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
model = torch.export.load(folder / about["model"]).module()
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # transparency is composed over black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    pixels = torch.from_numpy(np.array(image.convert("RGB")))[None]  # (1, height, width, 3), uint8, of any size
    with torch.inference_mode():
        score, p_value, anomalous, anomaly_map, *_ = model(pixels)
    line = {
        "image": path,
        "verdict": "anomalous" if anomalous[0] else "normal",
        "score": float(score[0]),
        "p_value": float(p_value[0]),
        "threshold": about["thresholds"]["image"],
        "area_above_threshold": float((anomaly_map[0] > about["thresholds"]["pixel"]).float().mean()),
    }
    print(json.dumps(line))
