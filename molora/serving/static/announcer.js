/* What a screen reader says of an answer as it streams: whole sentences, not tokens.

Writes into a polite live region and knows nothing else of the page.
*/

const SENTENCE_END = /[.!?…:]["”’)]*\s|\n/g;

export class Announcer {
  #region;
  #pending = "";

  constructor(region) {
    this.#region = region;
  }

  /** Forget what was said, so that the region does not grow with the conversation. */
  start() {
    this.#region.replaceChildren();
    this.#pending = "";
  }

  /** A piece of the answer. */
  add(text) {
    this.#pending += text;
    const end = [...this.#pending.matchAll(SENTENCE_END)].at(-1);
    if (end === undefined) return;
    const length = end.index + end[0].length;
    this.say(this.#pending.slice(0, length));
    this.#pending = this.#pending.slice(length);
  }

  /** The answer's rest, and then what became of it. */
  finish(outcome) {
    this.say(this.#pending);
    this.say(outcome);
    this.#pending = "";
  }

  say(text) {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text.trim();
    this.#region.append(line);
  }
}
