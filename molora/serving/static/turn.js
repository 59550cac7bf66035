/* One turn of the conversation on the page: what was asked, who answers, the answer, and what it took.

Knows the markup of the template "turn", and nothing about the server.
*/

import { Answer } from "./answer.js";

const KINDS = { router: "router", base: "base model", adapter: "adapter" };

export class Turn {
  #root;
  #answer;

  /** `onRetry` is called when the reader wants a failed turn again. */
  constructor({ prompt, model, palette, onRetry }) {
    this.#root = document.getElementById("turn").content.cloneNode(true).firstElementChild;
    this.#root.dataset.kind = model.kind;
    this.#find(".prompt").textContent = prompt;
    const who = this.#find(".who");
    if (model.kind === "adapter") who.append(palette.swatch(model.name));
    const kind = document.createElement("span");
    kind.className = "muted";
    kind.textContent = KINDS[model.kind];
    who.append(model.name, " ", kind);
    const answer = this.#find(".answer");
    answer.ariaLabel = `Answer of ${model.name}`;
    answer.ariaBusy = "true";
    this.#answer = new Answer(answer, this.#find(".legend"), palette);
    this.#find(".notice button").addEventListener("click", onRetry);
    this.#find(".copy").addEventListener("click", () => this.#copy());
  }

  get element() {
    return this.#root;
  }

  get text() {
    return this.#answer.text;
  }

  get numTokens() {
    return this.#answer.numTokens;
  }

  add(token) {
    this.#answer.add(token);
    this.#find(".figures").hidden = false;
  }

  setFirstToken(milliseconds) {
    this.#figure(".first-token", `${count(Math.round(milliseconds))} ms`);
  }

  setSpeed(tokensPerSecond) {
    this.#figure(".speed", `${count(Number(tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0)))} tokens/s`);
  }

  setUsage({ prompt_tokens: prompt, prompt_tokens_details: details }) {
    const cached = details?.cached_tokens ?? 0;
    this.#find(".cached").textContent = `${count(cached)} cached`;
    this.#figure(".computed", `${count(prompt - cached)} computed`);
    this.#find(".meter").hidden = false;
    this.#find(".meter span").style.inlineSize = `${(100 * cached) / prompt}%`;
  }

  /** The answer is over; `note` says why where that is not plain. */
  finish(note = "") {
    this.#find(".answer").ariaBusy = "false";
    if (this.#find(".meter").hidden) this.#figure(".cache", "reported only at the end");
    this.#find(".note").textContent = note;
    this.#find(".note").hidden = !note;
  }

  fail(message) {
    this.finish();
    this.#find(".notice p").textContent = message;
    this.#find(".notice").hidden = false;
  }

  /** The conversation goes on without this turn, which failed: it can no longer be retried. */
  leaveOut() {
    this.#find(".notice button").hidden = true;
    this.#root.classList.add("left-out");
    this.finish("This turn is left out of the conversation.");
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #figure(selector, text) {
    const value = this.#find(selector);
    value.textContent = text;
    value.closest("dl > div").classList.add("known");
  }

  async #copy() {
    const label = this.#find(".copy span");
    label.textContent = (await copyText(this.text)) ? "Copied" : "Not copied";
    setTimeout(() => (label.textContent = "Copy"), 2000);
  }
}

const count = (number) => number.toLocaleString("en");

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  // Only pages of a safe origin have a clipboard, and a server in one's own network is often none.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}
