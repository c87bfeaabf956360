// Lines over time, drawn as SVG. All charts share one window of time and one crosshair.

import { bound, html, svg } from "./elements.js";

const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 20, HEIGHT = 168;

// The next number whose half is short too: 1, 2, 4, 6, 8 x 10^n.
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((each) => each * power >= value * 0.9999) * power;
}

function ago(seconds) {
  if (seconds < 0.5) return "now";
  return seconds < 120 ? `${Math.round(seconds)} s ago` : `${+(seconds / 60).toFixed(1)} min ago`;
}

export class Chart {
  // `lines` are {name, read(sample), style}; `write` turns a value into words; `target(opening)` is a dashed line;
  // `most` fixes the axis, `least` its end; `empty(opening)` says why nothing is drawn.
  constructor({ title, note = "", lines, write, target = () => null, most = null, least = 1e-9, empty = () => "No data yet." }) {
    Object.assign(this, { title, lines, write, target, most, least, empty, width: 400 });
    this.values = lines.map(() => html("b"));
    const keys = lines.map((line, index) => html("span", { class: `key ${line.style}` }, html("i"), line.name, this.values[index]));
    this.drawing = svg("svg", { role: "img", tabindex: "0", "aria-label": title });
    this.blank = html("p", { class: "blank" });
    this.element = html("article", { class: "card chart" },
      html("h2", {}, title), html("small", {}, note),
      html("p", { class: "keys" }, ...keys), html("div", { class: "plot" }, this.drawing, this.blank));
  }

  // Tell `listener` the share of the window (0 to 1) under the pointer or the arrow keys; null when it leaves.
  onPoint(listener) {
    let at = 1;
    const move = (event) => {
      const box = this.drawing.getBoundingClientRect();
      at = bound((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT), 0, 1);
      listener(at);
    };
    this.drawing.addEventListener("pointermove", move);
    this.drawing.addEventListener("pointerleave", () => listener(null));
    this.drawing.addEventListener("blur", () => listener(null));
    this.drawing.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -0.01, ArrowRight: 0.01, Home: -1, End: 1 }[event.key];
      if (event.key === "Escape") listener(null);
      if (by === undefined) return;
      event.preventDefault();
      at = bound(at + by, 0, 1);
      listener(at);
    });
  }

  draw(view) {
    const { samples, until, span, point, opening } = view;
    const shown = samples.filter((sample) => sample.at >= until - span - 1);
    const target = this.target(opening);
    const values = shown.flatMap((sample) => this.lines.map((line) => line.read(sample))).filter((v) => v !== null);
    const nothing = values.length === 0;
    this.blank.textContent = nothing ? this.empty(opening) : "";
    this.drawing.classList.toggle("faint", nothing);
    this.width = this.element.querySelector(".plot").clientWidth || this.width;
    const most = this.most ?? round(Math.max(...values, target ?? 0, this.least) * 1.04);
    const inner = this.width - LEFT - RIGHT, height = HEIGHT - TOP - BOTTOM;
    const x = (at) => LEFT + (1 - (until - at) / span) * inner;
    const y = (value) => TOP + (1 - Math.min(value / most, 1)) * height;
    const parts = [...this.grid(most, y, span, inner, nothing)];
    if (target !== null && !nothing) parts.push(this.targetLine(target, y));
    for (const line of this.lines.toReversed()) parts.push(...this.line(line, shown, x, y));
    const marked = point === null ? shown.at(-1) : nearest(shown, until - (1 - point) * span);
    if (point !== null && marked) parts.push(...this.crosshair(marked, x, y));
    this.lines.forEach((line, index) => {
      const value = marked ? line.read(marked) : null;
      this.values[index].textContent = value === null ? "–" : this.write(value);
    });
    this.drawing.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.drawing.setAttribute("height", HEIGHT);
    this.drawing.setAttribute("aria-label", this.spoken(marked));
    this.drawing.replaceChildren(...parts);
  }

  *grid(most, y, span, inner, nothing) {
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      const at = y(most * part).toFixed(1);
      yield svg("path", { class: part ? "grid" : "axis", d: `M${LEFT} ${at}h${inner}` });
      const label = nothing && part ? "" : this.write(most * part);
      if (part !== 0.25 && part !== 0.75) yield svg("text", { class: "label", x: LEFT - 6, y: +at + 4, "text-anchor": "end" }, label);
    }
    for (const part of [0, 0.5, 1]) {
      const anchor = ["start", "middle", "end"][part * 2];
      yield svg("text", { class: "label", x: LEFT + part * inner, y: HEIGHT - 4, "text-anchor": anchor }, ago((1 - part) * span));
    }
  }

  *line(line, shown, x, y) {
    let path = "", area = "", open = null, last = null;
    const close = () => {
      if (last) area += `L${last} ${y(0).toFixed(1)}L${open} ${y(0).toFixed(1)}Z`;
      open = last = null;
    };
    for (const sample of shown) {
      const value = line.read(sample);
      if (value === null) { close(); continue; }
      const px = Math.max(x(sample.at), LEFT).toFixed(1), place = `${px} ${y(value).toFixed(1)}`;
      path += open === null ? `M${place}h0.01` : `L${place}`;
      area += `${open === null ? "M" : "L"}${place}`;
      open ??= px;
      last = px;
    }
    close();
    if (line === this.lines[0]) yield svg("path", { class: `area ${line.style}`, d: area });
    yield svg("path", { class: `line ${line.style}`, d: path });
  }

  targetLine(target, y) {
    const at = y(target).toFixed(1);
    return svg("g", { class: "target" }, svg("path", { d: `M${LEFT} ${at}H${this.width - RIGHT}` }),
      svg("text", { x: this.width - RIGHT, y: +at - 4, "text-anchor": "end" }, `target ${this.write(target)}`));
  }

  *crosshair(sample, x, y) {
    const at = x(sample.at).toFixed(1);
    yield svg("path", { class: "cross", d: `M${at} ${TOP}V${HEIGHT - BOTTOM}` });
    for (const line of this.lines) {
      const value = line.read(sample);
      if (value !== null) yield svg("circle", { class: `dot ${line.style}`, cx: at, cy: y(value).toFixed(1), r: 3.5 });
    }
  }

  spoken(sample) {
    if (!sample) return `${this.title}: no data`;
    const words = this.lines.map((line) => `${line.name} ${line.read(sample) === null ? "none" : this.write(line.read(sample))}`);
    return `${this.title}: ${words.join(", ")}`;
  }
}

function nearest(samples, at) {
  let best = null;
  for (const sample of samples) {
    if (best === null || Math.abs(sample.at - at) < Math.abs(best.at - at)) best = sample;
  }
  return best;
}
