// A mask painted over a picture, with a pointer or the keyboard: white where the picture is to be made anew, else black.

import { byId, el, say } from "./dom.js";

/** The mask as a data URL of the picture's size; null when it was given up. */
export async function paintMask(pictureURL) {
  const image = el("img", { src: pictureURL, alt: "The picture under the mask" });
  await image.decode();
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = el("canvas", { width, height, tabIndex: 0, role: "application", aria: { label: "Mask", describedby: "mask-help" } });
  canvas.style.opacity = "0.6";
  const size = byId("mask-size");
  size.max = String(Math.max(8, Math.round(Math.max(width, height) / 2)));
  size.value = String(Math.round(Math.max(width, height) / 12));
  const brush = brushOn(canvas, () => Number(size.value), () => byId("mask-erase").checked);
  listen(canvas, brush, size);
  byId("mask-place").replaceChildren(image, canvas, brush.cursor);
  byId("mask-clear").onclick = brush.clear;
  const dialog = byId("mask-dialog");
  return new Promise((resolve) => {
    let made = null;
    byId("mask-use").onclick = () => ((made = maskOf(canvas)), dialog.close());
    byId("mask-cancel").onclick = () => dialog.close();
    dialog.addEventListener("close", () => resolve(made), { once: true });
    dialog.showModal();
    brush.moveTo(width / 2, height / 2);
    canvas.focus();
  });
}

function brushOn(canvas, sizeOf, isErasing) {
  const drawing = canvas.getContext("2d");
  const at = { x: 0, y: 0 };
  const cursor = el("div", { className: "brush", aria: { hidden: "true" } });

  function moveTo(x, y) {
    at.x = Math.min(canvas.width, Math.max(0, x));
    at.y = Math.min(canvas.height, Math.max(0, y));
    const share = sizeOf() / canvas.width;
    Object.assign(cursor.style, { left: `${(100 * at.x) / canvas.width}%`, top: `${(100 * at.y) / canvas.height}%`, width: `${100 * share}%` });
  }

  function paint(erases = isErasing(), from = at) {
    drawing.globalCompositeOperation = erases ? "destination-out" : "source-over";
    Object.assign(drawing, { strokeStyle: "#e0269a", lineCap: "round", lineJoin: "round", lineWidth: sizeOf() });
    drawing.beginPath();
    drawing.moveTo(from.x, from.y);
    drawing.lineTo(at.x + 0.01, at.y);
    drawing.stroke();
  }

  return { at, cursor, moveTo, paint, clear: () => drawing.clearRect(0, 0, canvas.width, canvas.height) };
}

function listen(canvas, brush, size) {
  let isDown = false;
  const place = (event) => {
    const seen = canvas.getBoundingClientRect();
    return [((event.clientX - seen.left) / seen.width) * canvas.width, ((event.clientY - seen.top) / seen.height) * canvas.height];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    isDown = true;
    brush.moveTo(...place(event));
    brush.paint();
  });
  canvas.addEventListener("pointermove", (event) => {
    const from = { ...brush.at };
    brush.moveTo(...place(event));
    if (isDown) brush.paint(undefined, from);
  });
  canvas.addEventListener("pointerup", () => (isDown = false));
  canvas.addEventListener("pointercancel", () => (isDown = false));
  size.oninput = () => brush.moveTo(brush.at.x, brush.at.y);
  canvas.addEventListener("keydown", (event) => {
    const step = Math.max(1, canvas.width / (event.shiftKey ? 8 : 32));
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) brush.moveTo(brush.at.x + moves[event.key][0], brush.at.y + moves[event.key][1]);
    else if (event.key === " ") (brush.paint(), say("Painted."));
    else if (event.key === "Delete" || event.key === "Backspace") (brush.paint(true), say("Erased."));
    else if (event.key === "+" || event.key === "-") ((size.value = String(Number(size.value) * (event.key === "+" ? 1.25 : 0.8))), size.oninput());
    else return;
    event.preventDefault();
  });
}

/** White where something is painted, black elsewhere, opaque everywhere. */
function maskOf(canvas) {
  const white = new OffscreenCanvas(canvas.width, canvas.height);
  const over = white.getContext("2d");
  over.drawImage(canvas, 0, 0);
  over.globalCompositeOperation = "source-in";
  over.fillStyle = "#fff";
  over.fillRect(0, 0, canvas.width, canvas.height);
  const mask = el("canvas", { width: canvas.width, height: canvas.height });
  const drawing = mask.getContext("2d");
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.drawImage(white, 0, 0);
  return mask.toDataURL("image/png");
}
