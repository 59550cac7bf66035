/* Which colour, underline and letter stand for an adapter.

Colour is never the only cue: eight hues and four underlines give 32 different pairs, and each adapter has a mark of its
own. Knows nothing about models, answers or where the looks are used; style.css says what they look like.
*/

const NUM_HUES = 8;
const NUM_LINES = 4;

export const BASE = "base";

export class Palette {
  #looks = new Map([[BASE, { mark: "", classes: ["base"] }]]);

  /** The look of an adapter. A name keeps its look for as long as the page is open. */
  look(name) {
    let look = this.#looks.get(name);
    if (look === undefined) {
      const index = this.#looks.size - 1;
      const line = (index + Math.floor(index / NUM_HUES)) % NUM_LINES;
      look = { mark: this.#freeMark(name), classes: [`hue-${index % NUM_HUES}`, `line-${line}`] };
      this.#looks.set(name, look);
    }
    return look;
  }

  /** A small sample of the look, as in a legend. */
  swatch(name) {
    const { mark, classes } = this.look(name);
    const element = document.createElement("span");
    element.className = "swatch";
    element.classList.add(...classes);
    element.textContent = mark;
    element.setAttribute("aria-hidden", "true");
    return element;
  }

  #freeMark(name) {
    const taken = new Set([...this.#looks.values()].map((look) => look.mark));
    const letters = [...name.toUpperCase()].filter((letter) => /[\p{L}\p{N}]/u.test(letter));
    return letters.find((letter) => !taken.has(letter)) ?? String(this.#looks.size);
  }
}

/** Who wrote a token: the adapter of the largest gate, or base. */
export function writer(route) {
  if (route.length === 0) return BASE;
  return route.reduce((best, pair) => (Math.abs(pair[1]) > Math.abs(best[1]) ? pair : best))[0];
}
