// Tabs, colours, and the connection to the server.

import { ChatView } from "./chat.js";
import { events, Refused, setKey } from "./feed.js";
import { LiveView } from "./live.js";
import { RequestsView } from "./requests.js";

const find = (id) => document.getElementById(id);
const views = { live: new LiveView(find("live")), requests: new RequestsView(find("requests")), chat: new ChatView(find("chat")) };
const tabs = Object.keys(views).map((name) => find(`tab-${name}`));

function show(name) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    find(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  views[name].draw();
}

const named = () => (location.hash.slice(1) in views ? location.hash.slice(1) : "live");
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => { location.hash = tab.getAttribute("aria-controls"); });
  tab.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined) return;
    const next = tabs[(index + by + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
});
addEventListener("hashchange", () => show(named()));
show(named());

const THEMES = { auto: "as the system has them", light: "light", dark: "dark" };
function colour(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem("benthic-theme", name);
  find("theme").textContent = name[0].toUpperCase() + name.slice(1);
  find("theme").setAttribute("aria-label", `Colours: ${THEMES[name]}`);
}
find("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES), now = localStorage.getItem("benthic-theme");
  colour(names[(names.indexOf(now) + 1) % names.length]);
});
colour(localStorage.getItem("benthic-theme") in THEMES ? localStorage.getItem("benthic-theme") : "auto");

function say(state, words) {
  find("link").dataset.state = state;
  find("link").textContent = words;
}

function take(event) {
  if (event.kind === "opening") {
    find("model").textContent = event.model;
    document.title = `benthic · ${event.model}`;
    say("up", "live");
    for (const view of Object.values(views)) view.open(event);
  } else if (event.kind === "tick") {
    for (const view of Object.values(views)) view.tick(event);
  }
}

let wake = () => {};
find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("key-value").value);
  find("key").hidden = true;
  wake();
});

async function listen() {
  for (;;) {
    try {
      for await (const event of events("/dash/events")) take(event);
      say("down", "the server is draining");
    } catch (error) {
      const wanted = error instanceof Refused && error.status === 401;
      say("down", wanted ? "key needed" : "no connection");
      find("key").hidden = !wanted;
      if (wanted) await new Promise((resolve) => { wake = resolve; });
    }
    await new Promise((resolve) => { setTimeout(resolve, 1500); });
  }
}
listen();
