"""Inspects images with an export of `focus-ray export --to onnx`, without focus_ray and without torch.

pip install numpy onnxruntime pillow
python inspect_onnx.py bottle-onnx-fp32 IMAGE [IMAGE ...]
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_pixels(path: str) -> np.ndarray:
    """The image as focus_ray decodes it: uint8 (height, width, 3), RGB. Raises: ValueError: a kind that is not read."""
    image = Image.open(io.BytesIO(Path(path).read_bytes()))  # by name, Pillow 12 does not turn every TIFF
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(284, 1) != 1 or 338 in tags or set(tags.get(339, (1,))) != {1}:
        raise ValueError("a TIFF with separate planes, extra samples, signed or float values: save it as PNG")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which convert("RGB") would clip to white
        values, full = np.asarray(image).astype(np.int64), 2 ** max(tags.get(258, (16,))) - 1
        if full not in (2**12 - 1, 2**16 - 1) or values.min() < 0 or values.max() > full:
            raise ValueError("32-bit grey: save it as 8-bit or 16-bit")
        if tags.get(262) == 0:  # WhiteIsZero
            values = full - values
        image = Image.fromarray(((values * 65535 // full * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey: save it as 8-bit or 16-bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:  # composed over black
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return np.array(image.convert("RGB"))


folder, status = Path(sys.argv[1]), 0
about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(folder / about["model"], providers=["CPUExecutionProvider"])
for path in sys.argv[2:]:
    try:
        pixels = read_pixels(path)[None]  # of any size: the model resizes
        score, p_value, anomalous, anomaly_map, *_ = session.run(None, {"images": pixels})
        if not np.isfinite(float(score[0])):  # too thin an image for the frame, say
            raise ValueError("no place of the anomaly map shows this image, so there is no verdict: give one less thin")
        line = {
            "image": path,
            "verdict": "anomalous" if anomalous[0] else "normal",
            "score": float(score[0]),
            "p_value": float(p_value[0]),
            "threshold": about["thresholds"]["image"],
            "area_above_threshold": float((anomaly_map[0] > about["thresholds"]["pixel"]).mean()),  # share of the frame
        }
        print(json.dumps(line))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        status = 1
        print(json.dumps({"image": path, "error": str(error)}))
sys.exit(status)
