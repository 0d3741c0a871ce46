// One thing that is being made: asked for as a job, followed by its events, cancelled, fetched, shown all along.

import { call, callJSON, CallError, events, inWordsOf, keys, newId, patience, pause, post } from "./api.js";
import { button, byId, el, inWords, say, tell } from "./dom.js";

// What a request that has begun may wait for (the event `waiting`).
const WAITS = {
  denoiser: "Begun; waiting for its turn at the denoiser.",
  device: "Begun; waiting for memory of the device.",
  storage: "Made; waiting for the storage.",
};
const ENDED = ["completed", "failed", "cancelled", "deleted"];

/** Shows it and makes it. `wanted`: {id, at, route, body, makes, job?}; `hooks`: {store, onmade, onrefused, edit}. */
export function startRun(wanted, hooks) {
  const run = { ...wanted, card: cardOf(wanted), stop: new AbortController(), isCancelled: false, words: "", isTicking: false };
  run.card.cancel.onclick = () => cancel(run);
  byId("runs").prepend(run.card.element);
  countRuns();
  if (!wanted.job) run.card.element.scrollIntoView({ block: "nearest" });
  make(run, hooks).catch((error) => fail(run, hooks, error));
  return run;
}

async function make(run, hooks) {
  if (!run.job) {
    run.job = await askFor(run);
    if (run.job === null) return leave(run, hooks, "Cancelled.");
    await hooks.store.add("runs", { id: run.id, at: run.at, route: run.route, body: run.body, makes: run.makes, job: run.job });
  }
  if (run.isCancelled) await tellServerOfCancel(run);
  const end = await follow(run);
  if (end.event === "completed") {
    const items = await fetchOutputs(run);
    await hooks.onmade(items, isWatched(run.card.element));
    return leave(run, hooks, null);
  }
  if (end.event === "cancelled" && run.isCancelled) return leave(run, hooks, "Cancelled.");
  const { message, param = null, code = null } = end.data.error ?? { message: "The job was deleted." };
  throw new CallError(500, message, { param, code });
}

/** The id of its job, however often the server has no room; null when it was cancelled before. */
async function askFor(run) {
  const headers = { Prefer: "respond-async", "Idempotency-Key": run.id }; // asked again, it is the same job
  for (let tries = 0; !run.isCancelled; tries++) {
    try {
      status(run, tries ? "Asking again …" : "Asking …");
      const job = await post(run.route.slice(1), run.body, headers);
      if (tries) (status(run, "Taken.", ""), say("The server has taken it."));
      if (job.queue_position != null) queued(run, job.queue_position);
      return job.id;
    } catch (error) {
      await waitAfter(run, error, tries);
    }
  }
  return null;
}

/** Says what the matter is and waits; throws what no waiting helps. Cancelled, what has no job yet waits no longer. */
async function waitAfter(run, error, tries) {
  const signal = run.job ? undefined : run.stop.signal;
  const detail = run.card.detail.textContent;
  if (error.status === 401) {
    show(run, "Waiting for an API key.", detail);
    await new Promise((resolve) => {
      keys.addEventListener("given", resolve, { once: true });
      signal?.addEventListener("abort", resolve, { once: true });
    });
    return showAgain(run, detail);
  }
  if (!(error instanceof CallError) || !error.isPassing) throw error;
  const what = { 0: "The server cannot be reached.", 429: "The server is full.", 503: "A part of the server is not available." }[error.status] ?? "The server could not take it.";
  const until = Date.now() + 1000 * patience(error, tries);
  say(`${what} It is tried again.`);
  while (Date.now() < until && !signal?.aborted) {
    show(run, `${what} Trying again in ${inWords((until - Date.now()) / 1000)}.`, error.status ? error.message : "");
    await pause(Math.min(1, (until - Date.now()) / 1000), signal);
  }
  showAgain(run, detail);
}

/** The last event; a lost connection is taken up where it broke. */
async function follow(run) {
  let lastId = 0;
  for (let tries = 0; ; tries++) {
    try {
      for await (const event of events(`v1/jobs/${run.job}/events`, { lastId })) {
        lastId = event.id ?? lastId;
        tries = 0;
        hear(run, event);
        if (ENDED.includes(event.event)) return event;
      }
      if (tries) await pause(patience(null, tries)); // it ended without its last event
    } catch (error) {
      if (error.status === 404) return { event: "deleted", data: {} };
      if (error instanceof CallError) await waitAfter(run, error, tries);
      else await pause(patience(null, tries)); // the connection broke
    }
  }
}

function hear(run, { event, data }) {
  const { card } = run;
  if (event === "queued") queued(run, data.position);
  else if (event === "in_progress") started(run, data.taken_over);
  else if (event === "step") step(run, data);
  else if (event === "preview") {
    card.shown.src = `data:image/${data.output_format};base64,${data.b64_json}`;
    card.shown.alt = `Preview at step ${data.step}`;
    card.shown.hidden = false;
  } else if (event === "warning") tell(card.detail, [card.detail.textContent, data.message].filter(Boolean).join(" "));
  else if (event === "waiting") {
    tellBoth(run, waitingFor(data));
    untilAStep(run);
  }
  else if (event === "begun") (tellBoth(run, "Its turn has come."), untilAStep(run));
  else if (event === "stored") status(run, "Stored.");
}

function started(run, isTakenOver) {
  const text = isTakenOver ? "Taken over by another replica." : "Started.";
  tell(run.card.detail, "");
  tellBoth(run, text);
  untilAStep(run);
}

function tellBoth(run, text) {
  status(run, text);
  say(text);
}

/** A first step may take long: it is told for how long none has been made. */
function untilAStep(run) {
  if (run.card.bar.hasAttribute("value")) return; // another replica goes on, or another one of several begins
  run.isTicking = true;
  run.ticking = setInterval(() => {
    run.card.status.textContent = `${run.words} No step is done yet; asked for ${inWords((Date.now() - run.at) / 1000)} ago.`;
  }, 5000);
}

function waitingFor({ for: what, about_s: about }) {
  if (what === "model") return `The model was asleep and is loading${about ? `, about ${about} s` : ""}.`;
  return WAITS[what] ?? "It waits for what it needs.";
}

function queued(run, position) {
  const before = position ? `${position} before it` : "next";
  status(run, `In the queue: ${before}.`);
  say(`In the queue: ${before}.`);
}

function step(run, { progress, step: at, num_steps: of, eta_s: left }) {
  const { bar } = run.card;
  const quarter = Math.floor(progress / 25);
  if (quarter > Math.floor(bar.value / 25) && bar.hasAttribute("value")) say(`${25 * quarter} percent.`);
  bar.value = progress;
  const eta = left > 0 ? `, about ${inWords(left)} left` : "";
  status(run, `Step ${at} of ${of}${eta}.`);
}

/** Its files as items of the gallery. */
async function fetchOutputs(run) {
  run.card.bar.value = 100;
  for (let tries = 0; ; tries++) {
    try {
      status(run, "Fetching what was made …");
      const job = await callJSON(`v1/jobs/${run.job}`);
      const items = [];
      for (const [index, made] of job.result.data.entries()) {
        const blob = await (await call(`v1/jobs/${run.job}/content?index=${index}`)).blob();
        items.push(itemOf(run, job, made, index, blob));
      }
      return items;
    } catch (error) {
      await waitAfter(run, error, tries);
    }
  }
}

function itemOf(run, job, made, index, blob) {
  const { result } = job;
  const seconds = Object.values(result.timings[index] ?? result.timings[0] ?? {}).reduce((sum, each) => sum + each, 0);
  return { id: `${run.id}-${index}`, at: Date.now() + index, makes: run.makes, route: run.route, body: run.body, blob, seed: made.seed,
    model: result.model, size: result.size ?? null, seconds, warnings: result.warnings.map((each) => each.message) };
}

function cancel(run) {
  run.isCancelled = true;
  run.card.cancel.disabled = true;
  status(run, "Cancelling …");
  run.stop.abort();
  if (run.job) tellServerOfCancel(run);
}

/** Its events tell of the end; what has ended already is no error. */
async function tellServerOfCancel(run) {
  try {
    await post(`v1/jobs/${run.job}/cancel`);
  } catch (error) {
    if (error.status === 404 || error.status === 409) return;
    run.isCancelled = false; // and what waits for the server waits on
    run.stop = new AbortController();
    run.card.cancel.disabled = false;
    status(run, `It could not be cancelled: ${inWordsOf(error)}`);
  }
}

async function leave(run, hooks, said) {
  await hooks.store.remove("runs", run.id);
  clearInterval(run.ticking);
  if (said) say(said);
  const held = run.card.element.contains(document.activeElement);
  run.card.element.remove();
  if (held) byId("generate").focus();
  countRuns();
}

async function fail(run, hooks, error) {
  await hooks.store.remove("runs", run.id);
  const { card } = run;
  tell(card.detail, "");
  status(run, "It failed.");
  tell(card.error, error instanceof CallError ? inWordsOf(error) : `${error.message || error.name}`);
  card.bar.remove();
  card.cancel.replaceWith(
    button("Try again", () => (card.element.remove(), startRun({ ...run, id: newId(), at: Date.now(), job: null }, hooks))),
    button("Change it", () => hooks.edit(run.body)),
    button("Dismiss", () => (card.element.remove(), countRuns(), byId("generate").focus())),
  );
  if (error.param) hooks.onrefused(error.param, error.message);
}

/** Somebody looks at it and types nothing. */
function isWatched(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < innerHeight && !document.activeElement.matches("input, textarea, select");
}

function status(run, text, detail = run.card.detail.textContent) {
  run.words = text;
  run.isTicking = false;
  show(run, text, detail);
}

/** For a while, without forgetting the last words. */
function show(run, text, detail) {
  clearInterval(run.ticking);
  run.card.status.textContent = text;
  tell(run.card.detail, detail);
}

function showAgain(run, detail) {
  show(run, run.words, detail);
  if (run.isTicking) untilAStep(run);
}

function countRuns() {
  byId("no-runs").hidden = byId("runs").childElementCount > 0;
}

function cardOf({ body }) {
  const title = String(body.prompt || "Without a prompt");
  const card = {
    shown: el("img", { className: "shown", alt: "No preview yet", hidden: true }),
    status: el("p", { className: "state" }),
    detail: el("p", { className: "quiet", hidden: true }),
    error: el("p", { className: "error", role: "alert", hidden: true }),
    bar: el("progress", { max: 100, aria: { label: `Progress of ${title.slice(0, 80)}` } }),
    cancel: button("Cancel", null, { className: "cancel" }),
  };
  const told = el("div", { className: "told" }, el("h3", { className: "prompt" }, title), body.model && el("p", { className: "quiet" }, body.model), card.bar, card.status, card.detail, card.error,
    el("div", { className: "actions" }, card.cancel));
  card.element = el("article", { className: "run", aria: { label: title.slice(0, 80) } }, card.shown, told);
  return card;
}
