// The playground: a conversation that streams, its sampling settings, and what else each token could have been.

import { html } from "./elements.js";
import { events } from "./feed.js";
import { Answer } from "./tokens.js";

// name, label, attributes, what it means; an empty field leaves the choice to the server
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, placeholder: "server's" }, "0 takes the likeliest token"],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01, placeholder: "1" }, "keep the likeliest tokens up to this share"],
  ["top_k", "Top k", { min: 0, max: 100000, step: 1, placeholder: "off" }, "keep so many tokens"],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01, placeholder: "0" }, "drop tokens below this share of the likeliest"],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 10, step: 0.05, placeholder: "1" }, "divides logits of tokens seen"],
  ["max_tokens", "Most tokens", { min: 1, max: 1000000, step: 1, value: 256 }, "of the answer"],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "any" }, "the same seed gives the same answer"],
  ["top_logprobs", "Alternatives", { min: 0, max: 20, step: 1, value: 5 }, "shown for each token"],
];

export class ChatView {
  constructor(root) {
    Object.assign(this, { turns: [], running: null, model: null, chat: true });
    this.fields = Object.fromEntries(FIELDS.map(([name, , attributes]) => [name, html("input", { id: `set-${name}`, type: "number", ...attributes })]));
    this.system = html("textarea", { id: "set-system", rows: 3, placeholder: "none" });
    this.shade = html("input", { id: "set-shade", type: "checkbox", checked: true, onchange: () => this.log.classList.toggle("shaded", this.shade.checked) });
    this.log = html("div", { class: "log shaded", role: "log", "aria-label": "Conversation" });
    this.blank = html("p", { class: "blank" });
    this.input = html("textarea", { id: "say", rows: 2, placeholder: "Say something", "aria-label": "Your message" });
    this.go = html("button", { class: "go" }, "Send");
    this.clear = html("button", { class: "quiet", type: "button", onclick: () => this.reset() }, "Clear");
    this.form = html("form", { class: "say" }, this.input, html("div", {}, this.go, this.clear));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.send();
      }
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.running) this.running.abort();
    });
    root.append(html("div", { class: "chat" },
      html("article", { class: "card talk" }, this.log, this.form),
      html("aside", { class: "card" }, html("h2", {}, "Sampling"), ...this.controls())));
    this.reset();
  }

  controls() {
    const rows = FIELDS.map(([name, label, , meaning]) => html("p", { class: "field" },
      html("label", { for: `set-${name}`, title: meaning }, label), this.fields[name]));
    this.systemRow = html("p", { class: "field wide" }, html("label", { for: "set-system" }, "System prompt"), this.system);
    return [...rows, this.systemRow,
      html("p", { class: "field check" }, this.shade, html("label", { for: "set-shade" }, "Shade tokens by probability")),
      html("p", { class: "note" }, "Enter sends, Shift+Enter begins a line, Escape stops. Point at a token, or focus an answer and use the arrow keys, to see what else it could have been.")];
  }

  open(opening) {
    this.model = opening.model;
    this.chat = opening.chat;
    this.systemRow.hidden = !this.chat;
    this.describe();
  }

  tick() {}

  draw() {}

  describe() {
    this.blank.textContent = this.chat
      ? "Nothing said yet. Messages go to /v1/chat/completions of this server and stay on this page."
      : "The served model has no chat template, so your text is continued by /v1/completions.";
  }

  reset() {
    this.running?.abort();
    this.turns = [];
    this.log.replaceChildren(this.blank);
    this.describe();
  }

  settings() {
    const given = {};
    for (const [name] of FIELDS) {
      const field = this.fields[name];
      if (field.value !== "" && field.reportValidity()) given[name] = Number(field.value);
    }
    return given;
  }

  request(text) {
    const { top_logprobs: best = 0, ...settings } = this.settings();
    const shared = { model: this.model, stream: true, stream_options: { include_usage: true }, ...settings };
    if (!this.chat) return ["/v1/completions", { ...shared, prompt: text, logprobs: best }];
    const system = this.system.value ? [{ role: "system", content: this.system.value }] : [];
    const messages = [...system, ...this.turns, { role: "user", content: text }];
    return ["/v1/chat/completions", { ...shared, messages, logprobs: true, top_logprobs: best }];
  }

  async send() {
    const text = this.input.value;
    if (!text.trim() || this.running || !this.model) return;
    if (Object.values(this.fields).some((field) => !field.reportValidity())) return;
    const [path, body] = this.request(text);
    this.blank.remove();
    this.input.value = "";
    const answer = new Answer(this.chat);
    this.log.append(html("div", { class: "turn user" }, text), answer.element);
    answer.element.scrollIntoView({ block: "nearest" });
    const running = this.busy(new AbortController());
    try {
      for await (const chunk of events(path, { body, signal: running.signal })) {
        if (chunk.error) throw new Error(chunk.error.message);
        this.follow(() => answer.take(chunk));
      }
      answer.finish();
    } catch (error) {
      answer.fail(error.name === "AbortError" ? "stopped" : error.message, { stopped: error.name === "AbortError" });
    }
    if (answer.text) this.turns.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
    if (this.running === running) this.busy(null);
  }

  // Keep the end in sight, unless the reader has scrolled up.
  follow(work) {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    work();
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  busy(running) {
    this.running = running;
    this.go.textContent = running ? "Stop" : "Send";
    this.go.classList.toggle("stop", running !== null);
    return running;
  }
}
