// The gallery of this browser: what was made, with seed and settings; again with them; two side by side.

import { button, byId, el, say, tell } from "./dom.js";
import { player } from "./media.js";
import { tooMany } from "./store.js";

const ENDINGS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "video/mp4": "mp4", "audio/wav": "wav",
  "audio/x-wav": "wav", "audio/flac": "flac", "audio/mpeg": "mp3" };

/** {show(items), reveal(id)}; `again(item)` fills the form, `copy(item)` shows the call as code. */
export function makeGallery(store, { again, copy }) {
  const shown = new Map(); // by id: {item, element, url, box}
  byId("compare").onclick = () => compare(chosen());
  byId("clear").onclick = clear;

  async function show(items) {
    for (const item of [...items].sort((a, b) => a.at - b.at)) {
      if (shown.has(item.id)) continue;
      const url = URL.createObjectURL(item.blob);
      const box = el("input", { type: "checkbox", onchange: countChosen });
      const element = cardOf(item, url, box);
      shown.set(item.id, { item, element, url, box });
      byId("gallery").prepend(element);
    }
    for (const item of tooMany([...shown.values()].map((each) => each.item))) await remove(item.id);
    count();
  }

  function cardOf(item, url, box) {
    const name = item.body.prompt || "without a prompt";
    const about = `of ${String(name).slice(0, 60)}`;
    return el("li", { className: "item" }, mediumOf(item, url), el("p", { className: "prompt" }, String(name)), el("p", { className: "facts" }, factsOf(item)),
      item.warnings.length > 0 && el("p", { className: "facts" }, item.warnings.join(" ")),
      el("div", { className: "actions" },
        button("Again", () => again(item), { className: "again", aria: { label: `Again with the settings ${about}` } }),
        el("a", { href: url, download: `triptych-${item.seed}.${ENDINGS[item.blob.type] ?? "bin"}`, aria: { label: `Save the file ${about}` } }, "Save"),
        button("Code", () => copy(item), { aria: { label: `The call as code ${about}` } }),
        button("Remove", () => remove(item.id).then(count), { aria: { label: `Remove what was made ${about}` } }),
        el("label", { className: "inline" }, box, "Compare")));
  }

  async function remove(id) {
    const { element, url } = shown.get(id);
    const next = (element.nextElementSibling ?? element.previousElementSibling)?.querySelector("button") ?? byId("generate");
    const held = element.contains(document.activeElement);
    element.remove();
    URL.revokeObjectURL(url);
    shown.delete(id);
    await store.remove("items", id);
    if (held) next.focus();
  }

  async function clear() {
    if (!confirm("Remove everything from this browser's gallery?")) return;
    for (const id of [...shown.keys()]) await remove(id);
    count();
  }

  function chosen() {
    return [...shown.values()].filter((each) => each.box.checked);
  }

  function countChosen() {
    const number = chosen().length;
    byId("compare").disabled = number !== 2;
    if (number > 2) say("Two can be compared; more are chosen.");
  }

  function count() {
    byId("gallery-empty").hidden = byId("clear").hidden = false;
    byId(shown.size ? "gallery-empty" : "clear").hidden = true;
    countChosen();
  }

  /** Where it is out of sight, as below the form on a phone. */
  async function reveal(id) {
    const element = shown.get(id)?.element;
    await element?.querySelector("img")?.decode().catch(() => {}); // it has no height before
    element?.scrollIntoView({ block: "nearest" });
  }

  return { show, reveal };
}

function mediumOf(item, url) {
  const label = item.body.prompt ? String(item.body.prompt) : "What was made";
  if (item.makes === "tensors") return el("p", {}, "Tensors: save the file.");
  return player(item.blob.type.startsWith("image/") ? "picture" : item.makes, url, label);
}

export function factsOf(item) {
  return [`seed ${item.seed}`, item.size, item.seconds ? `${item.seconds.toFixed(1)} s` : null, item.model].filter(Boolean).join(" · ");
}

/** Its settings as texts; files are only named. */
function settingsOf(item) {
  const plain = (value) => ([value].flat().some((each) => String(each).startsWith("data:")) ? "a file" : typeof value === "object" ? JSON.stringify(value) : String(value));
  const told = Object.entries({ ...item.body, seed: item.seed }).filter(([name]) => name !== "partial_images");
  return new Map(told.map(([name, value]) => [name, plain(value)]));
}

function compare([one, other]) {
  const both = [one, other].map(({ item }) => ({ item, settings: settingsOf(item), url: URL.createObjectURL(item.blob) }));
  const names = [...new Set(both.flatMap(({ settings }) => [...settings.keys()]))];
  const sides = both.map(({ item, settings, url }, number) => {
    const differing = (name) => both[0].settings.get(name) !== both[1].settings.get(name);
    const rows = names.map((name) => el("tr", { className: differing(name) ? "differs" : "" }, el("th", { scope: "row" }, name), el("td", {}, settings.get(name) ?? "not set")));
    return el("div", {}, el("h3", {}, number ? "Right" : "Left"), mediumOf(item, url), el("p", { className: "facts" }, factsOf(item)),
      el("table", {}, el("caption", { className: "visually-hidden" }, `Settings of the ${number ? "right" : "left"} one; what differs is bold`), el("tbody", {}, ...rows)));
  });
  byId("compared").replaceChildren(...sides);
  byId("compare-dialog").addEventListener("close", () => both.forEach(({ url }) => URL.revokeObjectURL(url)), { once: true });
  byId("compare-dialog").showModal();
}

/** Keeps the items; says so where the browser has no room. */
export async function keep(store, items) {
  try {
    for (const item of items) await store.add("items", item);
  } catch (error) {
    tell(byId("notice"), `This browser has no room for what was made (${error.name}): save it, or remove some from the gallery.`);
  }
}
