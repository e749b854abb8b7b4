// The page of the inspection service. Talks to /v1 of its own origin only; the token stays in this tab's memory.
"use strict";
const $ = (id) => document.getElementById(id);
const state = { token: "", team: "", card: null, items: [], chosen: -1, stream: null, watching: false };
const HEAT = [[8, 6, 60], [96, 20, 120], [196, 50, 70], [250, 150, 30], [255, 250, 190]];
const EXAMPLES = 6;
const KEPT = 50; // of the anomalous pictures that the camera took by itself

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").className = failed ? "failed" : "";
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.Authorization = "Bearer " + state.token;
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch {
      throw new Error("The service cannot be reached.");
    }
    if ([429, 503].includes(response.status) && attempt < 5) {
      const wait = Math.min(10, Number(response.headers.get("retry-after")) || 1);
      await new Promise((done) => setTimeout(done, wait * 1000));
      continue;
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({ detail: response.statusText }));
    throw new Error(`${response.status}: ${problem.detail}`);
  }
}

const place = () => `v1/${encodeURIComponent(state.team)}/${encodeURIComponent($("category").value)}`;
const query = (more = {}) => {
  const named = $("version").value ? { version: $("version").value } : {};
  const text = new URLSearchParams({ ...named, ...more }).toString();
  return text ? "?" + text : "";
};

function fill(select, values, labels = values) {
  select.replaceChildren(...values.map((value, n) => new Option(labels[n], value)));
  select.disabled = values.length === 0;
}

async function open() {
  state.token = $("token").value.trim();
  const who = await (await ask("v1")).json();
  fill($("team"), who.teams);
  state.mayAdmin = who.scopes.includes("admin");
  $("team-row").hidden = who.teams.length < 2;
  if (who.teams.length) await chooseTeam();
  else say("There is no team yet: publish a bundle.");
}

async function chooseTeam() {
  clear();
  state.card = null;
  state.team = $("team").value;
  const { categories } = await (await ask(`v1/${encodeURIComponent(state.team)}`)).json();
  fill($("category"), categories);
  fill($("version"), []);
  say(categories.length ? `Team ${state.team}: ${categories.length} categories.` : `Team ${state.team} has no category yet.`);
  if (categories.length) await chooseCategory();
}

async function chooseCategory() {
  const known = await (await ask(`${place()}/versions`)).json();
  const aliases = Object.keys(known.aliases).sort();
  const names = known.versions.map((one) => one.version).reverse();
  fill($("version"), ["", ...aliases, ...names],
    ["as configured", ...aliases.map((alias) => `${alias} (${known.aliases[alias]})`), ...names]);
  await chooseVersion();
}

async function chooseVersion() {
  clear();
  state.card = await (await ask(place() + query())).json();
  showCaveats(state.card);
}

function showCaveats(card) {
  $("caveats").textContent = card.caveats.join(" ");
}

function clear() {
  for (const item of state.items) URL.revokeObjectURL(item.url);
  state.items = [];
  state.chosen = -1;
  $("list").replaceChildren();
  $("detail").hidden = true;
  $("examples").replaceChildren();
}

async function add(files) {
  if (!state.card) { say("Open with a token and choose a category first.", true); return; }
  for (const file of files) {
    const item = itemOf(file);
    list(item);
    await inspect(item);
    if (state.items.includes(item)) choose(state.items.indexOf(item));
  }
  showCaveats(await (await ask(place() + query())).json()); // these images may have shown a shift of the scores
}

const itemOf = (file) => ({ name: file.name || "image", file, url: URL.createObjectURL(file), result: null, error: null });

function list(item) {
  state.items.push(item);
  item.button = document.createElement("button");
  item.button.type = "button";
  const picture = document.createElement("img");
  picture.src = item.url;
  picture.alt = "";
  const text = document.createElement("span");
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = item.name;
  item.label = document.createElement("span");
  text.append(name, item.label);
  item.button.append(picture, text);
  item.button.addEventListener("click", () => choose(state.items.indexOf(item)));
  const entry = document.createElement("li");
  entry.append(item.button);
  $("list").append(entry);
  label(item);
}

function label(item) {
  const { result, error } = item;
  item.label.textContent = error || (result ? `${result.verdict}, score ${result.score.toFixed(2)}` : "waiting");
  item.label.className = error ? "failed" : result ? result.verdict : "";
}

function unlist(item) {
  const chosen = state.items[state.chosen];
  state.items.splice(state.items.indexOf(item), 1);
  state.chosen = state.items.indexOf(chosen);
  item.button.parentElement.remove();
  URL.revokeObjectURL(item.url);
}

async function inspect(item) {
  say(`Inspecting ${item.name} ...`);
  try {
    const body = { method: "POST", body: item.file, headers: { "Content-Type": "application/octet-stream" } };
    item.answer = await (await ask(`${place()}/inspect${query({ include: "map" })}`, body)).json();
    const result = item.answer.results[0];
    item.bitmap = await decode(item);
    item.map = await readMap(result.map);
    item.result = result;
    say(`${item.name}: ${item.result.verdict}.`);
  } catch (error) {
    item.error = error.message;
    say(`${item.name}: ${error.message}`, true);
  }
  if (item.label) label(item);
}

// The browser's own decoder, turned as the file says; TIFF and the like have none: then the map alone is shown.
async function decode(item) {
  try { return await createImageBitmap(item.file, { imageOrientation: "from-image" }); } catch { return null; }
}

async function readMap(map) {
  const bytes = Uint8Array.from(atob(map.png), (c) => c.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const data = context.getImageData(0, 0, picture.width, picture.height).data;
  const values = new Float32Array(picture.width * picture.height);
  for (let n = 0; n < values.length; n++) values[n] = (data[4 * n] * map.high) / 255;
  return { values, width: picture.width, height: picture.height, high: map.high };
}

// scroll: not for the camera's pictures, whose sign has to stay in sight
function choose(number, scroll = true) {
  const item = state.items[number];
  if (!item) return;
  state.chosen = number;
  state.items.forEach((one, n) => one.button.setAttribute("aria-current", String(n === number)));
  if (scroll) item.button.scrollIntoView({ block: "nearest" });
  if (!item.result) { $("detail").hidden = true; return; }
  $("detail").hidden = false;
  const result = item.result;
  $("verdict").textContent = `${item.name}: ${result.verdict}`;
  $("verdict").className = "verdict " + result.verdict;
  $("threshold").max = item.map.high;
  $("threshold").step = item.map.high / 500;
  $("threshold").value = result.pixel_threshold;
  const facts = {
    "Score": `${result.score.toFixed(4)}  (threshold ${result.threshold.toFixed(4)})`,
    "p-value": result.p_value.toPrecision(3),
    "Size": `${result.width} x ${result.height} pixels`,
    "Version": `${item.answer.version}  ${item.answer.sha256.slice(0, 12)}`,
    "Request": item.answer.request_id,
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([key, value]) => {
    const term = document.createElement("dt"), description = document.createElement("dd");
    term.textContent = key;
    description.textContent = value;
    return [term, description];
  }));
  $("regions").tBodies[0].replaceChildren(...result.regions.map((region) => {
    const row = document.createElement("tr");
    for (const key of ["x", "y", "width", "height", "area", "peak"]) {
      row.insertCell().textContent = key === "peak" ? region[key].toFixed(2) : region[key];
    }
    return row;
  }));
  if (!result.regions.length) {
    const cell = $("regions").tBodies[0].insertRow().insertCell();
    cell.colSpan = 6;
    cell.textContent = "none";
  }
  draw();
  drawHistogram(result.score);
  $("save-row").hidden = !state.mayAdmin;
  $("save-note").hidden = true;
  setImageThreshold(state.card.calibration.image_threshold);
  if (!$("examples").childElementCount) showExamples();
}

function draw() {
  const item = state.items[state.chosen];
  if (!item || !item.result) return;
  const { values, width, height } = item.map;
  const threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(2);
  const canvas = $("overlay");
  const scale = Math.min(1, 1024 / Math.max(item.result.width, item.result.height));
  canvas.width = Math.max(1, Math.round(item.result.width * scale));
  canvas.height = Math.max(1, Math.round(item.result.height * scale));
  const context = canvas.getContext("2d");
  if (item.bitmap) context.drawImage(item.bitmap, 0, 0, canvas.width, canvas.height);
  let above = 0;
  const layer = new ImageData(width, height);
  for (let n = 0; n < values.length; n++) {
    const at = Math.min(1, values[n] / (2 * item.result.pixel_threshold)) * (HEAT.length - 1);
    const index = Math.min(HEAT.length - 2, Math.floor(at)), part = at - index;
    for (let c = 0; c < 3; c++) layer.data[4 * n + c] = HEAT[index][c] * (1 - part) + HEAT[index + 1][c] * part;
    const over = values[n] > threshold;
    above += over;
    layer.data[4 * n + 3] = over ? 165 : 25;
  }
  if ($("show-map").checked) {
    const small = new OffscreenCanvas(width, height);
    small.getContext("2d").putImageData(layer, 0, 0);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }
  if ($("show-regions").checked) {
    context.strokeStyle = "#00e5ff";
    context.lineWidth = Math.max(1, canvas.width / 200);
    for (const region of item.result.regions) {
      context.strokeRect(region.x * scale, region.y * scale, region.width * scale, region.height * scale);
    }
  }
  const share = (100 * above / values.length).toFixed(2);
  canvas.setAttribute("aria-label", `${item.name} with heat map: ${share} % of it above ${threshold.toFixed(2)}`);
  canvas.dataset.above = String(above);
}

function setImageThreshold(value) {
  const { image_scores: scores, image_threshold: calibrated } = state.card.calibration;
  const slider = $("image-threshold");
  slider.max = 2 * Math.max(calibrated, ...scores);
  slider.step = slider.max / 1000;
  slider.value = value;
  showImageThreshold();
}

function showImageThreshold() {
  const threshold = Number($("image-threshold").value), scores = state.card.calibration.image_scores;
  const above = scores.filter((score) => score > threshold).length;
  $("image-threshold-value").textContent = `${threshold.toFixed(3)}: ${above} of ${scores.length} good images lie above`;
  const item = state.items[state.chosen];
  if (item && item.result) drawHistogram(item.result.score, threshold);
}

async function saveThresholds() {
  const image = Number($("image-threshold").value), pixel = Number($("threshold").value);
  const answer = await ask(`${place()}/versions/${encodeURIComponent(state.card.version)}/thresholds`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ image_threshold: image, pixel_threshold: pixel }),
  });
  const made = await answer.json();
  $("save-note").hidden = false;
  $("save-note").textContent =
    `Saved as version ${made.version}. It is the latest; other aliases stay where they are until someone promotes it.`;
}

function drawHistogram(score, chosen = null) {
  const canvas = $("histogram"), { image_scores: scores, image_threshold: calibrated } = state.card.calibration;
  const threshold = chosen === null ? calibrated : chosen;
  const density = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * density;
  canvas.height = canvas.clientHeight * density;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  const width = canvas.clientWidth, height = canvas.clientHeight - 34, high = 1.08 * Math.max(score, threshold, ...scores);
  const low = Math.min(score, ...scores) * 0.95, bins = new Array(24).fill(0);
  for (const one of scores) bins[Math.min(23, Math.floor(((one - low) / (high - low)) * 24))]++;
  const text = getComputedStyle(document.body).color, most = Math.max(...bins);
  context.fillStyle = "#7aa6d8";
  bins.forEach((count, n) => {
    const tall = (count / most) * (height - 16);
    context.fillRect((n * width) / 24 + 1, 16 + height - 16 - tall, width / 24 - 2, tall);
  });
  const style = getComputedStyle(document.documentElement);
  const mark = (value, colour, label, y) => {
    const x = ((value - low) / (high - low)) * width;
    context.strokeStyle = context.fillStyle = style.getPropertyValue(colour).trim();
    context.lineWidth = 2;
    context.beginPath(); context.moveTo(x, 0); context.lineTo(x, height); context.stroke();
    context.font = "13px system-ui, sans-serif";
    context.textAlign = x > width / 2 ? "right" : "left";
    context.fillText(label, x + (x > width / 2 ? -5 : 5), y);
  };
  mark(threshold, "--accent", `threshold ${threshold.toFixed(2)}`, height + 14);
  mark(score, score > threshold ? "--bad" : "--good", `this image ${score.toFixed(2)}`, height + 30);
  context.strokeStyle = text;
  context.lineWidth = 1;
  context.beginPath(); context.moveTo(0, height); context.lineTo(width, height); context.stroke();
  canvas.setAttribute("aria-label",
    `Score ${score.toFixed(2)}, threshold ${threshold.toFixed(2)}, ${scores.length} calibration scores from ${scores[0].toFixed(2)} to ${scores.at(-1).toFixed(2)}`);
}

async function showExamples() {
  const where = place(), named = query();
  for (let number = 0; number < EXAMPLES; number++) {
    try {
      const blob = await (await ask(`${where}/examples/${number}${named}`)).blob();
      const picture = document.createElement("img");
      picture.src = URL.createObjectURL(blob);
      picture.alt = `good example ${number + 1}`;
      $("examples").append(picture);
    } catch {
      if (!number) $("examples").textContent = "This service shows no training images.";
      return;
    }
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const CAMERA_REFUSED = {
  NotAllowedError: "This page may not use the camera: allow it at the camera sign beside the address, and in the system's settings, then press \"use the camera\" again.",
  NotFoundError: "There is no camera here: plug one in, then press \"use the camera\" again.",
  NotReadableError: "The camera cannot be read: another program may use it; close that, then press \"use the camera\" again.",
};

async function cameraOn() {
  const devices = navigator.mediaDevices;
  if (!devices) throw new Error("The browser gives a camera only to pages on https:// or on localhost: open this one so.");
  const chosen = $("camera-choice").value;
  stopStream();
  try {
    const video = { width: { ideal: 1920 }, ...(chosen ? { deviceId: { exact: chosen } } : { facingMode: "environment" }) };
    state.stream = await devices.getUserMedia({ video });
  } catch (error) {
    cameraOff();
    throw new Error(CAMERA_REFUSED[error.name] || `The camera does not open: ${error.message || error.name}`);
  }
  const [track] = state.stream.getVideoTracks();
  track.addEventListener("ended", () => { cameraOff(); say("The camera is gone: plug it in, then press \"use the camera\" again.", true); });
  const cameras = (await devices.enumerateDevices()).filter((device) => device.kind === "videoinput");
  fill($("camera-choice"), cameras.map((one) => one.deviceId), cameras.map((one, n) => one.label || `camera ${n + 1}`));
  $("camera-choice").value = track.getSettings().deviceId;
  $("camera-choice-row").hidden = cameras.length < 2;
  $("video").srcObject = state.stream;
  $("video").hidden = $("camera-row").hidden = false;
  $("camera").hidden = true;
  await $("video").play();
  await again(); // of another camera, where pictures were being taken
}

function stopStream() {
  if (state.stream) state.stream.getTracks().forEach((track) => track.stop());
  state.stream = null;
}

function cameraOff() {
  stopStream();
  $("again").checked = false;
  $("video").hidden = $("camera-row").hidden = $("sign").hidden = $("again-note").hidden = true;
  $("camera").hidden = false;
}

async function picture() {
  const video = $("video"), canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/png" });
  return new File([blob], `camera-${new Date().toISOString().slice(11, 23).replace(/[:.]/g, "-")}.png`, { type: "image/png" });
}

async function capture() {
  if (!state.card) { say("Open with a token and choose a category first.", true); return; }
  const item = itemOf(await picture());
  list(item);
  await inspect(item);
  showSign(item);
  if (state.items.includes(item)) choose(state.items.indexOf(item), false);
}

function showSign(item) {
  const sign = $("sign"), word = document.createElement("b");
  word.textContent = item.error ? "?" : { normal: "OK", anomalous: "NG" }[item.result.verdict];
  const detail = item.error || `score ${item.result.score.toFixed(2)}, threshold ${item.result.threshold.toFixed(2)}`;
  const when = document.createElement("small");
  when.textContent = new Date().toLocaleTimeString();
  sign.replaceChildren(word, detail, when);
  sign.className = "sign " + (item.error ? "" : item.result.verdict);
  sign.hidden = !state.stream;
}

// A picture every so many seconds while the box is ticked; a lasting trouble shows as such and does not end it.
async function again() {
  $("again-note").hidden = !$("again").checked;
  if (!$("again").checked || state.watching) return;
  if (!state.card) { $("again").checked = false; say("Open with a token and choose a category first.", true); return; }
  state.watching = true;
  try {
    while ($("again").checked && state.stream && $("video").videoWidth) {
      const started = performance.now(), card = state.card;
      const item = itemOf(await picture());
      await inspect(item);
      if (state.card !== card) { URL.revokeObjectURL(item.url); continue; } // another category was chosen meanwhile
      showSign(item);
      if (item.result && item.result.verdict === "anomalous") {
        item.watched = true;
        list(item);
        choose(state.items.length - 1, false);
        const watched = state.items.filter((one) => one.watched);
        if (watched.length > KEPT) unlist(watched[0]);
      } else URL.revokeObjectURL(item.url);
      const pause = 1000 * Math.max(0.5, Number($("again-s").value) || 2) - (performance.now() - started);
      await new Promise((done) => setTimeout(done, Math.max(0, pause)));
    }
  } catch (error) {
    $("again").checked = false;
    $("sign").hidden = $("again-note").hidden = true;
    throw error;
  } finally {
    state.watching = false;
  }
}

const safely = (action) => async (event) => {
  if (event) event.preventDefault();
  try { await action(event); } catch (error) { say(error.message, true); }
};
$("who").addEventListener("submit", safely(open));
$("team").addEventListener("change", safely(chooseTeam));
$("category").addEventListener("change", safely(chooseCategory));
$("version").addEventListener("change", safely(chooseVersion));
$("files").addEventListener("change", safely(async () => { await add([...$("files").files]); $("files").value = ""; }));
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", safely(async (event) => {
  $("drop").classList.remove("over");
  await add([...event.dataTransfer.files]);
}));
$("camera").addEventListener("click", safely(cameraOn));
$("camera-choice").addEventListener("change", safely(cameraOn));
$("camera-off").addEventListener("click", cameraOff);
$("again").addEventListener("change", safely(again));
$("capture").addEventListener("click", safely(capture));
for (const id of ["threshold", "show-map", "show-regions"]) $(id).addEventListener("input", draw);
$("image-threshold").addEventListener("input", showImageThreshold);
$("save-thresholds").addEventListener("click", safely(saveThresholds));
$("reset").addEventListener("click", () => { $("threshold").value = state.items[state.chosen].result.pixel_threshold; draw(); });
$("save-json").addEventListener("click", () => {
  const item = state.items[state.chosen];
  save(new Blob([JSON.stringify(item.answer, null, 1)], { type: "application/json" }), item.name + ".json");
});
$("save-png").addEventListener("click", () => {
  const name = state.items[state.chosen].name;
  $("overlay").toBlob((blob) => save(blob, name + ".overlay.png"));
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]), select")) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && state.items.length) {
    choose(Math.min(state.items.length - 1, Math.max(0, state.chosen + step)));
    state.items[state.chosen].button.focus();
    event.preventDefault();
  } else if (event.key === "o") $("files").click();
  else if (event.key === "m") { $("show-map").checked = !$("show-map").checked; draw(); }
  else if (event.key === "r") { $("show-regions").checked = !$("show-regions").checked; draw(); }
});
window.addEventListener("pagehide", cameraOff);
// a service that is open to all needs no token: try without
ask("v1").then(() => { $("token-row").hidden = true; safely(open)(); }, () => say("Enter your team's token."));
