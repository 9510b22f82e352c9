"use strict";
// What moves on the page. Everything can be read without it; it holds no data of its own.
(() => {
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
document.documentElement.classList.add("js");

// --- One tip for all that tells more when pointed at or focused ---------------------------------

const tip = document.getElementById("tip");

let tipped = null;

function showTip(target, text) {
  tipped = target;
  tip.textContent = text;
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${clamp(box.left + box.width / 2 - tip.offsetWidth / 2, 8, Math.max(room, 8))}px`;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

function hideTip() { tip.hidden = true; }

document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
// A cell reached by keyboard may be scrolled into view just then.
document.addEventListener("scroll", () => {
  if (!tip.hidden && tipped === document.activeElement) showTip(tipped, tip.textContent);
  else hideTip();
}, { capture: true, passive: true });

// --- Curves ---------------------------------------------------------------------------------------

const CLOSEST = 1 / 50;  // of the whole width or height
const SVG = "http://www.w3.org/2000/svg";

function roundTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * (1 - 1e-9));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) {
    ticks.push(Number((i * step).toPrecision(10)));
  }
  return ticks;
}

function makePlot(figure) {
  const svg = figure.querySelector(".picture");
  const area = svg.querySelector(".area");
  const [left, right, top, bottom] = ["left", "right", "top", "bottom"].map((s) => Number(svg.dataset[s]));
  const range = { x: svg.dataset.x.split(",").map(Number), y: svg.dataset.y.split(",").map(Number) };
  const percent = svg.dataset.field === "top1";
  const told = figure.querySelector(".told");
  const frame = svg.querySelector(".frame");
  // The part of the drawing that is shown, in its own units.
  let view = { x0: left, x1: right, y0: top, y1: bottom };

  const toX = (x) => left + (x - view.x0) / (view.x1 - view.x0) * (right - left);
  const toY = (y) => top + (y - view.y0) / (view.y1 - view.y0) * (bottom - top);
  const epochAt = (x) => range.x[0] + (x - left) / (right - left) * (range.x[1] - range.x[0]);
  const valueAt = (y) => range.y[0] + (bottom - y) / (bottom - top) * (range.y[1] - range.y[0]);
  const xOf = (epoch) => left + (epoch - range.x[0]) / (range.x[1] - range.x[0]) * (right - left);
  const yOf = (value) => bottom - (value - range.y[0]) / (range.y[1] - range.y[0]) * (bottom - top);
  const number = (node, name) => Number(node.getAttribute(name));
  const place = (node, values) => {
    for (const [name, value] of Object.entries(values)) node.setAttribute(name, value.toFixed(2));
  };

  // Each draws one piece at the present view, from where it was first.
  const pieces = [];
  for (const node of all("polyline", area)) {
    const points = node.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number));
    pieces.push(() => node.setAttribute(
      "points", points.map(([x, y]) => `${toX(x).toFixed(2)},${toY(y).toFixed(2)}`).join(" ")));
  }
  for (const node of all("circle", area)) {
    const [x, y] = [number(node, "cx"), number(node, "cy")];
    pieces.push(() => place(node, { cx: toX(x), cy: toY(y) }));
  }
  for (const node of all(".band", area)) {
    const x = number(node, "x"), end = x + number(node, "width");
    pieces.push(() => place(node, { x: toX(x), width: toX(end) - toX(x) }));
  }
  for (const node of all(".boundary", area)) {
    const x = number(node, "x1");
    pieces.push(() => place(node, { x1: toX(x), x2: toX(x) }));
  }
  for (const node of all(".stage", svg)) {
    const x = number(node, "x") - 6;
    pieces.push(() => {
      const at = toX(x);
      place(node, { x: at + 6 });
      node.style.display = at < left - 1 || at > right - 20 ? "none" : "";
    });
  }
  for (const node of all(".reference, .chance", area)) {
    const names = node.tagName === "line" ? ["y1", "y2"] : ["y"];
    const gap = node.tagName === "line" ? 0 : -5;
    const y = number(node, names[0]) - gap;
    pieces.push(() => place(node, Object.fromEntries(names.map((name) => [name, toY(y) + gap]))));
  }

  const label = (value) => percent ? `${Number((100 * value).toPrecision(6))}\u00a0%` : String(value);

  function drawAxes() {
    const marks = svg.querySelector(".marks");
    marks.replaceChildren();
    const add = (tag, attributes, text = "") => {
      const node = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      node.textContent = text;
      marks.append(node);
    };
    for (const value of roundTicks(valueAt(view.y1), valueAt(view.y0), 5)) {
      const at = toY(yOf(value));
      add("line", { class: "grid", x1: left, x2: right, y1: at, y2: at });
      add("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, label(value));
    }
    for (const epoch of roundTicks(epochAt(view.x0), epochAt(view.x1), 6).filter(Number.isInteger)) {
      add("text", { x: toX(xOf(epoch)), y: bottom + 18, "text-anchor": "middle" }, String(epoch));
    }
  }

  function draw() {
    for (const piece of pieces) piece();
    drawAxes();
    const whole = view.x0 <= left && view.x1 >= right && view.y0 <= top && view.y1 >= bottom;
    svg.classList.toggle("zoomed", !whole);
    const digits = clamp(2 - Math.floor(Math.log10(valueAt(view.y0) - valueAt(view.y1))), 0, 9);
    const value = (y) => label(Number(valueAt(y).toFixed(digits)));
    told.textContent = whole ? "All is shown." :
      `Shown: epochs ${epochAt(view.x0).toFixed(1)} to ${epochAt(view.x1).toFixed(1)}, ` +
      `${value(view.y1)} to ${value(view.y0)}.`;
    for (const button of all("[data-act]", figure)) {
      const idle = button.dataset.act === "in" ? (view.x1 - view.x0) <= CLOSEST * (right - left) * 1.01 : whole;
      button.setAttribute("aria-disabled", String(idle));
    }
    hideTip();
  }

  function show(x0, x1, y0, y1) {
    const width = clamp(x1 - x0, CLOSEST * (right - left), right - left);
    const height = clamp(y1 - y0, CLOSEST * (bottom - top), bottom - top);
    x0 = clamp(x0, left, right - width);
    y0 = clamp(y0, top, bottom - height);
    view = { x0, x1: x0 + width, y0, y1: y0 + height };
    draw();
  }

  // What lies at (x, y), in shares of the frame, stays where it is.
  function zoom(factor, x = 0.5, y = 0.5) {
    const width = view.x1 - view.x0, height = view.y1 - view.y0;
    const x0 = view.x0 + x * width * (1 - factor), y0 = view.y0 + y * height * (1 - factor);
    show(x0, x0 + width * factor, y0, y0 + height * factor);
  }

  function pan(x, y) {
    const dx = x * (view.x1 - view.x0), dy = y * (view.y1 - view.y0);
    show(view.x0 + dx, view.x1 + dx, view.y0 + dy, view.y1 + dy);
  }

  const acts = {
    in: () => zoom(0.5), out: () => zoom(2), reset: () => show(left, right, top, bottom),
    left: () => pan(-0.25, 0), right: () => pan(0.25, 0), up: () => pan(0, -0.25), down: () => pan(0, 0.25),
  };
  for (const button of all("[data-act]", figure)) {
    button.addEventListener("click", () => acts[button.dataset.act]());
  }
  const keys = {
    "+": "in", "=": "in", "-": "out", "0": "reset", Home: "reset",
    ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  };
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("aria-keyshortcuts", Object.keys(keys).join(" "));
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.key.startsWith("Arrow") && !svg.classList.contains("zoomed")) return;
    event.preventDefault();
    acts[keys[event.key]]();
  });

  // A place on the screen in shares of the frame.
  const share = (event) => {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };

  // The wheel belongs to the page until somebody turns to the plot, or holds Ctrl.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== svg) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.8 : 1.25, ...share(event).map((s) => clamp(s, 0, 1)));
  }, { passive: false });

  // A drag draws the rectangle to look into; with a finger, or Shift, it moves what is shown.
  const rubber = svg.querySelector(".rubber");
  let drag = null;
  const spot = (event) => {
    const [x, y] = share(event).map((s) => clamp(s, 0, 1));
    return [left + x * (right - left), top + y * (bottom - top)];
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const moving = event.pointerType === "touch" || event.shiftKey;
    if (moving && !svg.classList.contains("zoomed")) return;
    svg.focus({ preventScroll: true });
    svg.setPointerCapture(event.pointerId);
    drag = { moving, at: spot(event), last: share(event) };
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (drag.moving) {
      const now = share(event);
      pan(drag.last[0] - now[0], drag.last[1] - now[1]);
      drag.last = now;
    } else {
      const [x, y] = spot(event), [x0, y0] = drag.at;
      place(rubber, { x: Math.min(x, x0), y: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0) });
    }
  });
  const release = (event) => {
    if (!drag) return;
    const { moving, at: [x0, y0] } = drag;
    drag = null;
    place(rubber, { width: 0, height: 0 });
    if (moving || event.type === "pointercancel") return;
    const [x, y] = spot(event);
    if (Math.abs(x - x0) < 8 || Math.abs(y - y0) < 8) return;  // a click
    const backX = (v) => view.x0 + (v - left) / (right - left) * (view.x1 - view.x0);
    const backY = (v) => view.y0 + (v - top) / (bottom - top) * (view.y1 - view.y0);
    show(backX(Math.min(x, x0)), backX(Math.max(x, x0)), backY(Math.min(y, y0)), backY(Math.max(y, y0)));
  };
  svg.addEventListener("pointerup", release);
  svg.addEventListener("pointercancel", release);
  svg.addEventListener("dblclick", acts.reset);

  // Dots tell their numbers; the browser's own slow tips make room.
  for (const dot of all("circle", area)) {
    const title = dot.querySelector("title");
    const text = title.textContent;
    title.remove();
    dot.addEventListener("pointerenter", () => { if (!drag) showTip(dot, text); });
    dot.addEventListener("pointerleave", hideTip);
  }
  draw();
}

all(".plot").forEach(makePlot);

function toggleCurves() {
  const off = new Set(all("[data-toggle]").filter((box) => !box.checked).map((box) => box.dataset.toggle));
  for (const line of all(".plot [data-run]")) {
    line.style.display = off.has(line.dataset.run) || off.has(line.dataset.kind) ? "none" : "";
  }
}
for (const box of all("[data-toggle]")) box.addEventListener("change", toggleCurves);

// --- Confusion matrix -----------------------------------------------------------------------------

function makeMatrix(table) {
  const heads = all("thead th[scope=col]", table).map((head) => head.textContent.trim());
  const rows = all("tbody tr", table).map((row) => all("td", row));
  table.setAttribute("role", "grid");
  let here = [0, 0];

  function say(row, column) {
    const cell = rows[row][column];
    const name = cell.parentElement.querySelector("th").textContent.trim();
    const total = cell.parentElement.dataset.total;
    return cell.dataset.tip || `${name}, called ${heads[column]}: 0 of ${total} (0.0\u00a0%)`;
  }
  function mark(row, column, on) {
    rows[row][0].parentElement.classList.toggle("here", on);
    all("thead th[scope=col]", table)[column].classList.toggle("here", on);
  }
  function focus(row, column) {
    rows[here[0]][here[1]].tabIndex = -1;
    here = [clamp(row, 0, rows.length - 1), clamp(column, 0, heads.length - 1)];
    const cell = rows[here[0]][here[1]];
    cell.tabIndex = 0;
    cell.focus();
  }
  rows.forEach((cells, row) => cells.forEach((cell, column) => {
    cell.tabIndex = row || column ? -1 : 0;
    if (cell.title) { cell.dataset.tip = cell.title; cell.removeAttribute("title"); }
    cell.setAttribute("aria-label", say(row, column));
  }));
  const at = (event) => {
    const cell = event.target.closest("td");
    const row = rows.findIndex((cells) => cells.includes(cell));
    return row < 0 ? null : [row, rows[row].indexOf(cell), cell];
  };
  const enter = (event) => {
    const found = at(event);
    if (!found) return;
    showTip(found[2], say(found[0], found[1]));
    mark(found[0], found[1], true);
  };
  const leave = (event) => {
    const found = at(event);
    if (!found) return;
    hideTip();
    mark(found[0], found[1], false);
  };
  for (const name of ["pointerover", "focusin"]) table.addEventListener(name, enter);
  for (const name of ["pointerout", "focusout"]) table.addEventListener(name, leave);
  table.addEventListener("click", (event) => {
    const found = at(event);
    if (found) focus(found[0], found[1]);
  });
  table.addEventListener("keydown", (event) => {
    const [row, column] = here;
    const to = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, heads.length - 1],
      PageUp: [0, column], PageDown: [rows.length - 1, column],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    focus(...to);
  });
}

all(".matrix").forEach(makeMatrix);

// --- Tables that can be sorted --------------------------------------------------------------------

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = all("thead th", table);
  const key = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const numeric = (column) => original.some((row) => "value" in row.cells[column].dataset);

  function sort(column, direction) {
    heads.forEach((head, i) => {
      if (i === column && direction) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
    const sign = direction === "descending" ? -1 : 1;
    const number = numeric(column);
    const rows = [...original];
    if (direction) rows.sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (!number) return sign * x.localeCompare(y, undefined, { numeric: true, sensitivity: "base" });
      // What has no figure comes last, whichever way.
      if (typeof x === "string" || typeof y === "string") return (typeof x === "string") - (typeof y === "string");
      return sign * (x - y);
    });
    body.append(...rows);
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    // Figures are asked for from the largest down, names from A on; the third time as it was.
    const order = numeric(column) ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
    button.addEventListener("click", () => {
      sort(column, order[(order.indexOf(head.getAttribute("aria-sort") || "") + 1) % 3]);
    });
  });
}

all("table.sortable").forEach(makeSortable);

// --- Clips ------------------------------------------------------------------------------------------

const PICTURE_MS = 100;
const players = new Map();

function makePlayer(item) {
  const moments = all(".film li", item).map((li) => all("img", li));
  const screens = all(".screen", item);
  const pictures = screens.map((screen, i) => {
    const picture = document.createElement("img");
    picture.src = moments[0][i].src;
    screen.prepend(picture);
    return picture;
  });
  const button = item.querySelector(".play"), slider = item.querySelector(".scrub");
  const told = item.querySelector(".moment");
  const last = item.dataset.frames;
  let now = 0, timer = 0;

  function show(index) {
    now = index;
    pictures.forEach((picture, i) => {
      picture.src = moments[now][i].src;
      picture.alt = moments[now][i].alt;
    });
    const text = `${moments[now][0].dataset.number} of ${last}`;
    slider.value = now;
    slider.setAttribute("aria-valuetext", `Frame ${text}`);
    told.textContent = text;
  }
  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(() => {
      if (!document.hidden) show((now + 1) % moments.length);
    }, PICTURE_MS) : 0;
    button.setAttribute("aria-pressed", String(on));
    button.querySelector("span").textContent = on ? "Pause" : "Play";
    tellAll();
  }
  slider.max = moments.length - 1;
  slider.addEventListener("input", () => { play(false); show(Number(slider.value)); });
  button.addEventListener("click", () => play(!timer));
  players.set(item.id, { play, playing: () => Boolean(timer) });
  show(0);
}

const playAll = document.getElementById("play-all");

function tellAll() {
  const running = [...players.values()].some((player) => player.playing());
  playAll.textContent = running ? "Pause all clips" : "Play all clips";
}

if (playAll) {
  all(".clips > li").forEach(makePlayer);
  playAll.addEventListener("click", () => {
    const running = [...players.values()].some((player) => player.playing());
    for (const player of players.values()) player.play(!running);
  });
}

for (const link of all("a.to-clip")) {
  link.addEventListener("click", () => {
    const id = link.hash.slice(1);
    document.getElementById(id).focus({ preventScroll: true });
    // Nothing moves by itself for those who asked for calm.
    if (!calm.matches) players.get(id).play(true);
  });
}

// --- Configuration ----------------------------------------------------------------------------------

for (const box of all(".filter")) {
  const words = box.querySelector("[type=search]");
  const only = box.querySelector("[type=checkbox]");
  const told = box.querySelector("output");
  const rows = all("tbody tr", document.getElementById(box.dataset.table));
  const apply = () => {
    const wanted = words ? words.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const match = wanted.every((word) => text.includes(word)) &&
        !(only && only.checked && !row.classList.contains("differs"));
      row.classList.toggle("filtered", !match);
      shown += match;
    }
    told.textContent = `${shown} of ${rows.length} shown`;
  };
  for (const control of [words, only]) if (control) control.addEventListener("input", apply);
  apply();
}

// --- Paper has no buttons -----------------------------------------------------------------------------

let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  for (const part of closed) part.open = true;
  for (const player of players.values()) player.play(false);
});
addEventListener("afterprint", () => { for (const part of closed) part.open = false; });
})();
