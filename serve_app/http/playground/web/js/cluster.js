// The view of the cluster: its stages with their replicas, and requests that move through them, as they happen.

import { CallError, events, inWordsOf, patience, pause } from "./api.js";
import { byId, el, inWords } from "./dom.js";

const STAGES = { encoder: "Encoder", denoiser: "Denoiser", vae: "VAE" };
const MOVE = { duration: 400, easing: "ease-out" };
let watching = null; // the AbortController of the stream
const own = new Set(); // short names of this page's requests

/** The server is asked only while somebody can see the answer. */
export function watchWhile(isSeen) {
  const change = () => (isSeen() && !document.hidden ? start() : stop());
  document.addEventListener("visibilitychange", change);
  return change;
}

/** Its requests are marked where they are seen. Browsers digest only on pages of https and of this machine. */
export async function markOwn(job, n = 1) {
  for (const name of [job, ...Array.from({ length: n }, (_, number) => `${job}-${number}`)]) {
    const digest = await crypto.subtle?.digest("SHA-256", new TextEncoder().encode(name));
    if (digest) own.add([...new Uint8Array(digest).slice(0, 4)].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
  }
}

function stop() {
  watching?.abort();
  watching = null;
  byId("cluster-state").textContent = "Not watching.";
}

async function start() {
  if (watching) return;
  const mine = (watching = new AbortController());
  const state = byId("cluster-state");
  state.textContent = "Asking …";
  for (let tries = 0; !mine.signal.aborted; tries++) {
    try {
      for await (const { event, data } of events("ui/cluster", { signal: mine.signal })) {
        if (event !== "cluster") continue;
        tries = 0;
        if (state.textContent !== "Live.") state.textContent = "Live.";
        show(data);
      }
      await pause(tries ? patience(null, tries) : 0.2, mine.signal); // it ends from time to time, and is asked for again
    } catch (error) {
      if (mine.signal.aborted) return;
      state.textContent = error instanceof CallError ? `${inWordsOf(error)} Trying again.` : "The connection broke. Trying again.";
      await pause(patience(error, tries), mine.signal);
    }
  }
}

function show({ waiting, deployments }) {
  byId("waiting").replaceChildren(...numbers(waiting));
  const before = placesOf();
  byId("stages").replaceChildren(...deployments.map(panelOf));
  moveFrom(before);
}

function numbers({ let_in: letIn, queue_s: seconds, jobs }) {
  const told = { "Let in and not done": letIn, "Predicted until done": letIn ? inWords(seconds) || "0 s" : "0 s",
    "Jobs waiting": jobs?.queued ?? "not known", "Jobs running": jobs?.in_progress ?? "not known" };
  return Object.entries(told).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))));
}

function panelOf({ name, trouble, replicas }) {
  const title = `${name}: ${replicas.length} ${replicas.length === 1 ? "replica" : "replicas"}`;
  return el("section", { className: "panel", aria: { label: name } }, el("h3", {}, title), trouble && el("p", { className: "error" }, trouble),
    ...replicas.map(replicaOf));
}

function replicaOf({ id, stages, batches }) {
  return el("div", { className: "replica" }, el("h4", {}, `Replica ${id}`), ...stages.map((stage) => stageOf(stage, stages.length > 1)),
    batches && el("p", {}, batches.length ? `Batches just now: ${batches.map(({ size, count }) => `${count} of size ${size}`).join(", ")}` : "No batch just now"));
}

function stageOf({ stage, busy, present, request_s: seconds, requests }, isNamed) {
  const share = busy === null ? "not known yet" : `${Math.round(100 * busy)} %`;
  const running = requests.filter((each) => each.state === "running").length;
  const name = isNamed ? `${STAGES[stage] ?? stage}: ` : "";
  return el("div", {},
    el("p", {}, `${name}busy ${share}; ${running} in work, ${Math.max(0, present - running)} in the queue${seconds ? `; ${seconds.toFixed(2)} s each` : ""}`),
    el("meter", { min: 0, max: 1, value: busy ?? 0, aria: { label: `Busy share of ${STAGES[stage] ?? stage}`, valuetext: share } }),
    requests.length > 0 && el("ul", { className: "requests", aria: { label: `Requests in ${STAGES[stage] ?? stage}` } }, ...requests.map(requestOf)));
}

function requestOf({ id, state, steps, num_steps: of, since_s: since }) {
  const how = state === "waiting" ? `waiting ${inWords(since)}` : of ? `step ${steps} of ${of}` : "in work";
  return el("li", { className: `${state}${own.has(id) ? " own" : ""}`, data: { id }, title: own.has(id) ? "asked for on this page" : "" }, `${id.slice(0, 4)} ${how}`);
}

// --- movement from stage to stage ---

function placesOf() {
  return new Map([...document.querySelectorAll("#stages [data-id]")].map((each) => [each.dataset.id, each.getBoundingClientRect()]));
}

function moveFrom(before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const each of document.querySelectorAll("#stages [data-id]")) {
    const from = before.get(each.dataset.id);
    const to = each.getBoundingClientRect();
    if (!from) each.animate([{ opacity: 0 }, { opacity: 1 }], MOVE);
    else if (from.x !== to.x || from.y !== to.y) each.animate([{ transform: `translate(${from.x - to.x}px, ${from.y - to.y}px)` }, { transform: "none" }], MOVE);
  }
}
