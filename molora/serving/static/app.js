/* The conversation: what is asked, of whom, and in which order. Joins the server (stream.js) with the page.

Knows nothing of the wire format, and of the page only its fixed controls.
*/

import { Announcer } from "./announcer.js";
import { Details } from "./details.js";
import { examplesFor } from "./examples.js";
import { Palette } from "./palette.js";
import { listModels, streamAnswer } from "./stream.js";
import { Turn } from "./turn.js";

const KEY = "molora-api-key";
const GROUPS = { router: "Router", base: "Base", adapter: "Adapters" };
const NEAR_END = 64; // pixels from the conversation's end within which it keeps following the answer

const find = (id) => document.getElementById(id);
const palette = new Palette();
const announcer = new Announcer(find("announcer"));
const details = new Details(find("details"), find("turns"), palette);

let models = [];
let turns = []; // { prompt, view, isOver }: isOver is true once the answer is part of the conversation
let answering = null; // the AbortController of the answer that streams

// Models

async function loadModels() {
  find("models-failed").hidden = true;
  try {
    models = await listModels({ key: sessionStorage.getItem(KEY) });
  } catch (error) {
    if (error.status === 401) askForKey();
    else {
      find("models-failed").querySelector("p").textContent = `The models could not be listed. ${error.message}`;
      find("models-failed").hidden = false;
    }
    return;
  }
  showModels();
}

/** The kind is said again where the group's label is out of sight, as it is once the list is closed. */
function option({ id, name, kind }) {
  return new Option(kind === "adapter" ? name : `${name} (${kind})`, id);
}

function showModels() {
  const groups = Object.entries(GROUPS).map(([kind, label]) => {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...models.filter((model) => model.kind === kind).map(option));
    return group;
  });
  find("model").replaceChildren(...groups.filter((group) => group.children.length > 0));
  const names = models.filter((model) => model.kind === "adapter").map((model) => model.name);
  find("adapters").replaceChildren(
    ...names.map((name) => {
      const item = document.createElement("li");
      item.append(palette.swatch(name), name);
      return item;
    }),
  );
  const base = models.find((model) => model.kind === "base")?.name;
  const size = names.length === 1 ? "1 adapter" : `${names.length} adapters`;
  find("served").textContent = base ? `${base}, ${size}` : size;
  showExamples(names);
}

function showExamples(adapters) {
  find("examples").replaceChildren(
    ...examplesFor(adapters).map(({ title, prompt }) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      const [strong, text] = [document.createElement("strong"), document.createElement("span")];
      strong.textContent = title;
      text.textContent = prompt;
      button.append(strong, " ", text);
      button.addEventListener("click", () => {
        ask(prompt);
        find("message").focus();
      });
      item.append(button);
      return item;
    }),
  );
}

// Asking

/** The question of a turn, with all that was said before it. A turn that failed was never said. */
function question(prompt, model) {
  const said = turns.filter((turn) => turn.isOver);
  const activation = find("activation").value;
  const maxTokens = find("max-tokens").valueAsNumber;
  return {
    model: model.id,
    messages: [
      ...said.flatMap((turn) => [
        { role: "user", content: turn.prompt },
        { role: "assistant", content: turn.view.text },
      ]),
      { role: "user", content: prompt },
    ],
    temperature: find("temperature").valueAsNumber,
    ...(activation && { activation }),
    ...(maxTokens && { max_completion_tokens: maxTokens }),
  };
}

async function ask(prompt) {
  const model = models.find(({ id }) => id === find("model").value);
  if (answering || !model || !optionsAreValid()) return;
  const asked = question(prompt, model);
  const view = new Turn({ prompt, model, palette, onRetry: retry });
  const turn = { prompt, view, isOver: false };
  const last = turns.at(-1);
  if (last && !last.isOver) last.view.leaveOut();
  turns.push(turn);
  find("empty").hidden = true;
  find("turns").append(view.element);
  follow({ always: true });
  announcer.start();

  answering = new AbortController();
  const { signal } = answering;
  showAnswering();
  try {
    const outcome = await receive(streamAnswer(asked, { key: sessionStorage.getItem(KEY), signal }), view);
    view.finish(outcome);
    turn.isOver = true;
    announcer.finish(outcome || "End of the answer.");
  } catch (error) {
    if (!turns.includes(turn)) return; // another conversation has begun
    if (signal.aborted) {
      const size = view.numTokens === 1 ? "1 token" : `${view.numTokens} tokens`;
      view.finish(`You stopped this answer ${view.numTokens > 0 ? `after ${size}` : "before its first token"}.`);
      turn.isOver = view.text !== "";
      announcer.finish("Stopped.");
    } else {
      view.fail(error.message);
      announcer.finish(error.message);
      if (error.status === 401) askForKey();
    }
  }
  answering = null;
  showAnswering();
  follow();
}

/** Show an answer as it comes; returns a note on why it ended, if that is not plain. */
async function receive(chunks, view) {
  const sentMs = performance.now();
  let firstMs = 0;
  let reason = null;
  for await (const { tokens, finishReason, usage } of chunks) {
    const nowMs = performance.now();
    for (const token of tokens) {
      view.add(token);
      announcer.add(token.text);
    }
    if (tokens.length > 0 && !firstMs) {
      firstMs = nowMs;
      view.setFirstToken(firstMs - sentMs);
    } else if (tokens.length > 0) view.setSpeed((1000 * (view.numTokens - 1)) / (nowMs - firstMs));
    reason = finishReason ?? reason;
    if (usage) view.setUsage(usage);
    follow();
  }
  if (reason === "length") return `Ended at the most tokens allowed, after ${view.numTokens}.`;
  return view.text ? "" : "The answer is empty.";
}

/** Ask the last turn again, which failed, of the model that is chosen now. */
function retry() {
  const { prompt, view } = turns.pop();
  view.element.remove();
  find("message").focus();
  ask(prompt);
}

function stop() {
  answering?.abort();
}

function startOver() {
  stop();
  answering = null;
  turns = [];
  details.hide();
  announcer.start();
  find("turns").replaceChildren();
  find("empty").hidden = false;
  find("message").focus();
  showAnswering();
}

// The page's controls

function showAnswering() {
  find("send").classList.toggle("stops", answering !== null);
  find("send").querySelector("span").textContent = answering ? "Stop" : "Send";
}

let isFollowing = true;

/** Keep the end of the answer in sight, unless the reader has scrolled away from it. */
function follow({ always = false } = {}) {
  isFollowing ||= always;
  const main = find("main");
  if (isFollowing && turns.length > 0) main.scrollTop = main.scrollHeight;
}

function askForKey() {
  const refused = sessionStorage.getItem(KEY) !== null;
  document.querySelector('label[for="key"]').textContent = refused
    ? "The server does not accept this API key; enter another"
    : "This server asks for an API key";
  find("key-form").hidden = false;
  find("key").focus();
  find("key").select();
}

function useKey() {
  const key = find("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  find("key-form").hidden = true;
  find("message").focus();
  if (models.length === 0) loadModels();
  else if (turns.length > 0 && !turns.at(-1).isOver) retry();
}

function toggleOptions(isOpen = find("options").hidden) {
  find("options").hidden = !isOpen;
  find("options-toggle").ariaExpanded = `${isOpen}`;
}

function optionsAreValid() {
  if (find("composer").checkValidity()) return true;
  toggleOptions(true);
  return find("composer").reportValidity();
}

function send() {
  const message = find("message");
  if (!message.value.trim()) return;
  const prompt = message.value.trim();
  if (answering || models.length === 0 || !optionsAreValid()) return;
  message.value = "";
  ask(prompt);
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) stop();
  else send();
  find("message").focus();
});
find("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  details.hide();
  stop();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
find("options-toggle").addEventListener("click", () => toggleOptions());
find("new").addEventListener("click", startOver);
find("models-failed").querySelector("button").addEventListener("click", loadModels);
let height = 0; // of the conversation's window, as last followed
find("main").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = find("main");
  if (clientHeight !== height) return; // the browser made up for the new height: not the reader's doing
  isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END;
});
// The options and a long message take room from the conversation; its end stays in sight.
new ResizeObserver(() => {
  height = find("main").clientHeight;
  follow();
}).observe(find("main"));

loadModels();
