"use strict";
// Sends a video to the server, says what goes on meanwhile, and shows what came of it. All that it
// shows is text and pictures put in by the DOM: names of files and classes are other people's.
(() => {
const by = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const limits = { bytes: 1e6 * document.body.dataset.megabytes, megabytes: Number(document.body.dataset.megabytes) };
const STREAMS = { rgb: "Frames", flow: "Flow" };
const STRONG = 3;  // frames of a stream that are pointed out
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
const seconds = (value) => `${value.toFixed(1)}\u00a0s`;
document.documentElement.classList.add("js");

function element(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bar(share) {
  const inner = element("span");
  inner.style.width = `${(100 * share).toFixed(1)}%`;
  return element("span", { className: "bar", "aria-hidden": "true" }, inner);
}

// --- What goes on ---------------------------------------------------------------------------------

let begun = 0;
let words = "";

function say(text, busy) {
  words = text;
  begun = performance.now();
  by("status").textContent = text;
  by("status").classList.toggle("busy", Boolean(busy));
}

// Long work shows that it is not hung; it is not read out each time.
setInterval(() => {
  const since = Math.floor((performance.now() - begun) / 1000);
  if (by("status").classList.contains("busy") && since >= 3) by("status").dataset.since = since;
  else delete by("status").dataset.since;
}, 500);

function complain(message) {
  by("fault").textContent = message;
  by("fault").hidden = !message;
}

function stateWords(told, name) {
  if (told.state === "loading") return "The network is being loaded; your video is next after that.";
  if (told.state === "working") return `Looking at ${name}`;
  const videos = told.ahead === 1 ? "One video is" : `${told.ahead} videos are`;
  return told.ahead ? `${videos} ahead of yours.` : `Looking at ${name}`;
}

async function about() {
  for (;;) {
    try {
      const told = await (await fetch("about")).json();
      if (told.classes) {
        by("about").textContent = `tells ${told.classes.length} classes apart: ${some(told.classes)}.`;
        by("warning").textContent = told.warning;
        by("warning").hidden = !told.warning;
        if (words.startsWith("The network is being loaded.")) say("", false);
        return;
      }
      if (!words) say("The network is being loaded. You may already give a video.", true);
    } catch {
      say("", false);
      complain("The app does not answer any more; its terminal says why. Start it again and reload this page.");
      return;
    }
    await new Promise((done) => setTimeout(done, 700));
  }
}

function some(names) {
  return names.length <= 8 ? names.join(", ") : `${names.slice(0, 7).join(", ")} and ${names.length - 7} more`;
}

// --- A video's way --------------------------------------------------------------------------------

let under_way = null;

// Sends a file and returns what came of it; throws an Error with the message for people.
async function send(file, name, why, tell, signal) {
  if (file.size > limits.bytes) {
    throw new Error(`'${name}': larger than ${limits.megabytes} MB. Cut the video into shorter ones, or start the app with a larger --max_megabytes.`);
  }
  const query = new URLSearchParams({ name, why: why ? "1" : "0" });
  let answer;
  try {
    answer = await fetch(`videos?${query}`, { method: "POST", body: file, signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error("The app does not answer; its terminal says why. If the file was moved or changed, choose it again.");
  }
  if (!answer.ok) throw new Error((await answer.json()).message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The app ended before it had an answer; its terminal says why.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const told = JSON.parse(line);
      if (told.state === "done") return told;
      if (told.state === "failed") throw new Error(told.message);
      tell(told);
    }
  }
}

async function give(file, name) {
  under_way?.abort();
  const control = new AbortController();
  under_way = control;
  complain("");
  by("result").hidden = true;
  by("stop-line").hidden = false;
  say(`Sending ${name}`, true);
  try {
    const found = await send(file, name, true, (told) => say(stateWords(told, name), true), control.signal);
    show(found, file);
    say(`${found.name}: ${found.classes[0][0]}, ${percent(found.classes[0][1])}.`, false);
  } catch (error) {
    if (control.signal.aborted) return;
    say("", false);
    complain(error.message);
  } finally {
    if (under_way === control) {
      under_way = null;
      by("stop-line").hidden = true;
    }
  }
}

by("stop").addEventListener("click", () => {
  under_way?.abort();
  under_way = null;
  by("stop-line").hidden = true;
  say("Stopped.", false);
  by("file").focus();
});

by("file").addEventListener("change", () => {
  const [file] = by("file").files;
  if (file) give(file, file.name);
  by("file").value = "";  // the same one may be chosen again
});

// Anywhere on the page: a file dropped beside the frame would replace the page otherwise.
const carries = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  document.body.classList.remove("over");
  const files = [...event.dataTransfer.files];
  if (files.length > 1) complain(`One video at a time: only ${files[0].name} was taken.`);
  if (files.length) give(files[0], files[0].name);
});

// --- The camera -----------------------------------------------------------------------------------

let camera = null;
let live = null;

by("camera-on").addEventListener("click", async () => {
  if (camera) return closeCamera();
  complain("");
  if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
    complain("This browser gives no camera to this page: it does so at http://localhost or over HTTPS only.");
    return;
  }
  try {
    const wanted = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 25 } };
    camera = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
  } catch (error) {
    const why = { NotAllowedError: "it was not allowed", NotFoundError: "there is none", NotReadableError: "something else uses it" };
    complain(`The camera cannot be used: ${why[error.name] ?? error.message}.`);
    return;
  }
  camera.getVideoTracks()[0].addEventListener("ended", closeCamera);
  by("preview").srcObject = camera;
  by("camera").hidden = false;
  by("camera-on").textContent = "Switch the camera off";
  by("camera-on").setAttribute("aria-expanded", "true");
});

function closeCamera() {
  stopLive();
  camera?.getTracks().forEach((track) => track.stop());
  camera = by("preview").srcObject = null;
  by("camera").hidden = true;
  by("camera-on").textContent = "Use the camera";
  by("camera-on").setAttribute("aria-expanded", "false");
}

// So many seconds of what the camera sees, as a file.
function record(length) {
  const kinds = ["video/webm;codecs=vp8", "video/webm", "video/mp4"];
  const mimeType = kinds.find((kind) => MediaRecorder.isTypeSupported(kind));
  const recorder = new MediaRecorder(camera, { mimeType, videoBitsPerSecond: 4e6 });
  const parts = [];
  return new Promise((done, fail) => {
    recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
    recorder.addEventListener("error", () => fail(new Error("The camera could not be recorded.")));
    recorder.addEventListener("stop", () => done(new Blob(parts, { type: recorder.mimeType })));
    recorder.start();
    setTimeout(() => { if (recorder.state !== "inactive") recorder.stop(); }, 1000 * length);
  });
}

by("record").addEventListener("click", async () => {
  const length = Number(by("length").value);
  by("record").disabled = by("live").disabled = true;
  complain("");
  say(`Recording for ${length} s`, true);
  try {
    const file = await record(length);
    await give(file, "camera");
  } catch (error) {
    say("", false);
    complain(error.message);
  } finally {
    by("record").disabled = by("live").disabled = false;
  }
});

// While one piece is looked at, the next is recorded; none is begun while two are under way.
async function runLive(control) {
  let answer = Promise.resolve();
  let number = 0;
  while (!control.signal.aborted) {
    const length = Number(by("length").value);
    const file = await record(length);
    await answer;
    if (control.signal.aborted) return;
    number += 1;
    const name = `camera, piece ${number}`;
    answer = send(file, name, false, (told) => {
      if (told.state === "loading") say("The network is being loaded.", true);
    }, control.signal).then((found) => {
      const [label, probability] = found.classes[0];
      const line = element("li", {}, element("span", { textContent: label }), element("span", { textContent: percent(probability) }));
      by("live-list").prepend(line);
      while (by("live-list").children.length > 8) by("live-list").lastChild.remove();
      say(`Live: piece ${number} of ${length} s, looked at in ${seconds(Object.values(found.took).reduce((a, b) => a + b))}`, true);
    });
  }
}

function stopLive() {
  if (!live) return;
  live.abort();
  live = null;
  by("live").setAttribute("aria-pressed", "false");
  by("record").disabled = false;
  say("", false);
}

by("live").addEventListener("click", async () => {
  if (live) return stopLive();
  complain("");
  by("result").hidden = true;
  by("live-list").replaceChildren();
  by("record").disabled = true;
  by("live").setAttribute("aria-pressed", "true");
  const control = new AbortController();
  live = control;
  say("Live: the first piece is being recorded", true);
  try {
    await runLive(control);
  } catch (error) {
    if (control.signal.aborted) return;
    stopLive();
    complain(error.message);
  }
});

// --- What came of it ------------------------------------------------------------------------------

let playing = null;

function show(found, file) {
  if (by("video").src) URL.revokeObjectURL(by("video").src);
  by("unplayable").hidden = true;
  by("video").hidden = false;
  by("video").src = URL.createObjectURL(file);
  by("classes-head").textContent = found.name;
  by("classes").replaceChildren(...found.classes.map(guess));
  const length = `${found.frames} frames, ${seconds(found.seconds)}`;
  by("of-what").textContent = found.whole
    ? `Of the whole video in one clip, as in the evaluation (${length}).`
    : `The mean over ${found.windows} windows: a video of more than 2,000 frames is not one clip (${length}).`;
  by("notes").replaceChildren(...found.notes.map((note) => element("li", { textContent: note })));
  showCourse(found);
  clearInterval(playing);
  by("why").hidden = !found.why;
  if (found.why) showWhy(found);
  const total = Object.values(found.took).reduce((a, b) => a + b);
  const parts = Object.entries(found.took).map(([name, value]) => `${name} ${value.toFixed(2)}`);
  by("took").textContent = `Looked at in ${seconds(total)}: ${parts.join(", ")}.`;
  by("result").hidden = false;
  by("result").focus({ preventScroll: true });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  by("result").scrollIntoView({ behavior: calm ? "instant" : "smooth" });
}

by("video").addEventListener("error", () => {
  if (!by("video").getAttribute("src")) return;
  by("video").hidden = true;
  by("unplayable").hidden = false;
});

function guess([name, probability]) {
  const row = element("div", { className: "row" }, element("span", { textContent: name }), element("span", { textContent: percent(probability) }));
  return element("li", {}, row, bar(probability));
}

function seek(time) {
  if (!by("video").hidden && by("video").readyState > 0) {
    by("video").pause();
    by("video").currentTime = time;
  }
}

// --- The course -----------------------------------------------------------------------------------

const box = { left: 52, right: 712, top: 10, bottom: 206 };

function svg(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

// Lines of different colour and dash: nobody has to tell them by colour alone.
const colour = (number) => `var(--run-${number + 1})`;

function showCourse(found) {
  const { names, spans } = found.course;
  const end = spans.at(-1).end;
  const x = (time) => box.left + time / end * (box.right - box.left);
  const y = (share) => box.bottom - share * (box.bottom - box.top);
  const chart = by("chart");
  chart.replaceChildren();
  for (const share of [0, 0.5, 1]) {
    chart.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(share), y2: y(share) }));
    chart.append(svg("text", { x: box.left - 6, y: y(share) + 5, "text-anchor": "end" }, `${100 * share}\u00a0%`));
  }
  for (const part of [0, 0.5, 1]) {
    const anchor = part === 1 ? "end" : part ? "middle" : "start";
    chart.append(svg("text", { x: x(part * end), y: box.bottom + 26, "text-anchor": anchor }, seconds(part * end)));
  }
  const marker = svg("rect", { class: "marker", y: box.top, height: box.bottom - box.top });
  chart.append(marker);
  names.forEach((name, number) => {
    const points = spans.flatMap((s) => [s.start, s.end].map((t) => `${x(t).toFixed(1)},${y(s.probabilities[number]).toFixed(1)}`));
    const line = svg("polyline", { points: points.join(" "), class: `dash-${number % 3}` });
    line.style.setProperty("--c", colour(number));
    chart.append(line);
  });
  by("legend").replaceChildren(...names.map((name, number) => {
    const key = element("i", { className: `dash-${number % 3}` });
    key.style.setProperty("--c", colour(number));
    return element("li", {}, key, name);
  }));
  by("course-words").textContent = found.windows > 1
    ? `${found.windows} windows that overlap; where they do, their mean is shown.`
    : "The video is too short for more than one window, so it has one value only.";
  courseTable(names, spans);
  const choose = (number, by_hand) => {
    const chosen = spans[number];
    marker.setAttribute("x", x(chosen.start));
    marker.setAttribute("width", x(chosen.end) - x(chosen.start));
    by("moment").value = number;
    const told = `${seconds(chosen.start)} to ${seconds(chosen.end)}`;
    by("moment").setAttribute("aria-valuetext", `${told}: ${chosen.label}`);
    const shares = names.map((name, k) => [name, chosen.probabilities[k]]).sort((a, b) => b[1] - a[1]);
    by("moment-words").textContent = `${told}: ${shares.slice(0, 3).map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`;
    if (by_hand) seek(chosen.start);
  };
  by("moment").max = spans.length - 1;
  by("moment").oninput = () => choose(Number(by("moment").value), true);
  const pointed = (event) => {
    const bounds = chart.getBoundingClientRect();
    const time = ((event.clientX - bounds.left) / bounds.width * 720 - box.left) / (box.right - box.left) * end;
    const number = spans.findIndex((s) => time < s.end);
    return number < 0 ? spans.length - 1 : number;
  };
  chart.onpointermove = (event) => choose(pointed(event), false);
  chart.onclick = (event) => choose(pointed(event), true);
  by("video").ontimeupdate = () => {
    const number = spans.findIndex((s) => by("video").currentTime < s.end);
    if (!by("video").paused && number >= 0) choose(number, false);
  };
  choose(0, false);
}

function courseTable(names, spans) {
  const head = ["From", "To", "Most probable", ...names].map((name) => element("th", { scope: "col", textContent: name }));
  by("course-table").tHead.replaceChildren(element("tr", {}, ...head));
  by("course-table").tBodies[0].replaceChildren(...spans.map((s) => element("tr", {},
    element("td", { textContent: seconds(s.start) }),
    element("td", { textContent: seconds(s.end) }),
    element("th", { scope: "row", textContent: s.label }),
    ...s.probabilities.map((share) => element("td", { className: "n", textContent: percent(share) })))));
}

// --- Why ------------------------------------------------------------------------------------------

function showWhy(found) {
  by("key").src = found.flow_key.picture;
  by("key").alt = "Colour wheel: right is red, down yellow, left light blue, up violet";
  by("key-words").textContent = `: full colour is ${found.flow_key.speed} pixels per frame`;
  const players = found.why.map((one) => network(one, found));
  by("whys").replaceChildren(...players.map((player) => player.node));
  clearInterval(playing);
  playing = setInterval(() => players.forEach((player) => player.tick()), 160);
}

function network(told, found) {
  const node = element("div", { className: "network" });
  if (found.why.length > 1) node.append(element("h3", { textContent: `The network of ${told.network === "rgb" ? "frames" : "flow"}` }));
  const [from, to] = found.why_span;
  const part = found.whole ? "" : ` in its surest window, ${seconds(from)} to ${seconds(to)}`;
  node.append(element("p", { textContent: `Why ${told.label} (${percent(told.probability)})${part}: the brighter a place is in the heat, the more it speaks for it. The ${STRONG} frames with the most are framed.` }));
  const film = makeFilm(told);
  node.append(film.node);
  const strips = told.streams.map((stream) => strip(stream, told, film));
  node.append(...strips.flatMap((s) => s.nodes), stepTable(told));
  film.changed = (number) => strips.forEach((s) => s.mark(number));
  film.go(film.strongest);
  return { node, tick: film.tick };
}

// The clip's frames and flow side by side: they play, or stand still at the one that was chosen.
function makeFilm(told) {
  const count = told.streams[0].frames.length;
  const totals = told.streams[0].frames.map((_, k) => told.streams.reduce((sum, s) => sum + s.frames[k].weight, 0));
  const film = { at: 0, running: false, strongest: totals.indexOf(Math.max(...totals)), changed: () => {} };
  const screens = told.streams.map((stream) => ({ stream, img: element("img", {}) }));
  const figures = screens.map(({ stream, img }) => element("figure", { className: "screen" }, img, element("figcaption", { textContent: STREAMS[stream.stream] })));
  const play = element("button", { type: "button", className: "play", textContent: "Play" });
  const scrub = element("input", { type: "range", className: "scrub", min: 0, max: count - 1, step: 1, "aria-label": "Frame" });
  const moment = element("span", { className: "moment soft small" });
  const heat = element("input", { type: "checkbox", checked: true });
  film.go = (number) => {
    film.at = number;
    for (const { stream, img } of screens) {
      const frame = stream.frames[number];
      img.src = heat.checked ? frame.heat : frame.picture;
      img.alt = `${STREAMS[stream.stream]} at ${seconds(frame.seconds)}`;
    }
    scrub.value = number;
    const time = seconds(told.streams[0].frames[number].seconds);
    scrub.setAttribute("aria-valuetext", `frame ${number + 1} of ${count}, ${time}`);
    moment.textContent = `${number + 1}/${count}, ${time}`;
    film.changed(number);
  };
  film.stop = () => { film.running = false; play.textContent = "Play"; };
  film.tick = () => { if (film.running) film.go((film.at + 1) % count); };
  play.addEventListener("click", () => {
    film.running = !film.running;
    play.textContent = film.running ? "Pause" : "Play";
  });
  scrub.addEventListener("input", () => { film.stop(); film.go(Number(scrub.value)); });
  heat.addEventListener("change", () => film.go(film.at));
  film.node = element("div", { className: "film-player" }, element("div", { className: "screens" }, ...figures),
    element("div", { className: "controls" }, play, scrub, moment, element("label", {}, heat, "Heat")));
  return film;
}

function strip(stream, told, film) {
  const gain = stream.gain >= 0 ? `falls by ${stream.gain.toFixed(2)}` : `grows by ${(-stream.gain).toFixed(2)}`;
  const title = element("h3", { textContent: STREAMS[stream.stream] });
  const effect = element("p", { className: "soft small", textContent: told.streams.length > 1
    ? `Without its ${stream.stream === "rgb" ? "frames" : "flow"} the logit of ${told.label} ${gain}.` : `The logit of ${told.label} ${gain} when its maps are set to zero.` });
  const order = stream.frames.map((frame, k) => [frame.weight, k]).sort((a, b) => b[0] - a[0]);
  const strong = new Set(order.slice(0, STRONG).filter(([weight]) => weight > 0).map(([, k]) => k));
  const buttons = stream.frames.map((frame, k) => {
    const time = seconds(frame.seconds);
    const share = percent(frame.weight).replace(/\.\d/, "");
    const mark = strong.has(k) ? "★ " : "";
    const button = element("button", { type: "button", "aria-pressed": "false",
      "aria-label": `${STREAMS[stream.stream]} at ${time}: ${share} of the strongest heat${mark ? ", one of those that mattered most" : ""}` },
      element("img", { src: frame.heat, alt: "" }), bar(frame.weight), element("span", { className: "moment", textContent: `${mark}${time}` }));
    button.addEventListener("click", () => { film.stop(); film.go(k); seek(frame.seconds); });
    return button;
  });
  const list = element("ol", { className: "frames" }, ...buttons.map((button, k) => element("li", { className: strong.has(k) ? "strong" : "" }, button)));
  if (!strong.size) effect.append(" Nothing in them speaks for it.");
  return { nodes: [title, effect, list], mark: (number) => buttons.forEach((b, k) => b.setAttribute("aria-pressed", String(k === number))) };
}

function stepTable(told) {
  const head = ["Time", `${told.label} by itself`, "Most probable"].map((name) => element("th", { scope: "col", textContent: name }));
  const rows = told.steps.map((step) => element("tr", {},
    element("td", { textContent: `${seconds(step.start)} to ${seconds(step.end)}` }),
    element("td", { className: "n", textContent: percent(step.probability) }),
    element("td", { textContent: `${step.classes[0][0]}, ${percent(step.classes[0][1])}` })));
  return element("details", {}, element("summary", { textContent: "Step by step" }),
    element("p", { className: "soft small", textContent: "What each step of the recurrent network says by itself." }),
    element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Recurrent steps" },
      element("table", { className: "list steps" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows))));
}

about();
})();
