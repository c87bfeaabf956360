// The live view: figures of this moment, and charts of the last minutes.

import { Chart } from "./charts.js";
import { count, html, rate, seconds, share } from "./elements.js";

const last = (pair, index) => (pair === null ? null : pair[index]);
const noTargets = () => "No latency targets to count against. Start the server with --goodput 'ttft:500 tpot:50'.";

const CHARTS = [
  {
    title: "Time to first token", note: "arrival to first token, last 10 s", write: seconds, target: (opening) => opening.targets.ttft ?? null,
    lines: [{ name: "p99", style: "two", read: (s) => last(s.ttft, 1) }, { name: "median", style: "one", read: (s) => last(s.ttft, 0) }],
    empty: () => "No first token in this window.",
  },
  {
    title: "Time per output token", note: "of sequences that ended, last 10 s", write: seconds, target: (opening) => opening.targets.tpot ?? null,
    lines: [{ name: "p99", style: "two", read: (s) => last(s.tpot, 1) }, { name: "median", style: "one", read: (s) => last(s.tpot, 0) }],
    empty: () => "No sequence of two tokens or more ended in this window.",
  },
  {
    title: "Goodput", note: "requests a second that met every target", write: rate,
    lines: [{ name: "met", style: "good", read: (s) => s.goodput }, { name: "ended", style: "muted", read: (s) => (s.goodput === null ? null : s.ended) }],
    empty: noTargets,
  },
  {
    title: "Tokens a second", note: "prompt tokens without cached ones", write: rate,
    lines: [{ name: "generated", style: "good", read: (s) => s.generation_rate }, { name: "prompt", style: "one", read: (s) => s.prompt_rate }],
  },
  {
    title: "Sequences", note: "in the batch, and in line for it", write: count, least: 2,
    lines: [{ name: "running", style: "one", read: (s) => s.running }, { name: "waiting", style: "warn", read: (s) => s.waiting }],
  },
  {
    title: "KV cache", note: "share of blocks that requests hold", write: share, most: 1,
    lines: [{ name: "in use", style: "two", read: (s) => s.kv }],
  },
  {
    title: "Draft acceptance", note: "share of drafted tokens that held", write: share, most: 1,
    lines: [{ name: "accepted", style: "good", read: (s) => s.acceptance }],
    empty: () => "Nothing was drafted in this window: speculation is off or had no work.",
  },
  {
    title: "Engine", note: "share of time spent on steps", write: share, most: 1,
    lines: [{ name: "busy", style: "one", read: (s) => Math.min(s.busy, 1) }],
  },
];

const TILES = [
  ["Running", (s) => count(s.running)],
  ["Waiting", (s) => count(s.waiting)],
  ["KV cache", (s) => share(s.kv)],
  ["Generated / s", (s) => rate(s.generation_rate)],
  ["TTFT, median", (s) => (s.ttft ? seconds(s.ttft[0]) : "–")],
  ["TPOT, median", (s) => (s.tpot ? seconds(s.tpot[0]) : "–")],
  ["Met targets", (s) => (s.attained === null ? "–" : share(s.attained))],
];

const SPANS = [[60, "1 min"], [300, "5 min"], [600, "10 min"]];

export class LiveView {
  constructor(root) {
    this.view = { samples: [], until: 0, span: 60, point: null, opening: { targets: {} } };
    Object.assign(this, { root, all: [], frozen: false });
    this.tiles = TILES.map(([name]) => ({ name, value: html("b", {}, "–") }));
    this.charts = CHARTS.map((each) => new Chart(each));
    this.instances = html("div", { class: "card instances", hidden: true });
    this.pause = html("button", { class: "quiet", "aria-pressed": "false", onclick: () => this.freeze() }, "Pause");
    this.spans = SPANS.map(([span, name]) => html("button", { class: "quiet", "aria-pressed": String(span === 60), onclick: () => this.setSpan(span) }, name));
    root.append(
      html("div", { class: "tiles" }, ...this.tiles.map((tile) => html("p", { class: "tile" }, html("span", {}, tile.name), tile.value))),
      html("div", { class: "bar", role: "group", "aria-label": "Time shown" }, ...this.spans, this.pause),
      this.instances,
      html("div", { class: "charts" }, ...this.charts.map((chart) => chart.element)),
    );
    for (const chart of this.charts) {
      chart.onPoint((point) => {
        this.view.point = point;
        this.draw();
      });
    }
    new ResizeObserver(() => this.draw()).observe(root);
  }

  setSpan(span) {
    this.view.span = span;
    SPANS.forEach(([each], index) => this.spans[index].setAttribute("aria-pressed", String(each === span)));
    this.draw();
  }

  freeze() {
    this.frozen = !this.frozen;
    this.pause.setAttribute("aria-pressed", String(this.frozen));
    this.pause.textContent = this.frozen ? "Go on" : "Pause";
    this.refresh();
  }

  open(opening) {
    this.view.opening = opening;
    this.all = opening.samples;
    this.showInstances(opening.instances);
    this.refresh();
  }

  tick({ sample, instances }) {
    this.all.push(sample);
    if (this.all.length > 600) this.all.shift();
    this.showInstances(instances);
    this.refresh();
  }

  refresh() {
    if (this.frozen) return;
    this.view.samples = [...this.all];
    this.view.until = this.all.at(-1)?.at ?? 0;
    TILES.forEach(([, read], index) => {
      if (this.all.length) this.tiles[index].value.textContent = read(this.all.at(-1));
    });
    this.draw();
  }

  draw() {
    if (this.root.hidden) return;
    for (const chart of this.charts) chart.draw(this.view);
  }

  showInstances(rows) {
    this.instances.hidden = rows.length === 0;
    if (!rows.length) return;
    const head = ["Instance", "Role", "Status", "Requests", "Queued tokens", "KV assigned"];
    const body = rows.map((row) => [row.name, row.role, row.status, count(row.requests), count(row.queued_tokens), share(row.kv)]);
    const line = (cells, tag) => html("tr", {}, ...cells.map((cell) => html(tag, {}, cell)));
    this.instances.replaceChildren(html("table", {}, html("thead", {}, line(head, "th")), html("tbody", {}, ...body.map((cells) => line(cells, "td")))));
  }
}
