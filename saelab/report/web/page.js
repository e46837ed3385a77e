"use strict";
// What moves on the page: the theme, figures that are drawn from their scenes (saelab/report/scene.py)
// with hover, toggled arms and zoom, and the feature browser (saelab/report/browser.py).
// Texts enter as textContent alone, so that no text of the data can become markup.

const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);

function make(name, attributes = {}, ...children) {
  const svg = SVG_NAMES.has(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const SVG_NAMES = new Set(["svg", "g", "path", "line", "rect", "text", "clipPath", "circle", "title"]);

// ---------------------------------------------------------------- theme

const root = document.documentElement;
function theme(name) {
  root.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", name === "dark" ? "Use the light theme" : "Use the dark theme");
  $("theme").setAttribute("aria-pressed", String(name === "dark"));
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
theme(prefersDark.matches ? "dark" : "light");
prefersDark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));

function tell(text) { $("told").textContent = text; }

// ---------------------------------------------------------------- looks

const { arrays, runs } = read("pictures-data");
const COLORS = { "black": "var(--ink)", "#0072B2": "var(--c1)", "#D55E00": "var(--c2)", "#009E73": "var(--c3)",
  "#E69F00": "var(--c4)", "#CC79A7": "var(--c5)", "#56B4E9": "var(--c6)" };
const color = (look) => (look ? COLORS[look.color] || "var(--control)" : "var(--muted)");

// Markers as paths around 0, of radius 1; those in LINES have no inside.
const SHAPES = {
  "o": "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z", ".": "M-.6 0A.6 .6 0 1 0 .6 0A.6 .6 0 1 0 -.6 0Z",
  "s": "M-.9-.9H.9V.9H-.9Z", "^": "M0-1.1L1 .8H-1Z", "v": "M0 1.1L1-.8H-1Z", "<": "M-1.1 0L.8-1V1Z", ">": "M1.1 0L-.8-1V1Z",
  "D": "M0-1.2L1.2 0L0 1.2L-1.2 0Z", "P": "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  "X": "M-.55-1.1L0-.55L.55-1.1L1.1-.55L.55 0L1.1 .55L.55 1.1L0 .55L-.55 1.1L-1.1 .55L-.55 0L-1.1-.55Z",
  "x": "M-1-1L1 1M-1 1L1-1", "+": "M-1 0H1M0-1V1", "|": "M0-1V1", "1": "M0 1V0L-.9-.6M0 0L.9-.6", "2": "M0-1V0L-.9 .6M0 0L.9 .6",
  "3": "M-1 0H0L.6-.9M0 0L.6 .9", "4": "M1 0H0L-.6-.9M0 0L-.6 .9",
};
const LINES = new Set(["x", "+", "|", "1", "2", "3", "4"]);

function dashes(look, width) { return look && look.dashes.length ? look.dashes.map((part) => part * width).join(" ") : null; }

function markers(points, shape, radius, look) {
  const d = points.map(([x, y]) => place(SHAPES[shape] || SHAPES["o"], x, y, radius)).join("");
  const open = LINES.has(shape);
  const hollow = look && !look.filled && shape !== ".";
  return make("path", { d, fill: open ? "none" : hollow ? "var(--panel)" : color(look), stroke: open || hollow ? color(look) : "none", "stroke-width": 1.6 });
}
// Moves a path of the table above; its only commands are M, L, H, V, A and Z.
function place(d, x, y, r) {
  let out = "";
  for (const [, command, rest] of d.matchAll(/([MLHVAZ])([^MLHVAZ]*)/g)) {
    const n = (rest.match(/-?\d*\.?\d+/g) || []).map(Number);
    if (command === "H") out += `H${short(x + n[0] * r)}`;
    else if (command === "V") out += `V${short(y + n[0] * r)}`;
    else if (command === "A") out += `A${short(n[0] * r)} ${short(n[1] * r)} 0 ${n[3]} ${n[4]} ${short(x + n[5] * r)} ${short(y + n[6] * r)}`;
    else if (command === "Z") out += "Z";
    else out += `${command}${short(x + n[0] * r)} ${short(y + n[1] * r)}`;
  }
  return out;
}
const short = (value) => Math.round(value * 100) / 100;

function sample(look) {
  const svg = make("svg", { width: 26, height: 14, viewBox: "0 0 26 14", "aria-hidden": "true" });
  svg.append(make("line", { x1: 0, x2: 26, y1: 7, y2: 7, stroke: color(look), "stroke-width": look.width, "stroke-dasharray": dashes(look, look.width) }));
  svg.append(markers([[13, 7]], look.marker, 4.2, look));
  return svg;
}
for (const box of document.querySelectorAll(".swatch")) {
  const look = runs[box.dataset.run].arms.find((arm) => arm.name === box.dataset.arm);
  if (look) box.append(sample(look));
}

// ---------------------------------------------------------------- arms on and off

const hidden = {}; // run -> Set of indices
for (const box of document.querySelectorAll(".legend")) {
  const run = box.dataset.run;
  hidden[run] = new Set();
  runs[run].arms.forEach((look, index) => {
    const button = make("button", { type: "button", "aria-pressed": "true", "data-arm": index, class: look.control ? "control" : null }, sample(look), look.shown);
    button.addEventListener("click", () => toggle(run, [index]));
    box.append(button);
  });
  if (runs[run].arms.length > 2) {
    const all = make("button", { type: "button", class: "all" }, "All");
    all.addEventListener("click", () => toggle(run, [...hidden[run]]));
    box.append(all);
  }
}
function toggle(run, indices) {
  const off = hidden[run];
  for (const index of indices) if (!off.delete(index)) off.add(index);
  for (const button of document.querySelectorAll(`.legend[data-run="${run}"] button[data-arm]`))
    button.setAttribute("aria-pressed", String(!off.has(Number(button.dataset.arm))));
  for (const figure of document.querySelectorAll(`figure[data-run="${run}"]`)) show(figure);
  tell(`${runs[run].arms.length - off.size} of ${runs[run].arms.length} arms and controls are shown in ${run}`);
}
function show(figure) {
  const off = hidden[figure.dataset.run];
  for (const mark of figure.querySelectorAll("g[data-arm]")) mark.classList.toggle("hidden", off.has(Number(mark.dataset.arm)));
}

// ---------------------------------------------------------------- axes

class Scale {
  constructor(axis, limits, low, high) {
    this.log = axis.log;
    this.from = this.log ? limits.map(Math.log10) : limits;
    this.low = low; this.high = high;
  }
  to(value) { const v = this.log ? Math.log10(value) : value; return this.low + (v - this.from[0]) / (this.from[1] - this.from[0]) * (this.high - this.low); }
  back(pixel) { const v = this.from[0] + (pixel - this.low) / (this.high - this.low) * (this.from[1] - this.from[0]); return this.log ? 10 ** v : v; }
}
function ticks(axis, limits, room) {
  const low = Math.min(...limits), high = Math.max(...limits);
  const inside = (value) => value >= low - 1e-9 * (high - low) && value <= high + 1e-9 * (high - low);
  if (axis.ticks) {
    const kept = axis.ticks.filter(([value]) => inside(value));
    if (kept.length > 1 || !axis.log) return kept;
  }
  const found = axis.log && high > 5 * low ? decades(low, high) : rounded(low, high, room);
  return found.filter(inside).map((value) => [value, number(value)]);
}
function decades(low, high) {
  const found = [];
  const many = Math.log10(high / low) > 4;
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of many ? [1] : [1, 2, 5]) found.push(m * 10 ** e);
  return found;
}
function rounded(low, high, room) {
  const rough = (high - low) / Math.max(2, room);
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= rough) || 10 * base;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(10)));
  return found;
}
function number(value) {
  if (value === null) return "–";
  const text = Number(value.toPrecision(4));
  const size = Math.abs(text);
  return (size !== 0 && (size < 1e-4 || size >= 1e6) ? text.toExponential().replace("e+", "e") : String(text)).replace("-", "−");
}
function lines(text, most) {
  const found = [];
  for (const part of text.split("\n")) {
    let line = "";
    for (const word of part.split(" ")) {
      if (line && (line + " " + word).length > most) { found.push(line); line = word; }
      else line = line ? line + " " + word : word;
    }
    found.push(line);
  }
  return found;
}
const CHARACTER = 6.5; // px that a letter of a tick takes
const LONG_Y = 26; // letters in a line along the y axis

// ---------------------------------------------------------------- panels

let counter = 0;
class Panel {
  constructor(figure, scene, run, box, siblings) {
    Object.assign(this, { figure, scene, run, box, siblings });
    this.home = { x: scene.x.limits, y: scene.y.limits };
    this.view = { ...this.home };
    this.id = `panel${counter++}`;
    this.at = null; // what the keyboard's cursor stands on: [arm, index]
    this.svg = make("svg", { tabindex: 0, role: "application", "aria-roledescription": "figure", "aria-label": this.label() });
    box.append(make("h5", {}, scene.title), this.buttons(), this.svg);
    this.listen();
    this.draw();
  }
  label() {
    const { title, x, y } = this.scene;
    return `${title || this.figure.dataset.picture}: ${y.label || "arms"} against ${x.label || "arms"}. Arrow keys go through points, plus and minus zoom, 0 shows all.`;
  }
  buttons() {
    const box = make("div", { class: "zoom" });
    for (const [sign, name, act] of [["+", "Zoom in", () => this.zoom(0.6)], ["−", "Zoom out", () => this.zoom(1 / 0.6)], ["↺", "Show all", () => this.reset()]]) {
      const button = make("button", { type: "button", "aria-label": `${name}: ${this.scene.title}`, title: name }, sign);
      button.addEventListener("click", act);
      box.append(button);
    }
    return box;
  }
  size() {
    const width = Math.max(200, this.box.clientWidth || 300);
    const { x, y, marks } = this.scene;
    const names = this.names(), rows = names ? names.length : 0;
    const whole = this.scene.rows[1] - this.scene.rows[0];
    const height = rows ? 30 * rows + 60 : Math.min(340, Math.max(190, 0.62 * width)) * whole;
    const named = this.ticksOfY().map(([, text]) => Math.max(0, ...lines(text, 20).map((line) => line.length)));
    const left = Math.min(0.42 * width, 12 + CHARACTER * Math.max(2, ...named)) + 14 * (y.label ? lines(y.label, LONG_Y).length : 0);
    const beside = marks.filter((mark) => mark.kind === "text" && mark.of[0] && mark.x > 1).map((mark) => mark.text.length);
    const right = 12 + CHARACTER * Math.max(0, ...beside);
    const below = Math.max(1, ...(x.ticks || []).map(([, text]) => text.split("\n").length));
    const most = Math.floor((width - left) / CHARACTER);
    return { width, height, left, right, most, top: 8, bottom: 10 + 14 * (x.label ? lines(x.label, most).length : 0) + 13 * below };
  }
  // Names along the y axis; those of a panel beside it where this has the same rows without names.
  names() {
    const named = (ticks) => ticks && ticks.length > 3 && ticks.some(([, text]) => /[a-z]{2}/i.test(text));
    const { ticks } = this.scene.y;
    if (named(ticks) || !ticks || ticks.length < 4) return named(ticks) ? ticks : null;
    const other = this.siblings.find((panel) => named(panel.y.ticks) && panel.y.ticks.length === ticks.length);
    return other ? other.y.ticks : null;
  }
  ticksOfY() {
    const stacked = this.box.parentElement && this.box.clientWidth > 0.9 * this.box.parentElement.clientWidth;
    const names = stacked ? this.names() : null;
    return ticks(names ? { ...this.scene.y, ticks: names } : this.scene.y, this.view.y, 5);
  }
  draw() {
    const s = this.size();
    const { svg, scene, view } = this;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${s.width} ${s.height}`);
    svg.setAttribute("height", s.height);
    this.x = new Scale(scene.x, view.x, s.left, s.width - s.right);
    this.y = new Scale(scene.y, view.y, s.height - s.bottom, s.top);
    this.area = s;
    svg.append(make("clipPath", { id: this.id }, make("rect", { x: s.left - 6, y: s.top - 6, width: s.width - s.left - s.right + 12, height: s.height - s.top - s.bottom + 12 })));
    if (!scene.bare) this.axes(s);
    const inside = make("g", { "clip-path": `url(#${this.id})` });
    svg.append(inside);
    this.points = [];
    for (const mark of scene.marks) {
      const look = mark.arm === undefined ? null : this.run.arms[mark.arm];
      const group = make("g", { "data-arm": mark.arm, "data-kind": mark.kind, opacity: mark.kind === "band" ? (mark.opacity || 1) : mark.opacity });
      this[mark.kind](group, mark, look, s);
      (mark.kind === "text" ? svg : inside).append(group);
    }
    this.cursor = make("circle", { class: "cursor hidden", r: 8 });
    svg.append(this.cursor);
    show(this.figure);
  }
  axes(s) {
    const { svg, scene, view } = this;
    const base = s.height - s.bottom, end = s.width - s.right;
    const fixed = { x: scene.x.ticks !== null && !scene.x.log, y: scene.y.ticks !== null && !scene.y.log };
    let last = -1e9;
    for (const [value, text] of ticks(scene.x, view.x, Math.min(7, (end - s.left) / 65))) {
      const x = this.x.to(value), parts = text.split("\n"), half = CHARACTER * Math.max(...parts.map((part) => part.length)) / 2;
      if (!fixed.x) svg.append(make("line", { class: "grid", x1: x, x2: x, y1: s.top, y2: base }));
      if (x - half < last + 4) continue;
      last = x + half;
      parts.forEach((part, i) => svg.append(make("text", { x: Math.min(x, s.width - half), y: base + 17 + 13 * i, "text-anchor": "middle" }, part)));
    }
    for (const [value, text] of this.ticksOfY()) {
      const y = this.y.to(value), parts = lines(text, 20);
      if (!fixed.y) svg.append(make("line", { class: "grid", x1: s.left, x2: end, y1: y, y2: y }));
      parts.forEach((part, i) => svg.append(make("text", { class: fixed.y ? "label" : null, x: s.left - 7, y: y + 4 + 13 * (i - (parts.length - 1) / 2), "text-anchor": "end" }, part)));
    }
    svg.append(make("path", { class: "axis", d: `M${s.left} ${s.top}V${base}H${end}` }));
    if (scene.x.label) this.words(lines(scene.x.label, s.most), (i, n) => ({ x: (s.left + end) / 2, y: s.height - 5 - 14 * (n - 1 - i) }));
    if (scene.y.label) this.words(lines(scene.y.label, LONG_Y), (i) => ({ transform: `translate(${11 + 14 * i} ${(s.top + base) / 2}) rotate(-90)` }));
  }
  words(parts, at) { parts.forEach((part, i) => this.svg.append(make("text", { class: "label", "text-anchor": "middle", ...at(i, parts.length) }, part))); }
  reach(mark, x = "x", y = "y") {
    const xs = arrays[mark[x]], ys = arrays[mark[y]];
    return xs.map((value, i) => value === null || ys[i] === null ? null : [this.x.to(value), this.y.to(ys[i])]);
  }
  line(group, mark, look) {
    const points = this.reach(mark);
    if (mark.joined) {
      let d = "", next = "M";
      for (const point of points) { if (point === null) next = "M"; else { d += `${next}${short(point[0])} ${short(point[1])}`; next = "L"; } }
      group.append(make("path", { d, fill: "none", stroke: look ? color(look) : "var(--muted)", "stroke-width": mark.width, "stroke-linejoin": "round", "stroke-dasharray": mark.dashed ? dashes(look, mark.width) || "4 3" : null }));
    }
    if (mark.marker) {
      const [first, every] = mark.every || [0, 1];
      const kept = points.filter((point, i) => point && i >= first && (i - first) % every === 0);
      group.append(markers(kept, mark.marker, 0.58 * mark.size, look));
    }
    if (look && (mark.opacity === undefined || mark.marker)) points.forEach((point, i) => { if (point) this.points.push({ arm: mark.arm, x: point[0], y: point[1], at: [arrays[mark.x][i], arrays[mark.y][i]] }); });
  }
  bars(group, mark, look) {
    const ends = this.reach(mark, "x2", "y2");
    const d = this.reach(mark).map((point, i) => point && ends[i] ? `M${short(point[0])} ${short(point[1])}L${short(ends[i][0])} ${short(ends[i][1])}` : "").join("");
    group.append(make("path", { d, fill: "none", stroke: color(look), "stroke-width": mark.width }));
  }
  band(group, mark, look) {
    const there = this.reach(mark, "x", "high").filter(Boolean), back = this.reach(mark, "x", "low").filter(Boolean).reverse();
    const d = [...there, ...back].map(([x, y], i) => `${i ? "L" : "M"}${short(x)} ${short(y)}`).join("");
    group.append(make("path", { d: `${d}Z`, fill: color(look) }));
  }
  level(group, mark, look, s) {
    const along = mark.axis === "x", at = (along ? this.x : this.y).to(mark.at);
    group.append(make("line", { x1: along ? at : s.left, x2: along ? at : s.width - s.right, y1: along ? s.top : at, y2: along ? s.height - s.bottom : at,
      stroke: look ? color(look) : mark.faint ? "var(--grid)" : mark.dashed ? "var(--muted)" : "var(--ink)", "stroke-width": mark.width, "stroke-dasharray": mark.dashed ? dashes(look, mark.width) || "4 3" : null }));
  }
  zone(group, mark, look, s) {
    const along = mark.axis === "x", scale = along ? this.x : this.y;
    const [a, b] = [scale.to(mark.low), scale.to(mark.high)].sort((p, q) => p - q);
    group.setAttribute("opacity", 1);
    group.append(make("rect", along ? { x: a, width: b - a, y: s.top, height: s.height - s.top - s.bottom, fill: "var(--zone)" } : { x: s.left, width: s.width - s.left - s.right, y: a, height: b - a, fill: "var(--zone)" }));
  }
  text(group, mark, look, s) {
    const [ofX, ofY] = mark.of;
    const x = (ofX ? s.left + mark.x * (s.width - s.left - s.right) : this.x.to(mark.x)) + mark.dx;
    const y = (ofY ? s.height - s.bottom - mark.y * (s.height - s.top - s.bottom) : this.y.to(mark.y)) - mark.dy;
    if (!ofY && (y < s.top - 8 || y > s.height - s.bottom + 8)) return;
    if (!ofX && (x < s.left - 8 || x > s.width + 8)) return;
    const anchor = { left: "start", center: "middle", right: "end" }[mark.anchor];
    const shift = { top: 11, center: 4, bottom: -2, baseline: 0 }[mark.base] ?? 0;
    const parts = this.scene.bare ? lines(mark.text, Math.floor((s.width - 30) / CHARACTER)) : [mark.text];
    parts.forEach((part, i) => group.append(make("text", { x, y: y + shift + 15 * (i - (parts.length - 1) / 2), "text-anchor": anchor, "font-weight": mark.bold ? 700 : null, class: ofX && mark.x > 1 ? "label" : null, style: look && !(ofX && mark.x > 1) ? `fill:${color(look)}` : null }, part)));
  }

  // ---- hover, keyboard, zoom
  nearest(x, y, reach = 26) {
    let best = null, distance = reach;
    for (const point of this.points) {
      if (hidden[this.figure.dataset.run].has(point.arm) || !this.within(point)) continue;
      const d = Math.hypot(point.x - x, point.y - y);
      if (d < distance) { best = point; distance = d; }
    }
    return best;
  }
  within(point) { const s = this.area; return point.x >= s.left - 6 && point.x <= s.width - s.right + 6 && point.y >= s.top - 6 && point.y <= s.height - s.bottom + 6; }
  said(point) {
    const part = (axis, value) => {
      const tick = axis.ticks && !axis.log && axis.ticks.reduce((a, b) => (Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a), [Infinity, ""]);
      if (axis.ticks && axis.ticks.length === 0) return "";
      const text = tick && Math.abs(tick[0] - value) <= 0.5 && tick[1] && axis.ticks.length > 2 ? tick[1].replace("\n", " ") : number(value);
      return axis.label ? `${axis.label}: ${text}` : text;
    };
    const parts = [part(this.scene.x, point.at[0]), part(this.scene.y, point.at[1])].filter(Boolean);
    return [this.run.arms[point.arm].shown, ...new Set(parts)];
  }
  point(point, loud) {
    const tip = $("tip");
    this.cursor.classList.toggle("hidden", !point);
    tip.hidden = !point;
    if (!point) return;
    this.cursor.setAttribute("cx", point.x); this.cursor.setAttribute("cy", point.y);
    const [arm, ...rest] = this.said(point);
    tip.replaceChildren(make("b", {}, arm), ...rest.map((text) => make("div", {}, text)));
    const box = this.svg.getBoundingClientRect(), scale = box.width / this.area.width;
    const x = box.left + point.x * scale, y = box.top + point.y * scale;
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y - tip.offsetHeight - 12 > 4 ? y - tip.offsetHeight - 12 : y + 14}px`;
    if (loud) tell([arm, ...rest].join(", "));
  }
  place(event) {
    const box = this.svg.getBoundingClientRect(), scale = this.area.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }
  listen() {
    const { svg } = this;
    let from = null, rubber = null;
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = this.place(event);
      if (from && rubber) {
        const s = this.area, clamp = (v, a, b) => Math.max(a, Math.min(b, v));
        const [x0, x1] = [from[0], clamp(x, s.left, s.width - s.right)].sort((a, b) => a - b), [y0, y1] = [from[1], clamp(y, s.top, s.height - s.bottom)].sort((a, b) => a - b);
        for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0 })) rubber.setAttribute(name, value);
        this.point(null);
      } else this.point(this.nearest(x, y));
    });
    svg.addEventListener("pointerleave", () => this.point(null));
    svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch" || event.button !== 0 || this.scene.bare) return;
      from = this.place(event);
      rubber = make("rect", { class: "rubber" });
      svg.append(rubber);
      svg.setPointerCapture(event.pointerId);
    });
    const end = (event) => {
      if (!from) return;
      const s = this.area, [x, y] = this.place(event), start = from;
      from = null; rubber.remove();
      if (event.type !== "pointerup" || Math.abs(x - start[0]) < 8 || Math.abs(y - start[1]) < 8) return;
      const cut = (a, b, low, high) => [Math.max(low, Math.min(a, b)), Math.min(high, Math.max(a, b))];
      this.frame(cut(start[0], x, s.left, s.width - s.right), cut(start[1], y, s.top, s.height - s.bottom));
    };
    svg.addEventListener("pointerup", end);
    svg.addEventListener("pointercancel", end);
    svg.addEventListener("dblclick", () => this.reset());
    svg.addEventListener("keydown", (event) => this.key(event));
    svg.addEventListener("blur", () => { this.at = null; this.point(null); });
  }
  frame([x0, x1], [y0, y1]) {
    const turn = (home, pair) => (home[0] <= home[1] ? pair : [pair[1], pair[0]]);
    const sorted = (a, b) => [Math.min(a, b), Math.max(a, b)];
    this.view = { x: turn(this.home.x, sorted(this.x.back(x0), this.x.back(x1))), y: turn(this.home.y, sorted(this.y.back(y0), this.y.back(y1))) };
    this.draw();
  }
  zoom(factor) {
    const s = this.area, middle = this.at || { x: (s.left + s.width - s.right) / 2, y: (s.top + s.height - s.bottom) / 2 };
    const w = factor * (s.width - s.left - s.right) / 2, h = factor * (s.height - s.top - s.bottom) / 2;
    this.at = null;
    this.frame([middle.x - w, middle.x + w], [middle.y - h, middle.y + h]);
    tell(`From ${number(Math.min(...this.view.x))} to ${number(Math.max(...this.view.x))}`);
  }
  reset() { this.view = { ...this.home }; this.at = null; this.draw(); tell("The whole range is shown"); }
  key(event) {
    const acts = { "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1 / 0.6), "0": () => this.reset(), "Escape": () => this.reset(),
      "ArrowRight": () => this.step(1), "ArrowLeft": () => this.step(-1), "ArrowDown": () => this.arm(1), "ArrowUp": () => this.arm(-1) };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  }
  seen() { return this.points.filter((point) => !hidden[this.figure.dataset.run].has(point.arm) && this.within(point)).sort((a, b) => a.arm - b.arm || a.x - b.x || a.y - b.y); }
  step(by) {
    const all = this.seen(), own = this.at ? all.filter((point) => point.arm === this.at.arm) : all;
    if (!own.length) return;
    const here = this.at ? own.indexOf(this.at) : by > 0 ? -1 : own.length;
    this.at = own[Math.max(0, Math.min(own.length - 1, here + by))];
    this.point(this.at, true);
  }
  arm(by) {
    const all = this.seen(), arms = [...new Set(all.map((point) => point.arm))];
    if (!arms.length) return;
    const next = arms[(arms.indexOf(this.at ? this.at.arm : arms[by > 0 ? arms.length - 1 : 0]) + by + arms.length) % arms.length];
    const x = this.at ? this.at.x : 0;
    this.at = all.filter((point) => point.arm === next).reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
    this.point(this.at, true);
  }
}

// ---------------------------------------------------------------- figures, drawn when they come near

const drawn = new Map();
function draw(figure) {
  if (drawn.has(figure)) return;
  const run = runs[figure.dataset.run], scene = run.scenes[figure.dataset.picture], grid = figure.querySelector(".panels");
  const columns = scene.widths.length;
  grid.style.gridTemplateColumns = scene.widths.map((width) => `minmax(0, ${width}fr)`).join(" ");
  const boxes = scene.panels.map((panel) => {
    const box = make("div", { class: "panel" });
    if (columns > 1 || panel.rows[0]) box.style.gridArea = `${panel.rows[0] + 1} / ${panel.columns[0] + 1} / ${panel.rows[1] + 1} / ${panel.columns[1] + 1}`;
    grid.append(box);
    return box;
  });
  drawn.set(figure, scene.panels.map((panel, i) => new Panel(figure, panel, run, boxes[i], scene.panels)));
}
const near = new IntersectionObserver((entries) => { for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); } }, { rootMargin: "600px" });
for (const figure of document.querySelectorAll("figure.figure")) near.observe(figure);
let width = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => { for (const panels of drawn.values()) for (const panel of panels) if (panel.box.clientWidth) panel.draw(); });
});
addEventListener("beforeprint", () => { for (const figure of document.querySelectorAll("figure.figure")) if (figure.offsetParent) draw(figure); });

// ---------------------------------------------------------------- tabs

for (const list of document.querySelectorAll('[role="tablist"]')) {
  const tabs = [...list.children];
  const choose = (tab, focus) => {
    for (const other of tabs) {
      const on = other === tab;
      other.setAttribute("aria-selected", String(on));
      other.tabIndex = on ? 0 : -1;
      $(other.getAttribute("aria-controls")).hidden = !on;
    }
    const figure = $(tab.getAttribute("aria-controls")).querySelector("figure");
    draw(figure);
    for (const panel of drawn.get(figure)) panel.draw();
    if (focus) tab.focus();
  };
  list.addEventListener("click", (event) => { if (event.target.role === "tab" || event.target.getAttribute("role") === "tab") choose(event.target); });
  list.addEventListener("keydown", (event) => {
    const here = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined || here < 0) return;
    event.preventDefault();
    choose(tabs[(to + tabs.length) % tabs.length], true);
  });
}

// ---------------------------------------------------------------- where the reader is

const links = new Map([...document.querySelectorAll(".top nav a")].map((link) => [link.hash.slice(1), link]));
const bar = document.querySelector(".top nav");
const reveal = (link) => { bar.scrollLeft += link.getBoundingClientRect().left - bar.getBoundingClientRect().left - 60; };
const spy = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) for (const [id, link] of links) {
    if (id === entry.target.id) { link.setAttribute("aria-current", "true"); reveal(link); }
    else link.removeAttribute("aria-current");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("main > section")) spy.observe(section);

// ---------------------------------------------------------------- feature browser

const browser = read("latents-data");
if ($("browser")) {
  const percent = (value) => value === null ? "–" : value === 0 ? "0" : `${Number((100 * value).toPrecision(3))}%`;
  const state = { cell: browser.cells[0], chosen: null, shown: [] };
  const strings = () => browser.texts[state.cell.text].strings;
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

  // ---- what is in a latent
  function tokens(example) {
    const [context, start, length] = example;
    for (const [first, ids] of browser.texts[state.cell.text].pieces[context] || [])
      if (first <= start && start + length <= first + ids.length) return ids.slice(start - first, start - first + length).map((id) => strings()[id]);
    return null;
  }
  function haystack(latent) {
    if (latent.hay === undefined) {
      const texts = latent.examples.map((example) => (tokens(example) || []).join(""));
      const lens = [...(latent.raised || []), ...(latent.lowered || [])].map(([id]) => strings()[id]);
      latent.hay = [`#${latent.i}`, ...texts, ...lens].join("\n").toLowerCase();
    }
    return latent.hay;
  }
  const peaks = (latent) => [...new Set(latent.examples.map((example) => (tokens(example) || [])[example[3]]).filter(Boolean))];
  const age = (latent) => latent.life && state.cell.steps ? state.cell.steps - latent.life.birth : null;
  const KEYS = { group: (l) => null, density: (l) => l.density, loss: (l) => l.loss, max: (l) => l.max, near: (l) => (l.near.length ? l.near[0][1] : null), age, i: (l) => l.i };

  // ---- the list
  function refresh() {
    const words = $("search").value.toLowerCase(), group = $("group").value, sort = $("sort").value, sign = $("rising").checked ? 1 : -1;
    const found = state.cell.latents.filter((latent) => (group === "" || latent.group === Number(group)) && (!words || (/^#\d+$/.test(words) ? `#${latent.i}` === words : haystack(latent).includes(words))));
    if (sort !== "group") found.sort((a, b) => {
      const [p, q] = [KEYS[sort](a), KEYS[sort](b)];
      return (p === null) - (q === null) || sign * (p - q) || a.i - b.i;
    });
    else if ($("rising").checked) found.reverse();
    state.shown = found;
    const value = (latent) => sort === "loss" || sort === "group" ? percent(sort === "loss" ? latent.loss : latent.density) : sort === "density" ? percent(latent.density) : sort === "i" ? percent(latent.density) : number(KEYS[sort](latent) ?? null);
    $("list").replaceChildren(...found.map((latent) => {
      const button = make("button", { type: "button", "data-latent": latent.i }, make("b", {}, `#${latent.i}`), make("span", { class: "tokens" }, peaks(latent).map(visible).join(" ") || "–"), make("span", { class: "value" }, value(latent)));
      button.addEventListener("click", () => choose(latent));
      return make("li", {}, button);
    }));
    $("found").textContent = `${found.length} of ${state.cell.latents.length} latents; next to each are the tokens at which it fires most strongly, and its ${{ group: "density", i: "density", loss: "loss share", max: "largest activation", near: "largest cosine", age: "age in steps" }[sort] || sort}`;
    if (found.length && !found.includes(state.chosen)) choose(found[0]);
    else mark();
    if (!found.length) { state.chosen = null; $("latent").replaceChildren(make("p", {}, "No latent matches: change the search or the group.")); }
  }
  function mark() {
    for (const button of $("list").querySelectorAll("button")) {
      const on = state.chosen && Number(button.dataset.latent) === state.chosen.i;
      if (on) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    }
  }

  // ---- one latent
  function shaded(example, latent) {
    const [, , length, peak, firing] = example, words = tokens(example);
    const strength = new Map();
    for (let i = 0; i < firing.length; i += 2) strength.set(firing[i], firing[i + 1]);
    const text = make("p", { class: "text" });
    for (let i = 0; i < length; i++) {
      const word = words ? words[i] : "·", value = strength.get(i) || 0;
      const node = value ? make("mark", { class: i === peak ? "peak" : null, title: `activation ${number(latent.max * value / 100)}`, style: `background:rgb(var(--shade) / ${short(0.08 + 0.55 * value / 100)})` }) : make("span");
      for (const [piece] of word.matchAll(/\n|[^\n]+/g)) {
        if (piece === "\n") node.append(make("span", { class: "sign", "aria-hidden": "true" }, "↵"), "\n");
        else node.append(piece);
      }
      text.append(node);
    }
    return make("li", {}, make("span", { class: "strength" }, number(latent.max * (strength.get(peak) || 0) / 100)), text);
  }
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  function lens(title, list) {
    return make("div", {}, make("h4", {}, title), make("ul", { class: "lens" }, ...list.map(([id, value]) => make("li", {}, visible(strings()[id]), " ", make("small", {}, `${value > 0 ? "+" : ""}${number(value)}`)))));
  }
  function choose(latent) {
    state.chosen = latent;
    const cell = state.cell, parts = [];
    parts.push(make("h3", {}, `Latent ${latent.i}`, " ", make("small", {}, `${browser.groups[latent.group]} · ${cell.arm}, ${cell.run}`)));
    const facts = make("dl", {}, fact("density", percent(latent.density)), fact("loss share", percent(latent.loss)), fact("largest activation", number(latent.max)));
    const life = latent.life;
    if (life && life.birth !== undefined) facts.append(fact("born at step", cell.steps ? `${life.birth} of ${cell.steps}` : String(life.birth)));
    if (life && life.resamplings !== undefined) facts.append(fact("resampled", `${life.resamplings} times`));
    if (life && life.last_fired !== undefined) facts.append(fact("last fired at step", String(life.last_fired)));
    parts.push(facts);
    if (!life) parts.push(make("p", { class: "note" }, `No lifetime: ${cell.why_no_life}.`));
    parts.push(make("h4", {}, "Strongest texts, one from each context"));
    if (cell.why_no_text) parts.push(make("p", { class: "note" }, `No tokens: ${cell.why_no_text}.`));
    parts.push(latent.examples.length ? make("ul", { class: "examples" }, ...latent.examples.map((example) => shaded(example, latent))) : make("p", { class: "note" }, "It never fires on the held-out text."));
    if (latent.raised) parts.push(make("div", { class: "columns" }, lens("Tokens it makes likelier", latent.raised), lens("Tokens it makes less likely", latent.lowered)));
    else parts.push(make("p", { class: "note" }, `No logit lens: ${cell.why_no_lens}.`));
    const known = new Map(cell.latents.map((other) => [other.i, other]));
    parts.push(make("h4", {}, "Nearest decoder rows"));
    parts.push(make("div", { class: "near" }, ...latent.near.map(([other, cosine]) => {
      const text = `#${other}, cosine ${number(cosine)}`;
      if (!known.has(other)) return make("span", { title: "not among the latents of this page" }, text);
      const button = make("button", { type: "button", class: "plain" }, text);
      button.addEventListener("click", () => { $("search").value = ""; $("group").value = ""; refresh(); choose(known.get(other)); reveal(); $("latent").focus(); });
      return button;
    })));
    $("latent").replaceChildren(...parts);
    mark();
  }
  function reveal() {
    const button = $("list").querySelector('[aria-current="true"]');
    if (button) { const box = $("list"); box.scrollTop = button.offsetTop - box.offsetTop - box.clientHeight / 2; }
  }

  // ---- tools
  browser.cells.forEach((cell, i) => $("cell").append(make("option", { value: i }, `${cell.run}: ${cell.arm}, seed ${cell.seed}, L0 ${cell.level}`)));
  $("group").append(make("option", { value: "" }, "all"), ...browser.groups.map((name, i) => make("option", { value: i }, name)));
  $("cell").addEventListener("change", () => { state.cell = browser.cells[Number($("cell").value)]; state.chosen = null; refresh(); });
  for (const id of ["search", "group", "sort", "rising"]) $(id).addEventListener("input", refresh);
  $("search").form.addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("keydown", (event) => {
    const buttons = [...$("list").querySelectorAll("button")], here = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (to === undefined || here < 0 || !buttons[to]) return;
    event.preventDefault();
    buttons[to].focus();
    choose(state.shown[to]);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("search").focus(); }
  });
  refresh();
}
