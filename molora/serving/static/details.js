/* What is shown of the token under the pointer or the keyboard focus, and the keys that move between tokens.

Left and right go to the next token, up and down to the next run, Home and End to the ends. Knows tokens and their
elements, and nothing about the server or the conversation.
*/

import { tokensOf } from "./answer.js";
import { BASE, writer } from "./palette.js";

const GAP = 8; // pixels between a token and the box, and between the box and the window's edges
const LEAVE_MS = 120; // so that the pointer can move from the token into the box

export class Details {
  #box;
  #palette;
  #token = null;
  #leaving = 0;

  /** Show in `box` the details of the tokens inside `turns`. */
  constructor(box, turns, palette) {
    this.#box = box;
    this.#palette = palette;
    const tokenAt = (event) => event.target.closest?.(".token");
    // Not "pointerover", which text that streams under a resting pointer would set off.
    turns.addEventListener("pointermove", (event) => this.#point(tokenAt(event)));
    turns.addEventListener("pointerout", () => this.#leave());
    box.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    box.addEventListener("pointerleave", () => this.#leave());
    turns.addEventListener("focusin", (event) => tokenAt(event) && this.#focus(tokenAt(event)));
    turns.addEventListener("focusout", () => this.hide());
    turns.addEventListener("keydown", (event) => tokenAt(event) && this.#move(event));
    addEventListener("scroll", () => this.#place(), { capture: true, passive: true });
    addEventListener("resize", () => this.#place());
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#token?.classList.remove("shown");
    this.#token?.removeAttribute("aria-describedby");
    this.#token = null;
    this.#box.hidden = true;
  }

  #point(token) {
    if (!token) return;
    clearTimeout(this.#leaving);
    if (token !== this.#token) this.#show(token);
  }

  #leave() {
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => {
      const focused = document.activeElement?.closest(".token");
      if (focused) this.#show(focused);
      else this.hide();
    }, LEAVE_MS);
  }

  #focus(token) {
    token.closest(".answer").querySelector('.token[tabindex="0"]').tabIndex = -1;
    token.tabIndex = 0;
    this.#show(token);
  }

  #move(event) {
    const tokens = [...event.target.closest(".answer").querySelectorAll(".token")];
    const here = tokens.indexOf(event.target);
    const startsRun = (token) => token.parentElement.firstChild === token || !token.closest(".run");
    const target = {
      ArrowLeft: () => tokens[here - 1],
      ArrowRight: () => tokens[here + 1],
      ArrowUp: () => tokens.slice(0, here).findLast(startsRun),
      ArrowDown: () => tokens.slice(here + 1).find(startsRun),
      Home: () => tokens[0],
      End: () => tokens.at(-1),
    }[event.key];
    if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    target()?.focus();
  }

  #show(token) {
    this.hide();
    this.#token = token;
    token.classList.add("shown");
    token.setAttribute("aria-describedby", this.#box.id);
    this.#box.replaceChildren(...describe(tokensOf(token), this.#palette));
    if (token.matches(":focus-visible")) {
      const keys = element("p", "caption keys", "← → tokens  ↑ ↓ runs");
      keys.setAttribute("aria-hidden", "true"); // the answer's own description says it once
      this.#box.append(keys);
    }
    this.#box.hidden = false;
    this.#place();
  }

  #place() {
    if (!this.#token) return;
    const [line] = this.#token.getClientRects();
    const box = this.#box.getBoundingClientRect();
    const below = line.bottom + GAP;
    const fitsBelow = below + box.height + GAP <= innerHeight;
    const top = fitsBelow ? below : Math.max(GAP, line.top - GAP - box.height);
    const left = Math.min(line.left, innerWidth - box.width - GAP);
    this.#box.style.top = `${top}px`;
    this.#box.style.left = `${Math.max(GAP, left)}px`;
  }
}

/** The box's content for tokens that were shown together; all but the last have no text of their own. */
function describe(tokens, palette) {
  const { text, route, candidates, logprob } = tokens.at(-1);
  const parts = [];
  const head = element("p", "head");
  head.append(palette.swatch(writer(route)), element("strong", "", writer(route)), quoted(text));
  parts.push(head);
  if (tokens.length > 1) parts.push(element("p", "", `The last of ${tokens.length} tokens that make up this text.`));

  const facts = element("dl");
  for (const [name, gate] of route) facts.append(...fact(route.length > 1 ? `Gate of ${name}` : "Gate", gate.toFixed(2)));
  if (logprob !== null) facts.append(...fact("Log-probability", `${signed(logprob)} (${percent(Math.exp(logprob))})`));
  if (facts.children.length > 0) parts.push(facts);

  if (candidates.length > 0) {
    const list = element("ul", "candidates");
    list.ariaLabel = "The router’s candidates";
    list.append(...candidates.map(([name, probability]) => candidate(name, probability, palette)));
    parts.push(element("p", "caption", "The router’s choice and runner-up"), list);
  } else {
    parts.push(element("p", "muted", route.length > 0 ? "No router ran: the adapter was named." : "No router ran."));
  }
  return parts;
}

function candidate(name, probability, palette) {
  const item = element("li");
  const meter = element("span", "meter");
  meter.setAttribute("aria-hidden", "true");
  const filled = element("span");
  filled.style.inlineSize = percent(probability);
  if (name !== BASE) meter.classList.add(...palette.look(name).classes);
  meter.append(filled);
  item.append(element("span", "name", name), " ", meter, " ", element("span", "number", percent(probability)));
  return item;
}

function fact(name, value) {
  return [element("dt", "", name), element("dd", "", value)];
}

/** A token's text with its line ends made visible. */
function quoted(text) {
  return element("span", "quoted", `“${text.replaceAll("\n", "↵")}”`);
}

const signed = (number) => number.toFixed(2).replace(/^-(?!0\.00$)/, "−").replace("-", "");

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}
