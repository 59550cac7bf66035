/* The description of the API: /openapi.json as one page, from this server alone.

Knows OpenAPI as this server writes it, and nothing about what the endpoints do.
*/

const KEY = "molora-api-key"; // shared with the chat, for as long as the tab is open
const METHODS = ["get", "post", "put", "patch", "delete"];
const LIMITS = {
  minimum: "at least",
  exclusiveMinimum: "more than",
  maximum: "at most",
  exclusiveMaximum: "less than",
  minLength: "characters at least",
  maxLength: "characters at most",
  minItems: "items at least",
  maxItems: "items at most",
  maxProperties: "entries at most",
  pattern: "matching",
};

const find = (id) => document.getElementById(id);

function element(tag, { className = "", id = "" } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (id) made.id = id;
  made.append(...children);
  return made;
}

function link(target, text) {
  const made = element("a", {}, text);
  made.href = target;
  return made;
}

/** Paragraphs, with what stands in backticks as code. */
function prose(text = "") {
  return text
    .split(/\n\s*\n/)
    .filter((paragraph) => paragraph.trim())
    .map((paragraph) =>
      element("p", {}, ...paragraph.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part))),
    );
}

// Schemas

/** What a value may be, in words; a named schema is a link. */
function typeOf(schema) {
  const union = (schema.anyOf ?? schema.oneOf)?.filter((each) => each.type !== "null");
  if (schema.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return [link(`#schema-${name}`, name)];
  }
  if (union) return union.flatMap((each, index) => (index ? [" or ", ...typeOf(each)] : typeOf(each)));
  const values = schema.enum ?? ("const" in schema ? [schema.const] : null);
  if (values) return values.flatMap((value, index) => [index ? " or " : "", element("code", {}, JSON.stringify(value))]);
  if (schema.prefixItems) {
    return ["[", ...schema.prefixItems.flatMap((each, index) => [index ? ", " : "", ...typeOf(each)]), "]"];
  }
  const inner = schema.items ?? schema.additionalProperties ?? Object.values(schema.patternProperties ?? {})[0];
  const ofWhat = typeof inner === "object" ? [" of ", ...typeOf(inner)] : [];
  const limits = Object.entries(LIMITS).flatMap(([name, words]) => {
    if (!(name in schema)) return [];
    return /^(max|min)(Length|Items|Properties)$/.test(name) ? `${schema[name]} ${words}` : `${words} ${schema[name]}`;
  });
  return [schema.type ?? "anything", ...ofWhat, limits.length > 0 ? ` (${limits.join(", ")})` : ""];
}

function fields({ properties = {}, required = [] }) {
  const body = element("tbody");
  for (const [name, schema] of Object.entries(properties)) {
    const isOptional = !required.includes(name);
    const fallback = schema.default === undefined ? "" : `; ${JSON.stringify(schema.default)} if left out`;
    const says = element("td", {}, ...typeOf(schema), isOptional ? fallback || "; optional" : "");
    says.append(...prose(schema.description));
    const head = element("th", {}, element("code", {}, name));
    head.scope = "row";
    body.append(element("tr", {}, head, says));
  }
  return body.children.length > 0 ? element("table", { className: "fields" }, body) : "";
}

function schemaSection([name, schema]) {
  const kind = schema.properties ? "" : element("p", {}, ...typeOf(schema));
  return element("article", { id: `schema-${name}` }, element("h3", {}, name), ...prose(schema.description), kind, fields(schema));
}

// Operations

function contentOf({ content = {} }) {
  return Object.entries(content).flatMap(([media, { schema }]) =>
    schema && Object.keys(schema).length > 0 ? [": ", ...typeOf(schema)] : [`: ${media}`],
  );
}

function operationSection({ method, path, operation }) {
  const title = element("h3", {}, element("span", { className: "method" }, method.toUpperCase()), " ", element("code", {}, path));
  const items = (operation.parameters ?? []).map(({ name, schema }) =>
    element("li", {}, element("code", {}, name), " in the path: ", ...typeOf(schema)),
  );
  if (operation.requestBody) items.push(element("li", {}, "Body", ...contentOf(operation.requestBody)));
  for (const [status, response] of Object.entries(operation.responses)) {
    items.push(element("li", {}, `Answer ${status}`, ...contentOf(response)));
  }
  return element("article", { id: operation.operationId }, title, ...prose(operation.description), element("ul", {}, ...items));
}

function show({ info, paths, components }) {
  find("version").textContent = info.version;
  const operations = Object.entries(paths).flatMap(([path, item]) =>
    METHODS.filter((method) => method in item).map((method) => ({ method, path, operation: item[method] })),
  );
  const tags = new Set(operations.map(({ operation }) => operation.tags?.[0] ?? "other"));
  find("contents").replaceChildren(
    element(
      "ul",
      {},
      ...operations.map(({ method, path, operation }) =>
        element("li", {}, link(`#${operation.operationId}`, `${method.toUpperCase()} ${path}`)),
      ),
      element("li", {}, link("#schemas", "Schemas")),
      element("li", {}, link("openapi.json", "openapi.json"), ", for tools"),
    ),
  );
  find("operations").replaceChildren(
    ...[...tags].flatMap((tag) => [
      element("h2", {}, tag[0].toUpperCase() + tag.slice(1)),
      ...operations.filter(({ operation }) => (operation.tags?.[0] ?? "other") === tag).map(operationSection),
    ]),
  );
  find("schemas").replaceChildren(element("h2", {}, "Schemas"), ...Object.entries(components.schemas).map(schemaSection));
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function load() {
  const key = sessionStorage.getItem(KEY);
  find("failed").hidden = true;
  try {
    const response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    find("key-form").hidden = response.status !== 401;
    if (response.status === 401) find("key").focus();
    else if (response.ok) show(await response.json());
    else throw new Error(`status ${response.status}`);
  } catch (error) {
    find("failed").textContent = `The description could not be loaded: ${error.message}`;
    find("failed").hidden = false;
  }
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value.trim());
  load();
});

load();
