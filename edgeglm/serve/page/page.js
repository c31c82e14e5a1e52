"use strict";
// Everything that comes from the server is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const state = { token: "", picture: null, running: null, serial: 0, info: null, last: null, samples: [], before: null, urls: [] };
const INLINE = 24, TYPING_MS = 220, POLL_MS = 1000, SAMPLES = 60;
const number = new Intl.NumberFormat("en");
const ms = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0)) + " ms";

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (state.token) headers.authorization = "Bearer " + state.token;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. It may have been stopped; start it and search again.");
  }
  if (answer.ok) return answer;
  let text = "";
  try { text = (await answer.json()).error; } catch { /* no JSON: the status must do */ }
  if (answer.status === 401) login();
  throw new Refused(answer.status, typeof text === "string" && text ? text : "The server answered " + answer.status + ".");
}

// Theme: the system's, until somebody chooses.
const dark = matchMedia("(prefers-color-scheme: dark)");
const kept = { get() { try { return localStorage.getItem("theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("theme", value); } catch { /* private window */ } } };
function showTheme() {
  const chosen = kept.get() || "auto";
  document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  $("theme").textContent = "Theme: " + chosen;
}
$("theme").addEventListener("click", () => {
  const order = ["auto", "light", "dark"];
  kept.set(order[(order.indexOf(kept.get() || "auto") + 1) % 3]);
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();

// A filter in words, as on the command line: kind=png price>=3
function whereFrom(text) {
  const where = {};
  for (const part of text.match(/(?:[^\s"]|"[^"]*")+/g) || []) {
    const match = /^([^=!<>]+)(!=|<=|>=|=|<|>)(.*)$/s.exec(part);
    if (!match) throw new Refused(0, "Cannot read the filter " + part + "; write it like kind=png or price<20.");
    let value = match[3];
    try { const found = JSON.parse(value); if (typeof found !== "object") value = found; } catch { /* a text */ }
    const signs = (where[match[1]] ??= {});
    if (match[2] === "=" || match[2] === "!=") (signs[match[2]] ??= []).push(value);
    else signs[match[2]] = value;
  }
  return where;
}

async function search() {
  const words = $("words").value.trim();
  if (!words && !state.picture) { clear(); return; }
  state.running?.abort();
  const running = (state.running = new AbortController());
  const began = performance.now();
  $("results").classList.add("stale");
  try {
    const where = whereFrom($("filter").value), k = Number($("count").value), inline = Math.min(k, INLINE);
    const filtered = Object.keys(where).length > 0;
    let answer;
    if (state.picture) {
      const query = new URLSearchParams({ k, inline });
      if (filtered) query.set("where", JSON.stringify(where));
      const kind = state.picture.type.startsWith("image/") ? state.picture.type : "image/unknown";
      answer = await ask("/v1/search?" + query, { method: "POST", body: state.picture, headers: { "content-type": kind }, signal: running.signal });
    } else {
      const body = JSON.stringify(filtered ? { text: words, k, inline, where } : { text: words, k, inline });
      answer = await ask("/v1/search", { method: "POST", body, headers: { "content-type": "application/json" }, signal: running.signal });
    }
    const found = await answer.json();
    if (state.running !== running) return;
    const all = performance.now() - began;
    $("trouble").textContent = "";
    show(found, all, words);
  } catch (error) {
    if (error.name === "AbortError" || state.running !== running) return;
    $("trouble").textContent = error instanceof Refused ? error.message : "Something went wrong: " + error.message;
    $("status").textContent = "";
  } finally {
    if (state.running === running) $("results").classList.remove("stale");
  }
}

function clear() {
  state.running?.abort();
  state.running = null;
  forgetUrls();
  replaceHits([]);
  $("results").classList.remove("stale");
  $("empty").hidden = false;
  $("status").textContent = $("trouble").textContent = "";
  remember("");
}

function remember(words) {
  const url = new URL(location.href);
  words ? url.searchParams.set("q", words) : url.searchParams.delete("q");
  history.replaceState(null, "", url);
}

function show(found, all, words) {
  const hits = found.hits, rows = found.searched.rows;
  forgetUrls();
  $("empty").hidden = true;
  replaceHits(hits.map(card));
  const what = state.picture ? "like your picture" : "for “" + words + "”";
  $("status").textContent = hits.length
    ? `${hits.length} of ${number.format(rows)} pictures ${what} in ${ms(all)}`
    : `Nothing ${what} among ${number.format(rows)} pictures passes the filter.`;
  remember(state.picture ? "" : words);
  const { embed, search: scan } = found.ms, parts = [embed, scan, Math.max(all - embed - scan, 0)];
  $("last").textContent = ms(all);
  [...$("split").children].forEach((part, i) => { part.style.width = (100 * parts[i]) / all + "%"; });
  $("split").setAttribute("aria-label", `Embedding ${ms(parts[0])}, search ${ms(parts[1])}, pictures and way ${ms(parts[2])}`);
  document.documentElement.dataset.shown = ++state.serial;
  facts(found.edgeglm, found.searched);
}

// Who stands on a result stays there: on the same picture, or else on the same place, or else on the words.
function replaceHits(items) {
  const held = document.activeElement, hits = () => [...$("results").querySelectorAll(".hit")];
  const place = hits().indexOf(held);
  $("results").replaceChildren(...items);
  if (place < 0) return;
  const now = hits();
  (now.find((one) => one.title === held.title) || now[Math.min(place, now.length - 1)] || $("words")).focus({ preventScroll: true });
}

function card(hit) {
  const item = made("li"), button = made("button", "hit"), tile = made("span", "tile");
  button.type = "button";
  const name = hit.text || hit.metadata?.name || hit.id;
  button.title = hit.id;
  if (typeof hit.picture === "string" && hit.picture.startsWith("/v1/pictures/")) {
    const image = made("img");
    image.alt = "";
    image.decoding = "async";
    image.addEventListener("error", () => tile.replaceChildren("no picture"));
    if (typeof hit.data === "string" && hit.data.startsWith("data:image/")) image.src = hit.data;
    else pictureUrl(hit.picture).then((url) => { image.src = url; }, () => tile.replaceChildren("no picture"));
    tile.append(image);
    button.addEventListener("click", () => like(hit.picture, name));
  } else {
    tile.textContent = "no picture";
    button.disabled = false;
    button.addEventListener("click", () => { $("words").value = name; forget(); search(); });
  }
  const score = made("span", "score"), meter = made("span", "meter"), bar = made("i");
  bar.style.width = Math.round(100 * Math.min(Math.max(hit.score, 0), 1)) + "%";
  meter.append(bar);
  score.append(meter, made("span", "hidden", "score "), made("span", "", hit.score.toFixed(3)));
  const label = made("span", "name", name);
  button.append(tile, made("span", "hidden", hit.rank + ": "), label, score, made("span", "hidden", "find pictures like it"));
  item.append(button);
  return item;
}

async function pictureUrl(path) {
  if (!state.token) return path;
  const url = URL.createObjectURL(await (await ask(path)).blob());  // an <img> sends no token
  state.urls.push(url);
  return url;
}

function forgetUrls() {
  state.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
}

async function like(path, name) {
  try {
    take(await (await ask(path)).blob(), name);
  } catch (error) {
    $("trouble").textContent = error.message;
  }
}

function take(blob, name) {
  forget();
  state.picture = blob;
  $("asked-picture").src = URL.createObjectURL(blob);
  $("asked-name").textContent = name || "your picture";
  $("asked").hidden = false;
  $("words").value = "";
  scrollTo({ top: 0 });
  search();
}

function forget() {
  if (!state.picture) return;
  URL.revokeObjectURL($("asked-picture").src);
  $("asked-picture").removeAttribute("src");
  state.picture = null;
  $("asked").hidden = true;
}

function firstPicture(items) {
  return [...(items || [])].find((file) => file.type.startsWith("image/")) || null;
}

let typing = 0;
$("words").addEventListener("input", () => {
  if ($("words").value.trim()) forget();
  clearTimeout(typing);
  typing = setTimeout(search, TYPING_MS);
});
$("search").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(typing); search(); });
$("count").addEventListener("change", search);
$("filter").addEventListener("change", search);
$("forget").addEventListener("click", () => { forget(); clear(); $("words").focus(); });
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (file) take(file, file.name);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const file = firstPicture(event.clipboardData?.files);
  if (file) { event.preventDefault(); take(file, "pasted picture"); }
});
let depth = 0;
const carriesFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
addEventListener("dragenter", (event) => { if (carriesFile(event)) { depth++; $("drop").hidden = false; event.preventDefault(); } });
addEventListener("dragover", (event) => { if (carriesFile(event)) event.preventDefault(); });
addEventListener("dragleave", () => { depth = Math.max(depth - 1, 0); if (!depth) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  depth = 0;
  $("drop").hidden = true;
  if (!carriesFile(event)) return;
  event.preventDefault();
  const file = firstPicture(event.dataTransfer.files);
  if (file) take(file, file.name);
  else $("trouble").textContent = "That is no picture; drop a PNG, JPEG or WebP file.";
});

// Arrows walk through the results; "/" goes to the words.
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("words").focus();
    return;
  }
  const buttons = [...$("results").querySelectorAll(".hit")];
  const at = buttons.indexOf(document.activeElement);
  if (!buttons.length || (at < 0 && !(event.key === "ArrowDown" && document.activeElement === $("words")))) return;
  const top = buttons[0].offsetTop, across = Math.max(buttons.findIndex((one) => one.offsetTop > top), 1);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: at < 0 ? 1 : across, ArrowUp: -across }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (at + step < 0) $("words").focus();
  else buttons[Math.min(at + step, buttons.length - 1)].focus();
});

function facts(edgeglm, searched) {
  const rows = [
    ["Bundle", edgeglm.bundle], ["Digest", edgeglm.digest], ["Target", edgeglm.target], ["Precision", edgeglm.precision],
    ["Runs on", edgeglm.engine], ["edgeglm", edgeglm.version], ["Space", edgeglm.space],
    ...Object.entries(edgeglm.models || {}).map(([tower, digest]) => [tower + " model", digest]),
  ];
  if (searched) rows.push(["Searches", searched.name], ["Pictures", number.format(searched.rows)]);
  const text = JSON.stringify(rows);
  if (state.factsText === text) return;
  state.factsText = text;
  state.facts = { ...edgeglm, searched };
  $("facts").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => {
    const digest = /^[0-9a-f]{64}$/.test(value), shown = made("dd", digest ? "digest" : "", digest ? value.slice(0, 12) + "…" : value);
    if (digest) shown.title = value;
    return [made("dt", "", name), shown];
  }));
  $("which").textContent = [edgeglm.bundle, edgeglm.precision, searched ? number.format(searched.rows) + " pictures" : ""].filter(Boolean).join(" · ");
  $("filter-label").hidden = !searched || searched.name === "gallery";
}

$("copy").addEventListener("click", async () => {
  const report = JSON.stringify({ ...state.facts, page: location.origin, browser: navigator.userAgent }, null, 1);
  try {
    await navigator.clipboard.writeText(report);
    $("copy").textContent = "Copied";
  } catch {  // no clipboard outside of a secure context: select it for the reader
    $("trouble").textContent = report;
  }
  setTimeout(() => { $("copy").textContent = "Copy for a bug report"; }, 2000);
});

// Charts: the last minute, one sample a second, while somebody looks.
function drawn(svg, series, top) {
  const x = (i, n) => ((300 * (i + SAMPLES - n)) / (SAMPLES - 1)).toFixed(1), y = (value) => (74 - (70 * value) / top).toFixed(1);
  const lines = svg.querySelectorAll(".line");
  series.forEach((values, s) => {
    const points = values.map((value, i) => (value === null ? null : `${x(i, values.length)} ${y(value)}`)).filter(Boolean);
    lines[s].setAttribute("d", points.length > 1 ? "M" + points.join("L") : "");
    if (s === 0) svg.querySelector(".area").setAttribute("d", points.length > 1 ? `M${points.join("L")}L${points.at(-1).split(" ")[0]} 76L${points[0].split(" ")[0]} 76Z` : "");
  });
}

const rounded = (value) => { const unit = 10 ** Math.floor(Math.log10(value)); return [1, 2, 5, 10].find((n) => n * unit >= value) * unit; };

function charts() {
  const median = state.samples.map((one) => one.p50), late = state.samples.map((one) => one.p99), rate = state.samples.map((one) => one.rate);
  const now = state.samples.at(-1);
  const highest = rounded(Math.max(1, ...late.filter((value) => value !== null))), most = rounded(Math.max(1, ...rate));
  drawn($("latency"), [median, late], highest);
  drawn($("rate"), [rate], most);
  $("latency-scale").textContent = "top " + number.format(highest) + " ms";
  $("rate-scale").textContent = "top " + number.format(most) + "/s";
  $("rate-now").textContent = `${number.format(now.rate < 10 ? Math.round(10 * now.rate) / 10 : Math.round(now.rate))}/s`;
  if (now.p50 !== null) {
    $("latency-now").textContent = `${ms(now.p50)}, 99 % in ${ms(now.p99)}`;
    $("latency").setAttribute("aria-label", `Latency over the last minute: median ${ms(now.p50)}, 99th percentile ${ms(now.p99)}`);
  }
  $("rate").setAttribute("aria-label", `Answers per second over the last minute: now ${Math.round(now.rate)}`);
}

async function poll() {
  if (document.visibilityState === "visible" && !$("login").open) {
    try {
      const stats = await (await ask("/v1/stats")).json(), at = performance.now(), { answered, latency_ms: latency } = stats.runner;
      const before = state.before;
      const rate = before && answered >= before.answered ? (1000 * (answered - before.answered)) / (at - before.at) : 0;
      state.before = { answered, at };
      state.samples.push({ p50: latency.p50 ?? null, p99: latency.p99 ?? null, rate });
      if (state.samples.length > SAMPLES) state.samples.shift();
      charts();
      facts(stats.edgeglm, stats.searched);
    } catch { /* the next one may come through; a search says what is wrong */ }
  }
  setTimeout(poll, POLL_MS);
}

function login() {
  if (!$("login").open) $("login").showModal();
}
$("login-form").addEventListener("submit", () => {
  state.token = $("token").value;
  $("token").value = "";
  search();
});

const asked = new URLSearchParams(location.search).get("q");
if (asked) { $("words").value = asked; search(); }
poll();
