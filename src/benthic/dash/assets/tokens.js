// One answer as it streams: its tokens, each with what else it could have been.

import { bound, html, rate, seconds, share, tip } from "./elements.js";

const STEPS = [0.02, 0.1, 0.3, 0.7];  // where the shade of a token changes

export class Answer {
  constructor(chat) {
    Object.assign(this, { chat, text: "", tokens: [], chosen: null, usage: null, reason: null, began: performance.now(), first: null, latest: null });
    this.decoder = new TextDecoder();
    this.body = html("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Answer. Arrow keys go through its tokens." });
    this.facts = html("p", { class: "facts", role: "status" }, "waiting for the first token");
    this.element = html("div", { class: "turn answer" }, this.body, this.facts);
    this.body.addEventListener("pointerover", (event) => this.point(event.target.closest(".token")));
    this.body.addEventListener("pointerleave", () => this.choose(null));
    this.body.addEventListener("blur", () => this.choose(null));
    this.body.addEventListener("keydown", (event) => this.key(event));
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.text += (this.chat ? choice.delta.content : choice.text) ?? "";
    const found = this.chat ? chatTokens(choice.logprobs, this.decoder) : plainTokens(choice.logprobs);
    const ended = choice.finish_reason === "stop" && (choice.stop_reason ?? null) === null;
    found.forEach((token, index) => this.add(token, ended && index === found.length - 1));
    if (found.length) {
      this.latest = performance.now();
      this.first ??= this.latest;
    }
    this.reason = choice.finish_reason ?? this.reason;
    this.facts.textContent = this.words();
  }

  add(token, isEnd) {
    const chance = Math.exp(token.logprob);
    const step = STEPS.filter((least) => chance >= least).length;
    const shown = isEnd ? token.name : token.text;
    const element = html("span", { class: `token p${step}${isEnd ? " end" : ""}`, "data-index": this.tokens.length }, shown);
    this.tokens.push({ ...token, chance, element });
    this.body.append(element);
  }

  finish() {
    this.facts.textContent = this.words();
  }

  fail(message, { stopped }) {
    this.facts.textContent = stopped ? `${this.words()} · stopped` : message;
    this.facts.classList.toggle("bad", !stopped);
  }

  words() {
    const number = this.usage?.completion_tokens ?? this.tokens.length;
    const words = [`${number} ${number === 1 ? "token" : "tokens"}`];
    if (this.first !== null) words.push(`first after ${seconds((this.first - this.began) / 1e3)}`);
    if (this.tokens.length > 1 && this.latest > this.first) words.push(`${rate((this.tokens.length - 1) / (this.latest - this.first) * 1e3)} tokens/s`);
    if (this.tokens.length) words.push(`mean probability ${share(this.tokens.reduce((sum, each) => sum + each.chance, 0) / this.tokens.length)}`);
    if (this.usage?.prompt_tokens_details?.cached_tokens) words.push(`${this.usage.prompt_tokens_details.cached_tokens} of ${this.usage.prompt_tokens} prompt tokens cached`);
    if (this.reason) words.push({ stop: "ended by itself", length: "cut at the limit", tool_calls: "called a tool" }[this.reason] ?? this.reason);
    return words.join(" · ");
  }

  point(element) {
    this.choose(element ? Number(element.dataset.index) : null);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.choose(null);
    if (by === undefined || !this.tokens.length) return;
    event.preventDefault();
    const from = this.chosen ?? (by > 0 ? -1 : this.tokens.length);
    this.choose(bound(from + by, 0, this.tokens.length - 1));
    this.tokens[this.chosen].element.scrollIntoView({ block: "nearest" });
  }

  choose(index) {
    if (this.chosen !== null) this.tokens[this.chosen].element.classList.remove("chosen");
    this.chosen = index;
    if (index === null) {
      tip.hide();
      return;
    }
    const token = this.tokens[index], box = token.element.getBoundingClientRect();
    token.element.classList.add("chosen");
    tip.show(card(token), box.left, box.bottom - 8);
    const spoken = `${visible(token.name)}, probability ${share(token.chance)}`;
    this.body.setAttribute("aria-label", `Answer, token ${index + 1} of ${this.tokens.length}: ${spoken}`);
  }
}

// The chosen token and its alternatives, each with a bar as long as its probability.
function card(token) {
  const rows = token.others.some((other) => other.name === token.name) ? token.others : [...token.others, token];
  const line = (other) => {
    const chance = Math.exp(other.logprob), bar = html("meter", { min: 0, max: 1, value: chance });
    return html("tr", { class: other.name === token.name ? "own" : "" }, html("td", { class: "name" }, visible(other.name)),
      html("td", {}, bar), html("td", {}, share(chance)), html("td", { class: "faint" }, other.logprob.toFixed(2)));
  };
  const left = 1 - rows.reduce((sum, other) => sum + Math.exp(other.logprob), 0);
  const rest = html("tr", { class: "faint" }, html("td", {}, "all others"), html("td"), html("td", {}, share(Math.max(left, 0))), html("td"));
  return html("table", { class: "chances" }, ...rows.map(line), rest);
}

const visible = (name) => (name === "" ? "(nothing)" : name.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥"));

// A character may take several tokens: its text shows at the one that completes it.
function chatTokens(logprobs, decoder) {
  return (logprobs?.content ?? []).map((entry) => ({
    name: entry.token,
    text: decoder.decode(new Uint8Array(entry.bytes), { stream: true }),
    logprob: entry.logprob,
    others: entry.top_logprobs.map((other) => ({ name: other.token, logprob: other.logprob })),
  }));
}

function plainTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((name, index) => ({
    name,
    text: name,
    logprob: logprobs.token_logprobs[index],
    others: Object.entries(logprobs.top_logprobs[index] ?? {}).map(([other, logprob]) => ({ name: other, logprob })),
  }));
}
