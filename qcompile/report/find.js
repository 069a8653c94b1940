"use strict";
const box = document.getElementById("find");
const said = document.getElementById("found");
const graph = document.getElementById("graph");
const layers = [...graph.querySelectorAll(".layer")];
const groups = [...graph.querySelectorAll(".group")];
const asked = "#find=";

function find() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let hits = 0;
  for (const layer of layers) {
    const text = layer.firstElementChild.textContent.toLowerCase() + " " + layer.dataset.find.toLowerCase();
    layer.hidden = !words.every((word) => text.includes(word));
    hits += layer.hidden ? 0 : 1;
  }
  for (const group of groups) {
    group.hidden = group.querySelector(".layer:not([hidden])") === null;
    if (words.length > 0) group.open = true;
  }
  graph.classList.toggle("filtered", words.length > 0);
  said.textContent = words.length > 0 ? `${hits} of ${layers.length} rows` : "";
}

function fold(open) {
  for (const group of groups) group.open = open;
  if (!open) for (const layer of layers) layer.open = false;
}

function step(from, by) {
  const lines = [...graph.querySelectorAll("summary")].filter((line) => line.checkVisibility());
  lines[lines.indexOf(from) + by]?.focus();
}

function given() {
  if (!location.hash.startsWith(asked)) return;
  try {
    box.value = decodeURIComponent(location.hash.slice(asked.length));
  } catch {
    return;
  }
  find();
}

document.getElementById("tools").hidden = false;
box.addEventListener("input", find);
document.getElementById("unfold").addEventListener("click", () => fold(true));
document.getElementById("fold").addEventListener("click", () => fold(false));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const line = event.target.closest("summary");
  if (event.target === box && event.key === "Escape") {
    box.value = "";
    find();
  } else if (event.target !== box && event.key === "/") {
    event.preventDefault();
    box.focus();
  } else if (line !== null && graph.contains(line) && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    step(line, event.key === "ArrowDown" ? 1 : -1);
  }
});
window.addEventListener("hashchange", given);
given();
