// Files that are sent along: chosen, dropped or painted; read as data URLs, as the body has them.

import { button, el } from "./dom.js";
import { paintMask } from "./mask.js";

const ACCEPT = { picture: "image/*", video: "video/*,image/gif,image/webp", sound: "audio/*" };

/** A place for the files of `field`: {element, values(), set(dataURLs), input}. `pictureOf`: what a mask is painted on. */
export function mediaPlace(field, id, pictureOf, onchange) {
  let given = []; // {url: a data URL, shown: a URL of a blob}
  const list = el("ul", { className: "given" });
  const input = el("input", { type: "file", id, accept: ACCEPT[field.medium], multiple: field.takesList, onchange: () => take(input.files) });
  const trouble = el("p", { className: "error", role: "alert", hidden: true });
  const drop = el("div", { className: "drop" }, input, list, trouble);
  if (field.kind === "mask") drop.append(button("Paint a mask", paint, { className: "paint" }));
  drop.addEventListener("dragover", (event) => (event.preventDefault(), drop.classList.add("over")));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files);
  });

  async function take(files) {
    const wanted = [...files].filter((file) => matches(file, field.medium));
    const refused = files.length - wanted.length;
    trouble.textContent = refused ? `${refused} of these files: not a ${field.medium}.` : "";
    trouble.hidden = !refused;
    const urls = await Promise.all(wanted.map(dataURL));
    input.value = "";
    if (urls.length) set([...(field.takesList ? given.map((each) => each.url) : []), ...urls]);
  }

  async function paint() {
    const picture = pictureOf();
    trouble.textContent = picture ? "" : "Give the picture first: the mask is painted on it.";
    trouble.hidden = Boolean(picture);
    const painted = picture && (await paintMask(picture));
    if (painted) set([painted]);
  }

  function set(urls) {
    given.forEach((each) => URL.revokeObjectURL(each.shown));
    given = (field.takesList ? urls : urls.slice(0, 1)).map((url) => ({ url, shown: URL.createObjectURL(blobOf(url)) }));
    list.replaceChildren(...given.map((each, number) =>
      el("li", {}, player(field.medium, each.shown, `${field.name} ${number + 1}`),
        button("Remove", () => set(given.filter((other) => other !== each).map((other) => other.url)), { aria: { label: `Remove ${field.name} ${number + 1}` } }))));
    onchange();
  }

  return { element: drop, input, set, values: () => given.map((each) => each.url) };
}

/** An element that shows the medium at `src`. */
export function player(medium, src, label) {
  if (medium === "video") return el("video", { src, controls: true, loop: true, muted: true, playsInline: true, preload: "metadata", aria: { label } });
  if (medium === "sound" || medium === "audio") return el("audio", { src, controls: true, preload: "metadata", aria: { label } });
  return el("img", { src, alt: label });
}

export function blobOf(dataURL) {
  const [head, data] = dataURL.split(",", 2);
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: /^data:([^;]*)/.exec(head)[1] });
}

export function dataURL(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function matches(file, medium) {
  const kinds = { picture: "image/", video: "video/", sound: "audio/" };
  const isMoving = medium === "video" && ["image/gif", "image/webp"].includes(file.type);
  return !file.type || file.type.startsWith(kinds[medium]) || isMoving; // without a type the server looks into it
}
