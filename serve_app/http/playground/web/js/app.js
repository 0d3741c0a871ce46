// The page as a whole: what is served, the views, the theme, the key; and what the parts hand to each other.

import { callJSON, CallError, getKey, inWordsOf, keys, newId, patience, pause, setKey } from "./api.js";
import { markOwn, watchWhile } from "./cluster.js";
import { byId, el, say, tell } from "./dom.js";
import { makeForm } from "./form.js";
import { keep, makeGallery } from "./gallery.js";
import { startRun } from "./runs.js";
import { fieldsOf, usualWith } from "./schema.js";
import { showSnippets } from "./snippets.js";
import { openStore } from "./store.js";

const THEMES = ["system", "light", "dark"];
let served = null; // {details, form, isOneOfSeveral}, once the server has told
let lastForm = null;
let asking = null; // the latest that asks what the chosen model takes

const store = await openStore();
tell(byId("notice"), store.trouble);
setUpTheme();
setUpKey();
setUpViews();
const gallery = makeGallery(store, { again, copy: showSnippets });
const hooks = { store, onmade, onrefused: (param, message) => served?.form.blame(param.split(".")[0], message), edit: (body) => again({ body }) };
gallery.show(await store.all("items"));
for (const run of await store.all("runs")) begin(run);
setUpForm();

/** Asks what the chosen model takes until it is told, and says meanwhile why not; another one may be chosen then. */
async function setUpForm() {
  const mine = (asking = {});
  served = null;
  byId("generate").disabled = true;
  for (let tries = 0; !served; tries++) {
    try {
      const models = await readModels();
      if (mine !== asking) return;
      offer(models);
      const details = await readModel(byId("model").value);
      const adapters = await readAdapters(details.id);
      if (mine !== asking) return;
      const form = makeForm(fieldsOf(details), adapters, (level) => usualWith(details, level), lastForm);
      lastForm = form;
      served = { details, form, isOneOfSeveral: models.length > 1 };
    } catch (error) {
      if (mine !== asking) return;
      tell(byId("notice"), error instanceof CallError ? inWordsOf(error) : error.message);
      if (error.status === 401) await new Promise((resolve) => keys.addEventListener("given", resolve, { once: true }));
      else await pause(patience(error, tries));
      if (mine !== asking) return;
    }
  }
  tell(byId("notice"), store.trouble);
  byId("model-name").textContent = served.details.id;
  document.title = `${served.details.id} · Triptych`;
  byId("generate").disabled = false;
}

/** The models by their own names, without their LoRAs. */
async function readModels() {
  const { data } = await callJSON("v1/models");
  const models = data.filter((each) => !each.parent && !each.alias_of);
  if (!models.length) throw new CallError(404, "No model is served here for this key.");
  return models;
}

/** The choice is shown where there is one. */
function offer(models) {
  const choice = byId("model");
  const before = choice.value || localStorage.getItem("triptych-model");
  const told = ({ id, kind, state }) => `${id}${kind ? ` (${kind})` : ""}${state === "ready" ? "" : `, ${state}`}`;
  choice.replaceChildren(...models.map((each) => el("option", { value: each.id }, told(each))));
  if (models.some((each) => each.id === before)) choice.value = before;
  byId("models").hidden = models.length < 2;
}

byId("model").addEventListener("change", () => choose(byId("model").value));

/** Shows the form of that model, now and when the page is loaded again. */
async function choose(model) {
  byId("model").value = model;
  localStorage.setItem("triptych-model", model);
  await setUpForm();
}

async function readModel(name) {
  const details = await callJSON(`v1/models/${name.split("/").map(encodeURIComponent).join("/")}`);
  if (!details.arguments) {
    const asleep = "The model is asleep, and its fields are not known before a request has woken it.";
    throw new CallError(503, details.state === "asleep" ? asleep : "The model is loading.", { retryAfter: 2 });
  }
  return details;
}

/** LoRAs that a request of the model may name; none where the server has no route for them. */
async function readAdapters(model) {
  try {
    return (await callJSON("v1/loras")).data.filter((each) => each.parent === model);
  } catch (error) {
    if (error.status === 404) return [];
    throw error;
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!served) return;
  const body = bodyOfForm();
  if (body) begin({ id: newId(), at: Date.now(), route: served.details.asked.route, body, makes: served.details.asked.makes });
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
});
byId("reset").onclick = () => served?.form.fill({});
byId("copy-call").onclick = () => {
  const body = served && bodyOfForm();
  if (body) showSnippets({ body, ...served.details.asked, model: served.details.id });
};

/** What the form stands for; null where something in it is wrong, which is shown. */
function bodyOfForm() {
  tell(byId("form-error"), "");
  try {
    const { details, form, isOneOfSeveral } = served;
    const { previews } = details.asked;
    return { ...(isOneOfSeveral ? { model: details.id } : {}), ...form.body(), ...(previews ? { partial_images: previews } : {}) };
  } catch (error) {
    tell(byId("form-error"), error.message);
    return null;
  }
}

function begin(wanted) {
  startRun(wanted, { ...hooks, store: { ...store, add: (name, run) => (markOwn(run.job, run.body.n), store.add(name, run)) } });
  if (wanted.job) markOwn(wanted.job, wanted.body.n);
}

async function onmade(items, isWatched) {
  await keep(store, items);
  await gallery.show(items);
  if (isWatched) await gallery.reveal(items[0].id);
  say(items.length === 1 ? "Made: it is in the gallery." : `Made: ${items.length} are in the gallery.`);
}

/** Its settings into the form: one, with its seed. */
async function again(item) {
  const { n, model, ...body } = item.body;
  if (model && model !== served?.details.id && [...byId("model").options].some((each) => each.value === model)) {
    await choose(model);
  }
  served?.form.fill(item.seed === undefined ? item.body : { ...body, seed: item.seed });
  location.hash = "#make";
  byId("field-prompt")?.focus();
  say("The settings are in the form.");
}

function setUpTheme() {
  const apply = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  let theme = THEMES.includes(localStorage.getItem("triptych-theme")) ? localStorage.getItem("triptych-theme") : "system";
  apply(theme);
  byId("theme").onclick = () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("triptych-theme", theme);
    apply(theme);
  };
}

function setUpKey() {
  const dialog = byId("key-dialog");
  const ask = (why) => {
    byId("key-button").hidden = false;
    tell(byId("key-error"), why);
    byId("key").value = getKey();
    if (!dialog.open) dialog.showModal();
    byId("key").focus();
  };
  byId("key-button").hidden = !getKey();
  byId("key-button").onclick = () => ask("");
  keys.addEventListener("needed", (event) => ask(event.detail));
  byId("key-form").addEventListener("submit", (event) => {
    const key = event.submitter?.value === "forget" ? "" : byId("key").value.trim();
    setTimeout(() => setKey(key)); // after the dialog is closed: a wrong key opens it again
  });
}

function setUpViews() {
  const views = ["make", "cluster"];
  let shown = null;
  const watch = watchWhile(() => shown === "cluster");
  const show = () => {
    const asked = location.hash.slice(1);
    shown = views.includes(asked) ? asked : (shown ?? "make"); // a link to the content changes no view
    for (const view of views) {
      byId(view).hidden = view !== shown;
      if (view === shown) byId(`to-${view}`).setAttribute("aria-current", "page");
      else byId(`to-${view}`).removeAttribute("aria-current");
    }
    watch();
  };
  addEventListener("hashchange", show);
  show();
}
