/* One answer's tokens, coloured by who wrote them, and the legend that counts them.

Neighbours of one writer are merged into a run. Text only ever becomes text nodes. Knows nothing about the server, nor
about what is shown of a token that the reader points at.
*/

import { writer } from "./palette.js";

const tokensByElement = new WeakMap();

/** The tokens that an element of class "token" stands for: one, or several that completed a character together. */
export const tokensOf = (element) => tokensByElement.get(element);

export class Answer {
  text = "";
  numTokens = 0;
  #element;
  #legend;
  #palette;
  #run = null;
  #writer = null;
  #room = 0; // characters of its mark that the run is not yet long enough to hold
  #unshown = [];
  #counts = new Map();

  constructor(element, legend, palette) {
    this.#element = element;
    this.#legend = legend;
    this.#palette = palette;
  }

  add(token) {
    this.numTokens += 1;
    this.text += token.text;
    this.#count(writer(token.route));
    this.#unshown.push(token);
    if (token.text) this.#show(token);
  }

  #show({ text, route }) {
    const name = writer(route);
    if (name !== this.#writer) {
      // The space before a run's first word, and a line's end, belong to no run: a tint there would look like a slip.
      const lead = text.trim() ? text.match(/^\s*/)[0] : "";
      this.#element.append(lead);
      text = text.slice(lead.length);
      if (!text.trim() && text.includes("\n")) {
        this.#element.append(this.#span(text));
        this.#writer = null;
        return;
      }
      this.#startRun(name);
    }
    this.#run.append(this.#span(text));
    this.#room -= text.length;
    this.#run.classList.toggle("narrow", this.#room >= 0);
  }

  #startRun(name) {
    const { mark, classes } = this.#palette.look(name);
    this.#run = document.createElement("span");
    this.#run.className = "run";
    this.#run.classList.add(...classes);
    this.#run.dataset.writer = name;
    this.#run.dataset.mark = mark;
    this.#element.append(this.#run);
    this.#writer = name;
    this.#room = mark.length;
  }

  #span(text) {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = text;
    // One stop for the Tab key in an answer; the arrow keys go on from there.
    span.tabIndex = this.#element.querySelector(".token") ? -1 : 0;
    tokensByElement.set(span, this.#unshown);
    this.#unshown = [];
    return span;
  }

  #count(name) {
    let entry = this.#counts.get(name);
    if (entry === undefined) {
      const item = document.createElement("li");
      const number = document.createElement("span");
      number.className = "count";
      item.append(this.#palette.swatch(name), name, number);
      this.#legend.append(item);
      entry = { count: 0, number };
      this.#counts.set(name, entry);
    }
    entry.count += 1;
    entry.number.textContent = `${entry.count}`;
    entry.number.title = entry.count === 1 ? "1 token" : `${entry.count} tokens`;
  }
}
