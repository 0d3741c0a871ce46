// The form of the served model: elements for its fields, the body that they stand for, and back.

import { button, byId, el, tell } from "./dom.js";
import { mediaPlace } from "./media.js";
import { labelOf, lines, sizeOf, textOf, valueOf } from "./schema.js";

const CARRIED = ["long", "media", "mask"]; // words and files mean the same to another model

/**
 * {body(), fill(body), blame(name, text), fields, given()}; `body` throws an Error that is shown at its field.
 * `before`: the form of the model before, whose words and files are taken over.
 * `usualOf(level)`: by field what counts with a level of `quality` where the field is left empty.
 */
export function makeForm(fields, adapters, usualOf, before) {
  const places = new Map(fields.map((field) => [field.name, placeOf(field, () => pictureFor(places))]));
  const loras = adapters.length ? loraPlace(adapters) : null;
  const [first, more] = [true, false].map((isFirst) => fields.filter((field) => field.isFirst === isFirst));
  const small = (field) => ["integer", "number"].includes(field.kind);
  const elements = (some) => [
    ...some.filter((field) => !small(field)).map((field) => places.get(field.name).element),
    some.some(small) && el("div", { className: "pair" }, ...some.filter(small).map((field) => places.get(field.name).element)),
  ];
  byId("fields").replaceChildren(...[
    ...elements(first),
    loras?.element,
    more.length && el("details", {}, el("summary", {}, `More settings (${more.length})`), el("div", { className: "group" }, ...elements(more))),
  ].filter(Boolean));

  const quality = places.get("quality");
  const showUsual = () => {
    for (const [name, usual] of usualOf(quality.value())) places.get(name)?.setUsual?.(usual);
  };
  quality?.input.addEventListener("change", showUsual);

  function blame(name, text) {
    const place = places.get(name);
    if (!place) return false;
    place.element.closest("details")?.setAttribute("open", "");
    place.input.setAttribute("aria-invalid", "true");
    tell(place.trouble, text);
    return true;
  }

  function body() {
    for (const place of places.values()) (place.input.removeAttribute("aria-invalid"), tell(place.trouble, ""));
    const made = {};
    let wrong = null;
    for (const [name, place] of places) {
      try {
        const value = place.value();
        if (value !== undefined) made[name] = value;
      } catch (error) {
        blame(name, error.message);
        wrong ??= Object.assign(new Error(error.message), { place });
      }
    }
    if (wrong) {
      wrong.place.input.focus();
      throw wrong;
    }
    const chosen = loras?.value() ?? [];
    return chosen.length ? { ...made, loras: chosen } : made;
  }

  function fill(given) {
    for (const [name, place] of places) place.set(given[name]);
    loras?.set(given.loras ?? []);
    if (quality) showUsual();
  }

  /** Its words and files, by field. */
  function given() {
    const carried = fields.filter((field) => CARRIED.includes(field.kind));
    return new Map(carried.map((field) => [carriedAs(field), places.get(field.name).given()]));
  }

  const old = before?.given() ?? new Map();
  for (const field of fields) {
    const value = old.get(carriedAs(field));
    if (value?.length) places.get(field.name).set(value);
  }
  return { body, fill, blame, fields, given };
}

const carriedAs = (field) => `${field.name} ${field.kind} ${field.medium}`;

function pictureFor(places) {
  for (const name of ["image", "images"]) {
    const [picture] = places.get(name)?.pictures?.() ?? [];
    if (picture) return picture;
  }
  return null;
}

function placeOf(field, picture) {
  const id = `field-${field.name}`;
  const trouble = el("p", { className: "error", id: `${id}-error`, hidden: true });
  const hint = el("p", { className: "hint", id: `${id}-hint` }, hintOf(field));
  const aria = { describedby: `${id}-hint ${id}-error` };
  const label = el("label", { htmlFor: id }, labelOf(field));
  const make = { size: sizePlace, media: filesPlace, mask: filesPlace }[field.kind] ?? plainPlace;
  return { ...make(field, id, { label, hint, trouble, aria, picture }), trouble };
}

function hintOf(field) {
  const usual = field.kind === "size" || !textOf(field.default) ? "" : `usually ${textOf(field.default)}`;
  const when = field.when && field.when !== "always" ? `matters ${field.when}` : "";
  const words = field.description.replaceAll("`", "").replace(/\.$/, "");
  return [words, when, field.required ? "needed" : usual].filter(Boolean).join("; ");
}

const unset = (usual) => (usual ? `usual (${usual})` : "not set");

function plainPlace(field, id, { label, hint, trouble, aria }) {
  const usual = textOf(field.default);
  let input;
  if (field.kind === "choice" || field.kind === "boolean") {
    const choices = field.kind === "boolean" ? ["true", "false"] : field.choices.map(String);
    input = el("select", { id, aria }, el("option", { value: "" }, unset(usual)), ...choices.map((each) => el("option", { value: each }, each)));
  } else if (field.kind === "long") {
    input = el("textarea", { id, aria, rows: lines(field), placeholder: usual, required: field.required });
  } else {
    const isNumber = field.kind === "integer" || field.kind === "number";
    input = el("input", { id, aria, type: "text", inputMode: isNumber ? (field.kind === "integer" ? "numeric" : "decimal") : "text",
      placeholder: usual, autocomplete: "off", required: field.required });
  }
  const set = (value) => (input.value = textOf(value));
  const setUsual = (value) => {
    const text = textOf(value);
    if (input.options) input.options[0].text = unset(text);
    else input.placeholder = text;
    hint.textContent = hintOf({ ...field, default: value });
  };
  return { element: el("div", { className: "field" }, label, input, hint, trouble), input, set, setUsual, given: () => input.value, value: () => valueOf(field, input.value) };
}

function sizePlace(field, id, { hint, trouble, aria }) {
  const [width, height] = ["width", "height"].map((name) => el("input", { id: `${id}-${name}`, aria, type: "text", inputMode: "numeric", autocomplete: "off" }));
  const setUsual = (sides) => ([width.placeholder, height.placeholder] = sides.map(textOf));
  setUsual(field.default);
  const named = (input, text) => el("div", { className: "field" }, el("label", { htmlFor: input.id }, text), input);
  const element = el("fieldset", { className: "field" }, el("legend", { className: "visually-hidden" }, "Size"),
    el("div", { className: "pair" }, named(width, "Width"), named(height, "Height")), hint, trouble);
  return {
    element, input: width, setUsual,
    set: (value) => ([width.value, height.value] = value?.includes("x") ? value.split("x") : ["", ""]),
    value: () => sizeOf(field, width.value || (height.value && width.placeholder), height.value || (width.value && height.placeholder)),
  };
}

function filesPlace(field, id, { label, hint, trouble, picture }) {
  const files = mediaPlace(field, id, picture, () => tell(trouble, ""));
  files.input.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
  return {
    element: el("div", { className: "field" }, label, files.element, hint, trouble),
    input: files.input,
    pictures: files.values,
    given: files.values,
    set: (value) => files.set([value ?? []].flat().filter((each) => typeof each === "string" && each.startsWith("data:"))),
    value: () => {
      const urls = files.values();
      if (!urls.length && field.required) throw new Error(`${labelOf(field)} is needed: a ${field.medium}.`);
      if (!urls.length) return undefined;
      return urls.length > 1 || field.isOnlyList ? urls : urls[0];
    },
  };
}

/** Adapters that the server knows, each with its strength. */
function loraPlace(adapters) {
  const rows = adapters.map((adapter, number) => {
    const id = `lora-${number}`;
    const usual = typeof adapter.scale === "number" ? adapter.scale : 1;
    const box = el("input", { type: "checkbox", id });
    const scale = el("input", { type: "text", inputMode: "decimal", placeholder: String(usual), aria: { label: `Strength of ${adapter.name}` } });
    return { name: adapter.name, box, scale, element: el("div", { className: "lora" }, el("label", { className: "inline", htmlFor: id }, box, adapter.name), scale) };
  });
  const none = button("Without", () => rows.forEach((row) => (row.box.checked = false)), { className: "plain" });
  return {
    element: el("fieldset", { className: "field", id: "loras" }, el("legend", {}, "LoRAs"), ...rows.map((row) => row.element), none),
    value: () => rows.filter((row) => row.box.checked).map((row) => {
      if (row.scale.value.trim() === "") return { name: row.name };
      const scale = Number(row.scale.value);
      if (Number.isFinite(scale)) return { name: row.name, scale };
      row.scale.focus();
      throw new Error(`The strength of ${row.name} must be a number, got ${row.scale.value}.`);
    }),
    set: (chosen) => rows.forEach((row) => {
      const found = chosen.find((each) => each.name === row.name);
      row.box.checked = Boolean(found);
      row.scale.value = found?.scale ?? "";
    }),
  };
}
