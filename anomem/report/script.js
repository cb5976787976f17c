"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}% (${part} of ${whole})` : "–");
const COLOURS = ["var(--accent)", "#8b5cf6", "#d97706", "#db2777", "#64748b", "#0284c7", "#65a30d", "#a16207", "#dc2626",
  "#4338ca", "#be185d", "#0891b2", "#7c2d12", "#86198f", "#3f6212", "#1e3a8a"];

/* ------------------------------------------------------------------ drawing */

/* Width in pixels to draw at: that of the place, or of half and of the whole sheet of paper. */
let printing = false;
function room(svg, least) {
  if (printing) return svg.closest(".pair") ? 340 : 700;
  return Math.max(least, svg.parentElement.clientWidth);
}

function node(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function ticks(low, high, about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}

function frame(svg, width, height, x, y, labels) {
  const box = { left: 46, right: width - 16, top: 8, bottom: height - 42 };
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const sx = (v) => box.left + ((v - x[0]) / (x[1] - x[0])) * (box.right - box.left);
  const sy = (v) => box.bottom - ((v - y[0]) / (y[1] - y[0])) * (box.bottom - box.top);
  for (const t of ticks(...x, width / 90)) {
    node(svg, "line", { class: "axis", x1: sx(t), x2: sx(t), y1: box.bottom, y2: box.bottom + 4 });
    node(svg, "text", { x: sx(t), y: box.bottom + 17, "text-anchor": "middle" }, labels.percent ? `${t}%` : t);
  }
  for (const t of ticks(...y, height / 50)) {
    node(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: sy(t), y2: sy(t) });
    node(svg, "text", { x: box.left - 6, y: sy(t) + 4, "text-anchor": "end" }, labels.y_percent ? `${t}%` : t);
  }
  node(svg, "text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, labels.x);
  return { sx, sy, box };
}

function line(svg, points, attributes) {
  return node(svg, "polyline", {
    points: points.map((p) => p.map((v) => v.toFixed(2)).join(",")).join(" "), fill: "none", "stroke-width": 2,
    "stroke-linejoin": "round", ...attributes,
  });
}

/* ----------------------------------------------------------------- decision */

/* Every threshold at which a decision changes, then one above all scores. */
const candidates = data.scores ? thresholds() : [];
let threshold = data.threshold;

function thresholds() {
  const found = new Set(data.scores.map(([score]) => score));
  found.add(data.threshold);
  const sorted = [...found].sort((a, b) => a - b);
  return [...sorted, sorted[sorted.length - 1] + 1];
}

function counts(t) {
  const found = { tp: 0, fp: 0, tn: 0, fn: 0 };
  for (const [score, anomalous] of data.scores) found[outcome(score, anomalous, t)] += 1;
  return found;
}

function outcome(score, anomalous, t = threshold) {
  return (score >= t ? (anomalous ? "tp" : "fp") : anomalous ? "fn" : "tn");
}

function alpha(t) {
  const n = data.calibration.length;
  return (1 + data.calibration.filter((c) => c >= t).length) / (n + 1);
}

let marker = null, scale = null;

function histogram() {
  const svg = $("histogram"), width = room(svg, 320), height = width < 500 ? 210 : 260;
  const values = data.scores.map(([score]) => score).sort((a, b) => a - b);
  const low = Math.min(values[0], data.threshold), cut = values[Math.floor(0.99 * (values.length - 1))];
  const high = Math.max(cut, data.threshold, low + 1e-6), bins = width < 500 ? 24 : 48;
  const bars = [0, 1].map(() => new Array(bins).fill(0)), totals = [0, 0];
  for (const [score, anomalous] of data.scores) {
    const bin = Math.min(bins - 1, Math.max(0, Math.floor(((score - low) / (high - low)) * bins)));
    bars[anomalous][bin] += 1;
    totals[anomalous] += 1;
  }
  const shares = bars.map((counts, i) => counts.map((c) => (totals[i] ? (100 * c) / totals[i] : 0)));
  const top = Math.max(...shares.flat()) * 1.05;
  scale = { ...frame(svg, width, height, [low, high], [0, top], { x: `score “${data.by}”`, y_percent: true }), low, high };
  shares.forEach((of, i) => of.forEach((share, bin) => {
    if (!share) return;
    const x = scale.sx(low + ((high - low) * bin) / bins), next = scale.sx(low + ((high - low) * (bin + 1)) / bins);
    const colour = i ? "var(--anomalous)" : "var(--normal)";
    node(svg, "rect", { x: x + 0.5, width: Math.max(1, next - x - 1), y: scale.sy(share), height: scale.sy(0) - scale.sy(share),
      fill: colour, "fill-opacity": 0.45, stroke: colour });
  }));
  marker = node(svg, "line", { y1: scale.box.top, y2: scale.box.bottom, stroke: "var(--ink)", "stroke-width": 2.5,
    "stroke-dasharray": "6 3" });
  place();
}

function place() {
  if (!marker) return;
  const x = scale.sx(Math.min(Math.max(threshold, scale.low), scale.high));
  marker.setAttribute("x1", x);
  marker.setAttribute("x2", x);
}

function decide() {
  const found = counts(threshold);
  for (const [name, count] of Object.entries(found)) $(name).textContent = count;
  $("threshold-value").textContent = threshold.toPrecision(6);
  $("fpr").textContent = percent(found.fp, found.fp + found.tn);
  $("tpr").textContent = percent(found.tp, found.tp + found.fn);
  $("precision").textContent = percent(found.tp, found.tp + found.fp);
  if (data.calibration) {
    const rate = alpha(threshold);
    $("alpha").textContent = `${(100 * rate).toFixed(2)}%`;
  }
  $("threshold").setAttribute("aria-valuetext", `${threshold.toPrecision(6)}; false alarms ${$("fpr").textContent}`);
  place();
  dots();
  if (data.gallery) later(gallery);
}

let waiting = 0;
function later(work) {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(work);
}

function setIndex(index) {
  threshold = candidates[index];
  $("threshold").value = index;
  decide();
}

function dragTo(event) {
  const svg = $("histogram"), box = svg.getBoundingClientRect(), inner = scale.box;
  const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const value = scale.low + ((x - inner.left) / (inner.right - inner.left)) * (scale.high - scale.low);
  const next = candidates.findIndex((c) => c >= value);
  setIndex(next < 0 ? candidates.length - 1 : next);
}

if (data.scores) {
  const slider = $("threshold"), svg = $("histogram");
  slider.max = candidates.length - 1;
  slider.value = candidates.indexOf(data.threshold);
  slider.addEventListener("input", () => setIndex(+slider.value));
  svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); dragTo(event); });
  svg.addEventListener("pointermove", (event) => { if (event.buttons) dragTo(event); });
}

/* ------------------------------------------------------------------- curves */

let plots = [];

function curves() {
  const width = room($("roc"), 280), height = Math.min(width, 380);
  plots = ["roc", "pr"].map((name) => {
    const svg = $(name);
    const labels = { x: name === "roc" ? "normal images called anomalous" : "anomalous images found", percent: true, y_percent: true };
    const drawn = frame(svg, width, height, [0, 100], [0, 100], labels);
    for (let i = data.curves.length - 1; i >= 0; i -= 1) { // the leading score comes first, and is drawn above the others
      const curve = data.curves[i];
      if (curve.hidden) continue;
      line(svg, curve[name].map(([x, y]) => [drawn.sx(100 * x), drawn.sy(100 * y)]), {
        stroke: COLOURS[i % COLOURS.length], "stroke-width": curve.lead ? 3 : 1.6, "stroke-dasharray": curve.baseline ? "5 3" : "none",
      });
    }
    const dot = node(svg, "circle", { r: 5, fill: "var(--ink)", stroke: "var(--back)", "stroke-width": 2 });
    return { ...drawn, dot, name };
  });
  dots();
}

function dots() {
  if (!plots.length) return;
  const c = counts(threshold), found = c.tp / (c.tp + c.fn), called = c.tp + c.fp;
  for (const plot of plots) {
    const at = plot.name === "roc" ? [c.fp / (c.fp + c.tn), found] : [found, called ? c.tp / called : 1];
    plot.dot.setAttribute("cx", plot.sx(100 * at[0]));
    plot.dot.setAttribute("cy", plot.sy(100 * at[1]));
  }
}

if (data.curves) {
  data.curves.forEach((curve, i) => {
    const label = document.createElement("label"), box = document.createElement("input"), dash = document.createElement("i");
    box.type = "checkbox";
    box.checked = !curve.hidden;
    box.addEventListener("change", () => { curve.hidden = !box.checked; label.dataset.shown = box.checked; curves(); });
    dash.style.borderTopColor = COLOURS[i % COLOURS.length];
    dash.style.borderTopStyle = curve.baseline ? "dashed" : "solid";
    label.append(box, dash, `${curve.name} (AUROC ${curve.auroc.toFixed(3)})`);
    label.dataset.shown = box.checked;
    $("curve-legend").append(label);
  });
}

/* ------------------------------------------------------------------ gallery */

const WORDS = { tp: "found", fp: "false alarm", tn: "called normal", fn: "missed" };
let shown = 48;

function picture(item) {
  const stack = document.createElement("div");
  stack.className = "stack";
  for (const [source, name] of [[item.image, "photo"], [item.heat, "overlay heat-map"], [item.mask, "overlay mask-line"]]) {
    if (!source) continue;
    const image = document.createElement("img");
    image.src = source;
    image.className = name;
    image.alt = name === "photo" ? `${item.name}, ${item.kind}` : "";
    stack.append(image);
  }
  return stack;
}

function chosen() {
  const kind = $("kind").value, wanted = $("outcome").value, part = $("search").value.toLowerCase();
  const wrong = (item) => ["fp", "fn"].includes(outcome(item.score, item.anomalous));
  const found = data.gallery.filter((item) => (!kind || item.kind === kind) && item.name.toLowerCase().includes(part)
    && (wanted === "all" || (wanted === "mistakes" ? wrong(item) : outcome(item.score, item.anomalous) === wanted)));
  const orders = {
    mistake: (a, b) => wrong(b) - wrong(a) || Math.abs(b.score - threshold) * (wrong(b) || -1) - Math.abs(a.score - threshold) * (wrong(a) || -1),
    high: (a, b) => b.score - a.score, low: (a, b) => a.score - b.score, name: (a, b) => a.name.localeCompare(b.name),
  };
  return found.sort(orders[$("sort").value]);
}

function gallery() {
  const items = chosen(), focus = document.activeElement?.dataset?.name;
  const cards = items.slice(0, shown).map((item) => {
    const card = document.createElement("button"), text = document.createElement("div"), name = document.createElement("b");
    const result = outcome(item.score, item.anomalous), state = document.createElement("span");
    card.type = "button";
    card.className = `card${["fp", "fn"].includes(result) ? " wrong" : ""}`;
    card.dataset.name = item.name;
    text.className = "text";
    name.textContent = item.short;
    name.title = item.name;
    state.className = "outcome";
    state.textContent = WORDS[result];
    text.append(name, `${item.kind} · ${item.score.toPrecision(4)}${item.p ? ` · p\u00a0${item.p.toPrecision(2)}` : ""}`, document.createElement("br"), state);
    card.append(picture(item), text);
    card.addEventListener("click", () => enlarge(item));
    return card;
  });
  $("gallery").replaceChildren(...cards);
  $("count").textContent = `${items.length} of ${data.gallery.length} images`;
  $("more").hidden = items.length <= shown;
  if (focus !== undefined) cards.find((card) => card.dataset.name === focus)?.focus();
}

function enlarge(item) {
  $("large-title").textContent = item.name;
  $("large-image").replaceChildren(picture(item));
  $("large-text").textContent = `${item.kind}, score ${item.score.toPrecision(5)}${item.p ? `, p ${item.p.toPrecision(3)}` : ""}: `
    + WORDS[outcome(item.score, item.anomalous)];
  $("large").showModal();
}

function overlays() {
  for (const name of ["gallery", "large-image"])
    for (const kind of ["heat", "mask"]) $(name).classList.toggle(kind, $(kind).checked);
}

function move(event) {
  const cards = [...$("gallery").children], at = cards.indexOf(document.activeElement);
  if (at < 0) return;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  cards[Math.min(cards.length - 1, Math.max(0, at + step))].focus();
}

if (data.gallery) {
  for (const kind of [...new Set(data.gallery.map((item) => item.kind))].sort()) $("kind").add(new Option(kind, kind));
  for (const name of ["sort", "outcome", "kind"]) $(name).addEventListener("change", gallery);
  $("search").addEventListener("input", gallery);
  for (const name of ["heat", "mask"]) $(name).addEventListener("change", overlays);
  $("mask-control").hidden = !data.gallery.some((item) => item.mask);
  $("more").addEventListener("click", () => { shown += 96; gallery(); });
  $("gallery").addEventListener("keydown", move);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    const box = { h: "heat", m: "mask" }[event.key];
    if (!box) return;
    $(box).checked = !$(box).checked;
    overlays();
  });
}

/* ----------------------------------------------------------- training, drift */

function series(svg, width, lines, labels, bound) {
  const all = lines.flatMap((l) => l.points), xs = all.map((p) => p[0]), ys = all.map((p) => p[1]).concat(bound ?? []);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (high <= low) [low, high] = [low - 0.5, high + 0.5];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const drawn = frame(svg, width, labels.height ?? 170, [first, last > first ? last : first + 1], [low, high], labels);
  lines.forEach((l, i) => {
    const points = l.points.map(([x, y]) => [drawn.sx(x), drawn.sy(y)]);
    line(svg, points.length > 1 ? points : [points[0], [points[0][0] + 2, points[0][1]]], { stroke: COLOURS[i % COLOURS.length] });
  });
  if (bound === undefined) return;
  const at = drawn.sy(bound);
  line(svg, [[drawn.box.left, at], [drawn.box.right, at]], { stroke: "var(--anomalous)", "stroke-dasharray": "6 3" });
  node(svg, "text", { x: drawn.box.right - 4, y: at + 15, "text-anchor": "end" }, "alarm");
}

function training() {
  const room = $("training-curves");
  room.replaceChildren();
  for (const panel of data.training) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", panel.title);
    caption.append(panel.title);
    panel.lines.forEach((l, i) => {
      if (!l.name) return;
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = COLOURS[i % COLOURS.length];
      caption.append(key, l.name);
    });
    figure.append(svg, caption);
    room.append(figure);
    series(svg, 300, panel.lines, { x: "training step" });
  }
}

function drift() {
  const svg = $("martingale");
  series(svg, room(svg, 320), [{ points: data.drift.points }],
    { x: "images of the stream", height: 220 }, data.drift.bound);
}

function draw() {
  if (data.scores) histogram();
  if (data.curves) curves();
  if (data.drift) drift();
}

draw();
if (data.training) training();
if (data.scores) decide();
window.addEventListener("resize", draw);
for (const [event, now] of [["beforeprint", true], ["afterprint", false]])
  window.addEventListener(event, () => { printing = now; draw(); });
