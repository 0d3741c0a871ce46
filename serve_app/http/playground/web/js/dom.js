// Elements of the page. Whatever the server says becomes text, never HTML.

/** An element with properties (`on...`: listeners, `data`, `aria`, `style`) and children: nodes, texts, or nothing. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "aria") for (const [key, each] of Object.entries(value)) element.setAttribute(`aria-${key}`, each);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Shows a text in an element that is hidden without one. */
export function tell(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** To those who listen with a screen reader. */
export function say(text) {
  byId("said").textContent = text;
}

export function button(text, onclick, properties = {}) {
  return el("button", { type: "button", onclick, ...properties }, text);
}

/** Seconds as a person says them. */
export function inWords(seconds) {
  if (!(seconds >= 0)) return "";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
