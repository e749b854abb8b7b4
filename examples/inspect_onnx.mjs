// Inspects images with an export of `focus-ray export --to onnx`, on Node.js.
//
// ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node sharp    (skip: the CPU's library comes with the package)
// node inspect_onnx.mjs bottle-onnx-fp32 IMAGE [IMAGE ...]

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

// packages are looked for where the command runs, or where NODE_PATH says
const require = createRequire(join(process.cwd(), "package.json"));
const ort = require("onnxruntime-node");
const sharp = require("sharp");

// RGBA to RGB over black, rounded as Pillow does; sharp's own flatten rounds down
function overBlack(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let pixel = 0; pixel < rgba.length / 4; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const product = rgba[4 * pixel + channel] * rgba[4 * pixel + 3] + 128;
      rgb[3 * pixel + channel] = (product + (product >> 8)) >> 8;
    }
  }
  return rgb;
}

const [folder, ...paths] = process.argv.slice(2);
const about = JSON.parse(readFileSync(join(folder, "model.json"), "utf8"));
const session = await ort.InferenceSession.create(join(folder, about.model));
for (const path of paths) {
  // turned as EXIF says, RGB of 8 bits; of any size: the model resizes
  const image = sharp(path).rotate().toColourspace("srgb");
  const { data, info } = await image.raw({ depth: "uchar" }).toBuffer({ resolveWithObject: true });
  const pixels = info.channels === 4 ? overBlack(data) : new Uint8Array(data);
  const images = new ort.Tensor("uint8", pixels, [1, info.height, info.width, 3]);
  const found = await session.run({ images });
  if (!Number.isFinite(found.score.data[0])) {
    process.exitCode = 1; // too thin an image for the frame, say
    const error = "no place of the anomaly map shows this image, so there is no verdict: give one less thin";
    console.log(JSON.stringify({ image: path, error }));
    continue;
  }
  const map = found.anomaly_map.data;
  const above = map.reduce((count, value) => count + (value > about.thresholds.pixel), 0);
  console.log(
    JSON.stringify({
      image: path,
      verdict: found.anomalous.data[0] ? "anomalous" : "normal",
      score: found.score.data[0],
      p_value: found.p_value.data[0],
      threshold: about.thresholds.image,
      area_above_threshold: above / map.length,
    }),
  );
}
