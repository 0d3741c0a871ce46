// What the served model takes (GET v1/models/{id}) as fields of a form, and their texts as values of the body.

const FIRST = ["prompt", "negative_prompt", "image", "mask_image", "mask", "size", "num_frames", "num_inference_steps", "guidance_scale"];
const MASKS = ["mask", "mask_image"];
const MOST_LINES = 3;

/** The fields in the order of the form; `isFirst`: those that stand above "More settings". */
export function fieldsOf(details) {
  const { asked } = details;
  const fields = new Map();
  for (const argument of details.arguments) {
    if (fields.has(argument.field)) continue;
    if (argument.field === "size") {
      if (asked.size) fields.set("size", sizeField(asked.size));
    } else fields.set(argument.field, fieldOf(argument));
  }
  if (details.quality.length) {
    fields.set("quality", own("quality", "choice", { choices: details.quality, default: details.quality.includes("auto") ? "auto" : null, description: "a level that the server configures" }));
  }
  fields.set("seed", own("seed", "integer", { minimum: 0, isFirst: true, description: "the same seed makes the same again; chosen if not given" }));
  if (asked.max_n > 1) {
    fields.set("n", own("n", "integer", { minimum: 1, maximum: asked.max_n, default: 1, isFirst: true, description: "how many to make" }));
  }
  if (asked.output_formats.length > 1) {
    fields.set("output_format", own("output_format", "choice", { choices: asked.output_formats, default: asked.output_formats[0] }));
  }
  const place = (field) => (FIRST.includes(field.name) ? FIRST.indexOf(field.name) : FIRST.length);
  return [...fields.values()].sort((a, b) => place(a) - place(b));
}

/** What counts with a level of `quality` where nothing is given, as the fields' `default`s say it; by field. */
export function usualWith(details, level) {
  const told = details.levels?.[level] ?? {};
  const of = (name, otherwise) => (name in told ? told[name] : otherwise);
  const fields = details.arguments.filter(({ field }) => field !== "size").map((each) => [each.field, of(each.name, each.default)]);
  const { default_width: width, default_height: height } = details.asked.size ?? {};
  return new Map([...fields.reverse(), ["size", [of("width", width), of("height", height)]]]); // of two of one field the first
}

/** A default as a text of the form; empty: there is none. */
export function textOf(usual) {
  if (usual === null || usual === undefined) return "";
  return typeof usual === "object" ? JSON.stringify(usual) : String(usual);
}

function own(name, kind, about = {}) {
  return { name, kind, required: false, default: null, description: "", when: "", isFirst: false, ...about };
}

function sizeField(size) {
  const { default_width: width, default_height: height, multiple_of: multiple } = size;
  const description = `pixels, in multiples of ${multiple}, at most ${size.max_pixels.toLocaleString("en")} in all`;
  return own("size", "size", { ...size, default: [width, height], description, isFirst: true });
}

function fieldOf(argument) {
  const { field: name, media, accepts } = argument;
  const about = { required: argument.required, default: argument.default, description: argument.description,
    when: argument.when, isFirst: argument.required || FIRST.includes(name) || media !== null };
  if (media) {
    const kinds = choicesOf(accepts);
    const takesList = media !== "video" && kinds.some((kind) => kind.type === "array");
    const isMask = media === "picture" && (MASKS.includes(name) || /(^|_)mask$/.test(name));
    return own(name, isMask ? "mask" : "media", { ...about, medium: media, takesList,
      isOnlyList: takesList && kinds.every((kind) => kind.type === "array") });
  }
  const bounds = Object.fromEntries(["minimum", "maximum", "exclusiveMinimum"].filter((word) => word in accepts).map((word) => [word, accepts[word]]));
  return own(name, kindOf(name, accepts), { ...about, ...bounds, choices: enumOf(accepts) });
}

function choicesOf(schema) {
  return (schema.anyOf ?? [schema]).flatMap((each) => (each.anyOf ? choicesOf(each) : [each]));
}

const enumOf = (schema) => choicesOf(schema).flatMap((each) => each.enum ?? []).filter((each) => each !== null);

function kindOf(name, schema) {
  const choices = choicesOf(schema).filter((each) => each.type !== "null");
  const types = new Set(choices.map((each) => (each.enum ? "enum" : each.type)));
  const only = (...allowed) => types.size > 0 && [...types].every((type) => allowed.includes(type));
  if (only("enum")) return "choice";
  if (only("boolean")) return "boolean";
  if (only("integer")) return "integer";
  if (only("integer", "number")) return "number";
  if (/prompt/.test(name) && types.has("string")) return "long";
  if (only("string")) return "text";
  return name.includes("prompt") && !types.size ? "long" : "any";
}

export const lines = (field) => (field.name === "prompt" ? MOST_LINES : 1);

export function labelOf(field) {
  const words = { n: "Number", size: "Size", num_inference_steps: "Steps", num_frames: "Frames", guidance_scale: "Guidance" };
  const text = words[field.name] ?? field.name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

/** What a text of the form stands for; undefined for none. Throws an Error that says what is allowed. */
export function valueOf(field, text) {
  if (text.trim() === "") {
    if (field.required) throw new Error(`${labelOf(field)} is needed.`);
    return undefined;
  }
  switch (field.kind) {
    case "integer":
    case "number":
      return numberOf(field, text);
    case "boolean":
      return text === "true";
    case "any":
      return plainValue(text);
    case "choice":
      return field.choices.find((each) => String(each) === text);
    default:
      return text;
  }
}

function numberOf(field, text) {
  const value = Number(text);
  const kind = field.kind === "integer" ? "a whole number" : "a number";
  if (!Number.isFinite(value) || (field.kind === "integer" && !Number.isInteger(value))) {
    throw new Error(`${labelOf(field)} must be ${kind}, got ${text}.`);
  }
  const { minimum, maximum, exclusiveMinimum: above } = field;
  if (value < minimum || value > maximum || value <= above) {
    const bounds = [above !== undefined ? `above ${above}` : minimum !== undefined && `from ${minimum}`, maximum !== undefined && `up to ${maximum}`];
    throw new Error(`${labelOf(field)} must be ${kind} ${bounds.filter(Boolean).join(" ")}, got ${text}.`);
  }
  return value;
}

/** JSON where it reads as such: numbers, lists, objects; else the text itself. */
function plainValue(text) {
  try {
    return JSON.parse(text);
  } catch {
    if (/^\s*[[{]/.test(text)) throw new Error(`It begins like a list or an object and is no JSON: ${text.slice(0, 40)}`);
    return text;
  }
}

/** The size as the body has it; undefined for the model's own. */
export function sizeOf(field, width, height) {
  if (width.trim() === "" && height.trim() === "") return undefined;
  const sides = [width, height].map(Number);
  if (!sides.every((side) => Number.isInteger(side) && side > 0)) throw new Error("Size needs a width and a height in whole pixels.");
  const wrong = sides.find((side) => side % field.multiple_of || side > field.max_side);
  if (wrong !== undefined) throw new Error(`Size: each side must be a multiple of ${field.multiple_of}, up to ${field.max_side}; got ${wrong}.`);
  if (sides[0] * sides[1] > field.max_pixels) throw new Error(`Size: at most ${field.max_pixels} pixels in all.`);
  return sides.join("x");
}
