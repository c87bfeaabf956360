"use strict";
const page = document.body;
const left = Number(page.dataset.left), width = Number(page.dataset.width), until = Number(page.dataset.until);
const tip = document.getElementById("tip"), follow = document.getElementById("follow");
const view = { from: 0, to: until };
let pinned = null;
let lit = null;
let drag = null;

const charts = [...document.querySelectorAll("svg.lanes")].map((svg) => ({
  svg,
  path: svg.querySelector(".path"),
  ticks: [...svg.querySelectorAll(".tick")],
  idle: [...svg.querySelectorAll(".idle")].map((bar) => ({ bar, end: Number(bar.getAttribute("width")) / width * until })),
  slots: [...svg.querySelectorAll(".slot")].map((group) => ({
    group,
    name: group.dataset.name,
    rank: group.dataset.rank,
    start: Number(group.dataset.start),
    end: Number(group.dataset.end),
    bars: [...group.querySelectorAll("rect")],
    labels: [...group.querySelectorAll("text")],
  })),
}));

const x = (time) => left + (time - view.from) / (view.to - view.from) * width;
const inside = (value) => Math.min(Math.max(value, left), left + width);
const shown = (time) => String(Number(time.toPrecision(6)));

function place(bar, start, end, gap) {
  const from = inside(x(start)), to = inside(x(end));
  bar.setAttribute("x", from.toFixed(2));
  bar.setAttribute("width", Math.max(to - from - gap, 0).toFixed(2));
  return [from, to];
}

function draw() {
  for (const chart of charts) {
    for (const { bar, end } of chart.idle) place(bar, 0, end, 0);
    for (const slot of chart.slots) drawSlot(slot);
    chart.ticks.forEach((tick, index) => {
      tick.textContent = shown(view.from + (view.to - view.from) * index / (chart.ticks.length - 1));
    });
  }
  drawPaths();
}

function drawSlot(slot) {
  const visible = slot.end > view.from && slot.start < view.to;
  slot.group.setAttribute("display", visible ? "inline" : "none");
  if (!visible) return;
  for (const bar of slot.bars) {
    const [from, to] = place(bar, slot.start, slot.end, 0.6);
    for (const label of slot.labels) {
      label.setAttribute("x", ((from + to) / 2).toFixed(2));
      label.setAttribute("visibility", label.textContent.length * 7.2 <= to - from ? "visible" : "hidden");
    }
  }
}

function drawPaths() {
  for (const { path, slots } of charts) {
    const points = [];
    for (const slot of slots) {
      for (const bar of slot.bars) {
        const middle = (slot.start + slot.end) / 2;
        if (!bar.classList.contains("lit") || middle < view.from || middle > view.to) continue;
        const y = Number(bar.getAttribute("y")) + Number(bar.getAttribute("height")) / 2;
        points.push([slot.start, x(middle), y]);
      }
    }
    points.sort((a, b) => a[0] - b[0]);
    path.setAttribute("points", points.map(([, px, py]) => `${px.toFixed(1)},${py}`).join(" "));
  }
}

function light(microbatch) {
  const wanted = microbatch === null ? null : String(microbatch);
  if (wanted === lit) return;
  lit = wanted;
  page.classList.toggle("following", wanted !== null);
  for (const { slots } of charts) {
    for (const { bars } of slots) {
      for (const bar of bars) bar.classList.toggle("lit", bar.dataset.microbatch === wanted);
    }
  }
  drawPaths();
}

function pin(microbatch) {
  pinned = microbatch;
  follow.value = microbatch === null ? "" : microbatch;
  light(microbatch);
}

function zoom(factor, around) {
  const span = Math.min((view.to - view.from) * factor, until);
  const share = (around - view.from) / (view.to - view.from);
  view.from = Math.min(Math.max(around - share * span, 0), until - span);
  view.to = view.from + span;
  draw();
}

function move(by) {
  const span = view.to - view.from;
  view.from = Math.min(Math.max(view.from + by, 0), until - span);
  view.to = view.from + span;
  draw();
}

function timeAt(svg, event) {
  const box = svg.getBoundingClientRect();
  const inner = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  return view.from + (inner - left) / width * (view.to - view.from);
}

function slotOf(target) {
  const group = target.closest ? target.closest(".slot") : null;
  return group && { group, bar: target.closest("rect") };
}

for (const { svg } of charts) {
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, timeAt(svg, event));
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    drag = { svg, at: timeAt(svg, event), moved: false };
  });
  svg.addEventListener("pointermove", (event) => {
    if (drag) {
      const by = drag.at - timeAt(svg, event);
      if (Math.abs(by) > (view.to - view.from) / 400) {
        drag.moved = true;
        svg.classList.add("moving");
        move(by);
      }
      return;
    }
    const over = slotOf(event.target);
    tip.hidden = !over;
    if (!over) {
      light(pinned);
      return;
    }
    const { name, rank, start, end } = over.group.dataset;
    const took = shown(Number(end) - Number(start));
    tip.textContent = `${name} on rank ${rank}\n${shown(Number(start))} to ${shown(Number(end))}, takes ${took}`;
    tip.style.left = `${event.clientX + 14}px`;
    tip.style.top = `${event.clientY + 14}px`;
    if (pinned === null && over.bar) light(over.bar.dataset.microbatch);
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    light(pinned);
  });
}

window.addEventListener("pointerup", (event) => {
  const clicked = drag && !drag.moved ? slotOf(event.target) : null;
  if (drag) drag.svg.classList.remove("moving");
  if (drag && !drag.moved) pin(clicked && clicked.bar ? clicked.bar.dataset.microbatch : null);
  drag = null;
});
window.addEventListener("keydown", (event) => {
  if (event.target === follow) return;
  const middle = (view.from + view.to) / 2, step = (view.to - view.from) / 8;
  if (event.key === "Escape") { pin(null); zoom(Infinity, middle); }
  if (event.key === "+") zoom(0.8, middle);
  if (event.key === "-") zoom(1.25, middle);
  if (event.key === "ArrowLeft") move(-step);
  if (event.key === "ArrowRight") move(step);
});
follow.addEventListener("input", () => {
  pinned = follow.value === "" ? null : follow.value;
  light(pinned);
});
document.getElementById("closer").addEventListener("click", () => zoom(0.5, (view.from + view.to) / 2));
document.getElementById("wider").addEventListener("click", () => zoom(2, (view.from + view.to) / 2));
document.getElementById("all").addEventListener("click", () => { pin(null); zoom(Infinity, 0); });
draw();
