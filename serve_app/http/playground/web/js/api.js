// Calls of the server: relative addresses, the key, errors as objects, streams of events.

const KEY = "triptych-key";
export const keys = new EventTarget(); // "needed": a call was refused without one; "given": there is another now

export const getKey = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  keys.dispatchEvent(new Event("given"));
}

/** What the server refused or failed at, or `status` 0: it could not be reached. */
export class CallError extends Error {
  constructor(status, message, { code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** Whether the same call may succeed later. A gateway answers 502 and 504 while the server is replaced. */
  get isPassing() {
    return [0, 408, 429, 502, 503].includes(this.status) || (this.status === 504 && this.code === null);
  }
}

/** The answer to a call. Throws CallError for any that is no success. */
export async function call(path, { headers = {}, ...options } = {}) {
  const key = getKey();
  const sent = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: sent, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const error = await errorOf(answer);
  if (error.status === 401) keys.dispatchEvent(new CustomEvent("needed", { detail: error.message }));
  throw error;
}

export async function callJSON(path, options) {
  return (await call(path, options)).json();
}

export function post(path, body, headers = {}) {
  const text = body === undefined ? undefined : JSON.stringify(body);
  return callJSON(path, { method: "POST", body: text, headers: { "Content-Type": "application/json", ...headers } });
}

async function errorOf(answer) {
  const said = await answer.text();
  let told = {};
  try {
    told = JSON.parse(said).error ?? {};
  } catch {
    // no JSON: a proxy's own page
  }
  const retryAfter = Number.parseFloat(answer.headers.get("Retry-After"));
  const message = told.message ?? `The server answered ${answer.status} ${answer.statusText}.`;
  return new CallError(answer.status, message, { code: told.code ?? null, param: told.param ?? null,
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null });
}

/** What went wrong, in words, with what to do about it. */
export function inWordsOf(error) {
  const about = error.param && !error.message.includes(error.param) ? ` (${error.param})` : "";
  const next = {
    0: " Is it running, and is this machine on line?",
    401: " Give a key with the button above.",
    403: " The server does not take calls from this page's address.",
    413: " Send smaller or fewer files.",
  };
  return `${error.message}${about}${next[error.status] ?? ""}`;
}

/** Server-sent events of an answer, as {event, data, id}; by fetch, as an EventSource cannot send a key. */
export async function* events(path, { lastId, signal } = {}) {
  const headers = { Accept: "text/event-stream", ...(lastId ? { "Last-Event-ID": String(lastId) } : {}) };
  const answer = await call(path, { headers, signal, cache: "no-store" });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const parsed = parseEvent(block);
        if (parsed) yield parsed;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection is let go, whoever ended it
  }
}

function parseEvent(block) {
  const found = { event: "message", data: "", id: null };
  for (const line of block.split("\n")) {
    const [, name, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (name === "event") found.event = value;
    else if (name === "id") found.id = Number(value);
    else if (name === "data") found.data += value;
  }
  return found.data ? { ...found, data: JSON.parse(found.data) } : null;
}

/** Resolves after so many seconds, or at once when `signal` is aborted. */
export function pause(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Seconds before try number `tries` (from 0): what the server said, or ever more, and not the same for all. */
export function patience(error, tries) {
  return (error?.retryAfter ?? Math.min(30, 2 ** tries)) * (1 + 0.2 * Math.random());
}

/** `crypto.randomUUID` is there only on pages of https and of this machine. */
export function newId() {
  return crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint32Array(4))].map((each) => each.toString(16)).join("-");
}
