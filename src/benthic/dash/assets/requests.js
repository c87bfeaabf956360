// The timeline: one row a request, one bar a phase.

import { bound, count, html, seconds, svg, tip } from "./elements.js";

const ROW = 22, LEFT = 92, RIGHT = 118, AXIS = 24, MOST_ROWS = 40;
const PHASES = ["queue", "prefill", "transfer", "decode"];
const MEANING = {
  queue: "arrival until an engine starts with the prompt",
  prefill: "until the first token",
  transfer: "until the first token of the instance that pulled the blocks",
  decode: "until the last token",
};
const SPANS = [[10, "10 s"], [60, "1 min"], [300, "5 min"]];

export class RequestsView {
  constructor(root) {
    Object.assign(this, { cards: new Map(), span: 60, until: 0, frozen: false, chosen: null, unlisted: 0, live: false });
    this.spans = SPANS.map(([span, name]) => html("button", { class: "quiet", "aria-pressed": String(span === 60), onclick: () => this.setSpan(span) }, name));
    this.pause = html("button", { class: "quiet", "aria-pressed": "false", onclick: () => this.freeze() }, "Pause");
    this.drawing = svg("svg", { class: "timeline", tabindex: "0", role: "group", "aria-label": "Requests over time" });
    this.said = html("p", { class: "spoken", "aria-live": "polite" });
    this.blank = html("div", { class: "blank tall" }, html("p", {}, "No requests in this window."),
      html("p", {}, html("a", { href: "#chat" }, "Send one from the playground"), ", or point a client at ", html("code", {}, `${location.origin}/v1`), "."));
    this.note = html("p", { class: "note" });
    const keys = PHASES.map((name) => html("span", { class: `key ${name}`, title: MEANING[name] }, html("i"), name));
    root.append(
      html("div", { class: "bar" }, html("div", { role: "group", "aria-label": "Time shown" }, ...this.spans, this.pause), html("p", { class: "keys" }, ...keys)),
      html("article", { class: "card" }, this.drawing, this.blank, this.note, this.said),
    );
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.choose(null));
    this.drawing.addEventListener("blur", () => this.choose(null));
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  setSpan(span) {
    this.span = span;
    SPANS.forEach(([each], index) => this.spans[index].setAttribute("aria-pressed", String(each === span)));
    this.draw();
  }

  freeze() {
    this.frozen = !this.frozen;
    this.pause.setAttribute("aria-pressed", String(this.frozen));
    this.pause.textContent = this.frozen ? "Go on" : "Pause";
  }

  open(opening) {
    this.cards.clear();
    this.split = opening.instances.length > 0;
    this.update(opening.requests, opening.samples.at(-1)?.at ?? Date.now() / 1e3, 0);
  }

  tick({ sample, requests, unlisted }) {
    this.update(requests, sample.at, unlisted);
  }

  update(cards, until, unlisted) {
    if (this.frozen) return;
    for (const card of cards) this.cards.set(card.number, card);
    for (const number of [...this.cards.keys()].sort((a, b) => a - b).slice(0, -800)) this.cards.delete(number);
    Object.assign(this, { until, unlisted });
    this.draw();
  }

  rows() {
    const from = this.until - this.span;
    const inside = [...this.cards.values()].filter((card) => card.phases.at(-1)[2] > from);
    inside.sort((a, b) => b.number - a.number);
    return { shown: inside.slice(0, MOST_ROWS), left: inside.length - Math.min(inside.length, MOST_ROWS) + this.unlisted };
  }

  draw() {
    if (this.drawing.closest("[hidden]")) return;
    const { shown, left } = this.rows();
    this.shown = shown;
    this.blank.hidden = shown.length > 0;
    this.drawing.toggleAttribute("hidden", shown.length === 0);
    this.note.textContent = left ? `${count(left)} more in this window are not drawn.` : "";
    const width = this.drawing.parentElement.clientWidth - 32;
    const inner = width - LEFT - RIGHT, height = AXIS + shown.length * ROW + 4;
    const x = (at) => LEFT + bound(1 - (this.until - at) / this.span, 0, 1) * inner;
    const parts = [0, 0.25, 0.5, 0.75, 1].flatMap((part) => {
      const at = LEFT + part * inner, ago = (1 - part) * this.span;
      const words = part === 1 ? "now" : ago < 120 ? `−${+ago.toFixed(1)} s` : `−${+(ago / 60).toFixed(2)} min`;
      return [svg("path", { class: "grid", d: `M${at} ${AXIS}V${height}` }), svg("text", { class: "label", x: at, y: 13, "text-anchor": "middle" }, words)];
    });
    shown.forEach((card, index) => parts.push(this.row(card, index, x, width)));
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.drawing.setAttribute("height", height);
    this.drawing.replaceChildren(...parts);
  }

  row(card, index, x, width) {
    const top = AXIS + index * ROW, going = card.reason === null;
    const bars = card.phases.map(([name, start, end, where]) => {
      const from = x(start), to = Math.max(x(end), from + 1.5);
      const bar = svg("rect", { class: `phase ${name}`, x: from.toFixed(1), y: top + 4, width: (to - from).toFixed(1), height: ROW - 8, rx: 2 });
      const fits = where && to - from > where.length * 6.4 + 10;
      return fits ? svg("g", {}, bar, svg("text", { class: "inside", x: (from + 5).toFixed(1), y: top + 15 }, where)) : bar;
    });
    const state = going ? card.phases.at(-1)[0] : `${count(card.tokens)} tokens`;
    const verdict = card.met === false ? "missed" : ["error", "abort"].includes(card.reason) ? card.reason : "";
    return svg("g", { class: `row${index === this.chosen ? " chosen" : ""}${verdict ? " bad" : ""}`, "data-index": index },
      svg("rect", { class: "behind", x: 0, y: top, width, height: ROW, rx: 4 }),
      svg("text", { class: "label name", x: 6, y: top + 15 }, `#${card.number}`),
      svg("text", { class: "label", x: LEFT - 8, y: top + 15, "text-anchor": "end" }, `${count(card.prompt)} →`),
      ...bars,
      svg("text", { class: "label state", x: width - RIGHT + 10, y: top + 15 }, verdict ? `${verdict} · ${state}` : state));
  }

  point(event) {
    const row = event.target.closest(".row");
    this.choose(row ? Number(row.dataset.index) : null, event.clientX, event.clientY);
  }

  key(event) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (event.key === "Escape") this.choose(null);
    if (by === undefined || !this.shown.length) return;
    event.preventDefault();
    const index = bound((this.chosen ?? -by) + by, 0, this.shown.length - 1);
    const box = this.drawing.getBoundingClientRect();
    this.choose(index, box.left + LEFT, box.top + AXIS + index * ROW + ROW / 2);
    this.said.textContent = this.words(this.shown[index]).map((line) => line.join(" ")).join(", ");
  }

  choose(index, x, y) {
    this.chosen = index;
    for (const row of this.drawing.querySelectorAll(".row")) row.classList.toggle("chosen", Number(row.dataset.index) === index);
    if (index === null || !this.shown[index]) {
      tip.hide();
      return;
    }
    const lines = this.words(this.shown[index]).map(([name, value]) => html("tr", {}, html("th", {}, name), html("td", {}, value)));
    tip.show(html("table", {}, ...lines), x, y);
  }

  words(card) {
    const lines = [["request", card.id], ["prompt", `${count(card.prompt)} tokens, ${count(card.cached)} from the cache`]];
    for (const [name, start, end, where] of card.phases) lines.push([name, `${seconds(end - start)}${where ? ` on ${where}` : ""}`]);
    if (card.ttft !== null) lines.push(["TTFT", seconds(card.ttft)]);
    if (card.tpot !== null) lines.push(["TPOT", seconds(card.tpot)]);
    lines.push(["state", card.reason === null ? "in flight" : `${card.reason} after ${count(card.tokens)} tokens`]);
    if (card.met !== null) lines.push(["targets", card.met ? "met" : "missed"]);
    return lines;
  }
}
