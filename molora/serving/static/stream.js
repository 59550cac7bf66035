/* The server, as this page uses it: the list of models, and one answer as it streams.

Knows the wire format and nothing about the page. Everything that goes wrong is a ServerError or a ConnectionLost,
whose message can be shown as it is; a request that the caller aborts throws the AbortError of fetch.
*/

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class ConnectionLost extends Error {}

const UNREACHABLE = "The server cannot be reached.";
const LOST = "The connection was lost before the answer was complete.";

/** The models on offer, in the server's order, as { id, name, kind }; kind is "router", "base" or "adapter". */
export async function listModels({ key }) {
  const response = await request("v1/models", { headers: headers(key) });
  const { data } = await unlessLost(response.json(), UNREACHABLE);
  return data.map(readModel);
}

/** Ask for an answer; yields { tokens, finishReason, usage } for each of the stream's chunks. */
export async function* streamAnswer(question, { key, signal }) {
  const body = {
    ...question,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 0,
    return_routes: true,
  };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failure(500, chunk.error.message);
    yield readChunk(chunk);
  }
  throw new ConnectionLost(LOST);
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  const response = await unlessLost(fetch(path, options), UNREACHABLE);
  if (!response.ok) throw await readError(response);
  return response;
}

async function unlessLost(promise, message) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost(message);
  }
}

async function readError(response) {
  const { status } = response;
  const said = await response.json().then((body) => body.error?.message, () => undefined);
  if (status === 401) return new ServerError(status, said ?? "The server wants an API key.");
  if (status === 429) {
    const waitS = Number(response.headers.get("Retry-After"));
    const when = waitS > 0 ? `in ${waitS} s` : "in a moment";
    return new ServerError(status, `The server has too much to do; try again ${when}.`);
  }
  return failure(status, said ?? `status ${status}`);
}

function failure(status, said) {
  return new ServerError(status, `${status < 500 ? "The server refused this" : "The server failed"}: ${said}`);
}

function readModel({ id, parent }) {
  if (parent == null) return { id, name: id.slice(id.lastIndexOf("/") + 1), kind: "base" };
  const [bank, adapter] = id.split(":");
  return adapter === undefined ? { id, name: bank, kind: "router" } : { id, name: adapter, kind: "adapter" };
}

/** The data of each server-sent event. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { value, done } = await unlessLost(reader.read(), LOST);
      if (done) return;
      const pieces = (buffer + value).split(/\r?\n\r?\n/);
      buffer = pieces.pop();
      for (const piece of pieces) {
        const lines = piece.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length > 0) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The tokens of a chunk: { text, route, candidates, logprob }; text is "" for one that completes no character. */
function readChunk({ choices, usage, molora }) {
  const choice = choices[0];
  const text = choice?.delta?.content ?? "";
  const entries = choice?.logprobs?.content ?? [];
  const tokens = entries.map((entry) => ({
    text: "",
    route: entry.route?.adapters ?? molora?.route ?? [],
    candidates: entry.route?.candidates ?? [],
    logprob: entry.logprob ?? null,
  }));
  if (tokens.length === 0 && (text || molora?.route)) {
    tokens.push({ text: "", route: molora?.route ?? [], candidates: [], logprob: null });
  }
  // Of several tokens, each has its own text where these add up; else the last one completes all of it.
  if (tokens.length > 1 && entries.map((entry) => entry.token).join("") === text) {
    tokens.forEach((token, index) => (token.text = entries[index].token));
  } else if (tokens.length > 0) {
    tokens.at(-1).text = text;
  }
  return { tokens, finishReason: choice?.finish_reason ?? null, usage: usage ?? null };
}
