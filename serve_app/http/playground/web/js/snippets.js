// The same call as curl, Python and JavaScript. A key is never written into them: they read TRIPTYCH_API_KEY.

import { getKey } from "./api.js";
import { button, byId, el, say } from "./dom.js";

const ENDING = { image: "png", video: "mp4", audio: "wav", tensors: "safetensors" };
const UNPACK = `python3 -c 'import base64, json, pathlib, sys
for number, made in enumerate(json.load(sys.stdin)["data"]):
    pathlib.Path(f"made-{number}.ENDING").write_bytes(base64.b64decode(made["b64_json"]))'`;

/** `body` as the page sends it; files in it become names of files that the caller puts beside the code. */
export function snippets({ body, route, makes, model }, base) {
  const { partial_images: _, ...asked } = body;
  const ending = asked.output_format === "jpeg" ? "jpg" : (asked.output_format ?? ENDING[makes]);
  const path = makes === "video" ? "/v1/videos/generations" : route; // that of videos which waits for them
  const whole = makes === "video" ? { ...asked, response_format: "b64_json" } : asked;
  const call = { ...filesOf({ model, ...whole }), needsKey: Boolean(getKey()), ending };
  const url = new URL(path.slice(1), base).href;
  return { curl: curl(call, url), Python: python(call, path, new URL("v1", base).href), JavaScript: javascript(call, url) };
}

/** `plain`: fields without files; `files`: [field, names of files, whether it is a list]. */
function filesOf(body) {
  const isFile = (value) => typeof value === "string" && value.startsWith("data:");
  const plain = {};
  const files = [];
  for (const [name, value] of Object.entries(body)) {
    const values = [value].flat();
    if (!values.length || !values.every(isFile)) plain[name] = value;
    else files.push([name, values.map((url, number) => `${name}${values.length > 1 ? number : ""}.${typeOf(url).split("/")[1].replace("jpeg", "jpg")}`), Array.isArray(value), values.map(typeOf)]);
  }
  return { plain, files };
}

const typeOf = (url) => /^data:([^;,]*)/.exec(url)[1] || "application/octet-stream";
const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

function curl({ plain, files, needsKey, ending }, url) {
  const key = needsKey ? ` \\\n  -H "Authorization: Bearer $TRIPTYCH_API_KEY"` : "";
  const unpack = ` \\\n  | ${UNPACK.replace("ENDING", ending)}`;
  if (!files.length) {
    return `curl -sS --fail-with-body ${quoted(url)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(plain))}${unpack}`;
  }
  const fields = Object.entries(plain).flatMap(([name, value]) => inForm(name, value)).map((each) => ` \\\n  --form-string ${quoted(each)}`);
  const uploads = files.flatMap(([name, names, isList]) => names.map((each) => ` \\\n  -F ${quoted(`${name}${isList ? "[]" : ""}=@${each}`)}`));
  return `curl -sS --fail-with-body ${quoted(url)}${key}${fields.join("")}${uploads.join("")}${unpack}`;
}

/** Lists and objects as forms have them: a[0][key]=value. */
function inForm(name, value) {
  if (value === null || typeof value !== "object") return [`${name}=${value}`];
  return Object.entries(value).flatMap(([key, each]) => inForm(`${name}[${key}]`, each));
}

/** A value as Python writes it. */
function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function python({ plain, files, needsKey, ending }, path, base) {
  const file = ([, names, isList, types]) => {
    const each = names.map((name, number) => `data_url(${JSON.stringify(name)}, ${JSON.stringify(types[number])})`);
    return isList ? `[${each.join(", ")}]` : each[0];
  };
  const fields = [...Object.entries(plain).map(([name, value]) => [name, literal(value)]), ...files.map((each) => [each[0], file(each)])];
  const inObject = (some) => `{${some.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(", ")}}`;
  const isOpenAIs = ([name]) => ["model", "prompt", "n", "size"].includes(name);
  const others = fields.filter((each) => !isOpenAIs(each));
  const named = fields.filter(isOpenAIs).map(([name, value]) => `${name}=${value}`);
  const extra = others.length ? [`extra_body=${inObject(others)}`] : [];
  const hasMethod = path === "/v1/images/generations" && "prompt" in plain; // else the client has none that fits
  const head = ["import base64", ...(needsKey ? ["import os"] : []), "from pathlib import Path", "", "from openai import OpenAI", ""];
  const reader = ["def data_url(path, kind):", `    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"`, "", ""];
  const client = `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${needsKey ? 'os.environ["TRIPTYCH_API_KEY"]' : '"none"'})`;
  const asked = hasMethod
    ? [`answer = client.images.generate(${[...named, ...extra].join(", ")}).to_dict()`]
    : [`answer = client.post(${JSON.stringify(path.replace("/v1", ""))}, body=${inObject(fields)}, cast_to=object)`];
  const write = [`for number, made in enumerate(answer["data"]):`, `    Path(f"made-{number}.${ending}").write_bytes(base64.b64decode(made["b64_json"]))`];
  return [...head, ...(files.length ? ["", ...reader] : []), client, ...asked, ...write].join("\n");
}

function javascript({ plain, files, needsKey, ending }, url) {
  const file = ([name, names, isList, types]) => {
    const each = names.map((path, number) => `await dataURL(${JSON.stringify(path)}, ${JSON.stringify(types[number])})`);
    return `  ${JSON.stringify(name)}: ${isList ? `[${each.join(", ")}]` : each[0]},`;
  };
  const fields = [...Object.entries(plain).map(([name, value]) => `  ${JSON.stringify(name)}: ${JSON.stringify(value)},`), ...files.map(file)];
  const key = needsKey ? `, Authorization: \`Bearer \${process.env.TRIPTYCH_API_KEY}\`` : "";
  return [`import { ${files.length ? "readFile, " : ""}writeFile } from "node:fs/promises";`, "",
    ...(files.length ? ["const dataURL = async (path, kind) => `data:${kind};base64,${(await readFile(path)).toString(\"base64\")}`;"] : []),
    "const body = {", ...fields, "};", `const answer = await fetch(${JSON.stringify(url)}, {`, `  method: "POST",`,
    `  headers: { "Content-Type": "application/json"${key} },`, "  body: JSON.stringify(body),", "});",
    "if (!answer.ok) throw new Error(await answer.text());", "const { data } = await answer.json();",
    "for (const [number, made] of data.entries()) {", `  await writeFile(\`made-\${number}.${ending}\`, Buffer.from(made.b64_json, "base64"));`, "}"].join("\n");
}

export function showSnippets(asked) {
  const shown = Object.entries(snippets(asked, document.baseURI)).map(([language, text]) => {
    const code = el("pre", { tabIndex: 0, role: "region", aria: { label: language }, data: { language } }, text);
    return el("section", {}, el("div", { className: "heading" }, el("h3", {}, language), button(`Copy ${language}`, (event) => copy(text, code, event.target))), code);
  });
  byId("code").replaceChildren(...shown);
  byId("code-dialog").showModal();
}

/** Without https a page may not write to the clipboard: then the text is chosen, to be copied by hand. */
async function copy(text, code, pressed) {
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    pressed.textContent = "Chosen: copy it with Ctrl+C";
  }
  say(pressed.textContent);
}
