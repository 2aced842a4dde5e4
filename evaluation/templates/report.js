"use strict";
// Figures: opened in a dialog, where the view box is zoomed and moved.
const dialog = document.querySelector("dialog");
const stage = dialog.querySelector(".stage");
let whole = null, box = null;

function show(x, y, w, h) {
  const width = Math.min(w, whole.w), height = Math.min(h, whole.h);
  box = {
    x: Math.max(whole.x, Math.min(x, whole.x + whole.w - width)),
    y: Math.max(whole.y, Math.min(y, whole.y + whole.h - height)),
    w: width, h: height,
  };
  stage.firstChild.setAttribute("viewBox", `${box.x} ${box.y} ${box.w} ${box.h}`);
}
function zoom(factor, fx = 0.5, fy = 0.5) {
  const w = Math.max(box.w * factor, whole.w / 40), h = Math.max(box.h * factor, whole.h / 40);
  show(box.x + fx * (box.w - w), box.y + fy * (box.h - h), w, h);
}
function move(dx, dy) { show(box.x + dx * box.w, box.y + dy * box.h, box.w, box.h); }
function open(figure) {
  const svg = figure.querySelector("svg").cloneNode(true);
  stage.replaceChildren(svg);
  const [x, y, w, h] = svg.getAttribute("viewBox").split(" ").map(Number);
  whole = { x, y, w, h };
  show(x, y, w, h);
  dialog.showModal();
}
for (const figure of document.querySelectorAll("figure")) {
  figure.addEventListener("click", () => open(figure));
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(figure); }
  });
}
const keys = {
  "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7),
  "0": () => show(whole.x, whole.y, whole.w, whole.h),
  ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0),
  ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1),
};
dialog.addEventListener("keydown", (event) => {
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const area = stage.getBoundingClientRect();
  const at = [(event.clientX - area.x) / area.width, (event.clientY - area.y) / area.height];
  zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, ...at);
}, { passive: false });
const fingers = new Map();
stage.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event);
  stage.setPointerCapture(event.pointerId);
});
stage.addEventListener("pointermove", (event) => {
  const last = fingers.get(event.pointerId);
  if (!last) return;
  const area = stage.getBoundingClientRect();
  const other = [...fingers.values()].find((f) => f.pointerId !== event.pointerId);
  if (other) {
    const apart = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY) || 1;
    zoom(apart(last) / apart(event));
  } else {
    move((last.clientX - event.clientX) / area.width, (last.clientY - event.clientY) / area.height);
  }
  fingers.set(event.pointerId, event);
});
for (const end of ["pointerup", "pointercancel"]) {
  stage.addEventListener(end, (event) => fingers.delete(event.pointerId));
}

// Tokens: the chosen one tells its numbers.
function choose(sequence, token) {
  sequence.querySelector(".chosen")?.classList.remove("chosen");
  token.classList.add("chosen");
  sequence.parentElement.querySelector("output").textContent =
    `${JSON.stringify(token.textContent)}  ${token.dataset.n || "not chosen by the policy"}`;
}
for (const sequence of document.querySelectorAll(".sequence")) {
  const tokens = [...sequence.querySelectorAll(".t")];
  sequence.addEventListener("click", (event) => {
    const token = event.target.closest(".t");
    if (token) choose(sequence, token);
  });
  sequence.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = tokens.findIndex((t) => t.classList.contains("chosen"));
    const next = now < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, now + step));
    choose(sequence, tokens[next]);
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
