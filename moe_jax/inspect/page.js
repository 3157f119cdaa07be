"use strict";

const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const CHOICES = new Int16Array(bytes(D.choices).buffer); // [layer][token][rank]
const WEIGHTS = bytes(D.weights);
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const state = { layer: 0, rank: 0, picked: null, pair: [0, 0] };

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// Texts of the data become text nodes here and nowhere else.
function make(tag, text = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const percent = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const piece = (position) => D.pieces.texts[D.pieces.at[position]];
const choice = (position, rank) => CHOICES[(state.layer * D.shown + position) * D.chosen + rank];
const look = (expert) => `look h${expert % 8} s${Math.floor(expert / 8) % 4}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const together = (layer, i, j) => D.pairs[layer][Math.max(i, j)][Math.min(i, j)];

function options(select, names, changed) {
  select.replaceChildren(...names.map((name, i) => make("option", name, { value: i })));
  select.addEventListener("change", () => changed(Number(select.value)));
}

// The heat map

function drawMap() {
  const most = Math.max(...D.experts);
  const step = most <= 16 ? 1 : most <= 64 ? 8 : 16;
  const head = make("tr");
  head.append(make("th"));
  for (let e = 0; e < most; e += step) head.append(make("th", e, { colspan: Math.min(step, most - e), scope: "col" }));
  const top = make("thead"), body = make("tbody");
  top.append(head);
  D.layers.forEach((number, l) => {
    const row = make("tr");
    row.append(make("th", number, { scope: "row" }));
    for (let e = 0; e < D.experts[l]; e++) {
      row.append(make("td", "", { "data-layer": l, "data-expert": e, tabindex: l + e ? -1 : 0, role: "gridcell",
        "aria-label": `layer ${number}, expert ${e}` }));
    }
    body.append(row);
  });
  $("map").style.setProperty("--wide", `${Math.max(7, Math.min(34, Math.floor(760 / most)))}px`);
  $("map").style.setProperty("--high", `${Math.max(13, Math.min(34, Math.floor(520 / D.layers.length)))}px`);
  $("map").replaceChildren(top, body);
  for (const event of ["mouseover", "focusin"]) {
    $("map").addEventListener(event, ({ target }) => target.dataset.expert && showDetail(...place(target)));
  }
  $("map").addEventListener("click", ({ target }) => target.dataset.expert && pickIn(...place(target)));
  $("map").addEventListener("keydown", walk);
}

const place = (cell) => [Number(cell.dataset.layer), Number(cell.dataset.expert)];
const cellAt = (layer, expert) => $("map").querySelector(`td[data-layer="${layer}"][data-expert="${expert}"]`);

function walk(event) {
  const [layer, expert] = place(event.target);
  const [down, right] = MOVES[event.key] ?? [0, 0];
  if (event.key === "Enter" || event.key === " ") pickIn(layer, expert);
  else if (!MOVES[event.key]) return;
  event.preventDefault();
  const next = cellAt(layer + down, Math.min(expert + right, (D.experts[layer + down] ?? 1) - 1));
  if (next) rove(next).focus();
}

function rove(cell) {
  $("map").querySelector('td[tabindex="0"]').tabIndex = -1;
  cell.tabIndex = 0;
  return cell;
}

function colourMap(metric) {
  const { values, help } = D.metrics[metric];
  $("meaning").textContent = help;
  for (const cell of $("map").querySelectorAll("td")) {
    const [layer, expert] = place(cell);
    const ratio = values[layer][expert];
    const t = Math.max(-1, Math.min(1, Math.log2(ratio) / 2));
    cell.classList.toggle("unused", ratio === 0);
    const colour = `color-mix(in oklab, var(--${t > 0 ? "over" : "under"}) ${(100 * Math.abs(t)).toFixed(0)}%, var(--fair))`;
    cell.style.background = ratio === 0 ? "" : colour;
  }
}

function showDetail(layer, expert) {
  const [frequent, typical, contexts] = D.cells[layer][expert];
  const count = D.counts[layer][expert], all = sum(D.counts[layer]);
  const facts = make("dl");
  const fact = (name, value) => facts.append(make("dt", name), make("dd", value));
  fact("choices", `${count} of ${all} (${percent(count / Math.max(all, 1))})`);
  for (const { name, values, unit } of D.metrics) fact(name, `${values[layer][expert].toFixed(2)} ${unit}`);
  fact("mean weight", D.meanWeights[layer][expert].toFixed(3));
  const near = partners(layer, expert).slice(0, 3);
  if (near.length) fact("together with", near.map(([e, part]) => `${e} (${percent(part)})`).join(", "));
  const lists = make("div", "", { class: "tokens" });
  lists.append(tokenList("most frequent", frequent), tokenList("most typical", typical));
  const places = contexts.map(([position, weight]) => contextLine(position, weight));
  const parts = [make("h3", `Layer ${D.layers[layer]}, expert ${expert}`), facts];
  if (frequent.length) parts.push(lists, make("h4", "with the largest weights"), ...places);
  else parts.push(make("p", count ? `None of the first ${D.kept} tokens came to it.` : "No token came to it."));
  $("detail").replaceChildren(...parts);
}

function tokenList(title, tokens) {
  const box = make("div"), table = make("table");
  box.append(make("h4", title), table);
  for (const [text, count, lift] of tokens) {
    const row = table.insertRow();
    row.title = `${count} times, ${lift} × as often as in the text`;
    row.append(make("td", visible(text)), make("td", count), make("td", `${lift.toFixed(1)}×`));
  }
  return box;
}

function contextLine(position, weight) {
  const line = make("p", "", { class: "context", title: `token ${position}, weight ${weight}` });
  const from = Math.max(0, position - D.reach), to = Math.min(D.kept, position + D.reach + 1);
  const words = (a, b) => Array.from({ length: b - a }, (_, i) => piece(a + i)).join("").replaceAll(/\s+/g, " ");
  line.append(words(from, position), make("mark", piece(position) || "∅"), words(position + 1, to));
  return line;
}

function partners(layer, expert) {
  const count = Math.max(D.counts[layer][expert], 1);
  const parts = D.counts[layer].map((_, e) => [e, e === expert ? 0 : together(layer, expert, e) / count]);
  return parts.filter(([, part]) => part > 0).sort((a, b) => b[1] - a[1]);
}

// The text

function drawText() {
  const spans = Array.from({ length: D.shown }, (_, i) => make("span", piece(i), { "data-at": i }));
  $("text").replaceChildren(...spans);
  $("text").addEventListener("click", ({ target }) => {
    if (target.dataset.at && choice(target.dataset.at, state.rank) >= 0) pick(choice(target.dataset.at, state.rank));
  });
  $("text").addEventListener("mouseover", ({ target }) => target.dataset.at && showToken(Number(target.dataset.at)));
}

function showToken(position) {
  const base = (state.layer * D.shown + position) * D.chosen;
  const served = Array.from({ length: D.chosen }, (_, r) => [CHOICES[base + r], WEIGHTS[base + r] * D.unit]);
  const shown = served.filter(([e]) => e >= 0).map(([e, weight]) => `${e} (${weight.toFixed(2)})`);
  $("hover").textContent = `Token ${position} “${visible(piece(position))}”: experts ${shown.join(", ") || "none"}`;
}

function colourText() {
  let hits = 0;
  for (const span of $("text").children) {
    const at = Number(span.dataset.at);
    let expert = choice(at, state.rank);
    if (state.picked !== null) {
      const base = (state.layer * D.shown + at) * D.chosen;
      expert = CHOICES.subarray(base, base + D.chosen).includes(state.picked) ? state.picked : -1;
    }
    hits += expert >= 0;
    span.className = expert >= 0 ? look(expert) : "off";
    if (expert >= 0) span.dataset.expert = expert;
    else delete span.dataset.expert;
  }
  const limit = D.shown < D.tokens ? `first ${D.shown} of ${D.tokens} tokens` : `${D.tokens} tokens`;
  $("count").textContent = state.picked === null ? limit : `${hits} of the ${limit} go to expert ${state.picked}`;
  $("clear").disabled = state.picked === null;
}

function drawLegend() {
  const chips = D.counts[state.layer].map((count, e) => {
    const chip = make("button", e, { type: "button", class: look(e), title: `expert ${e}: ${count} tokens` });
    chip.setAttribute("aria-pressed", e === state.picked);
    chip.addEventListener("click", () => pick(e));
    return chip;
  });
  $("legend").replaceChildren(...chips);
}

function pick(expert) {
  state.picked = expert === state.picked ? null : expert;
  [...$("legend").children].forEach((chip, e) => chip.setAttribute("aria-pressed", e === state.picked));
  $("map").querySelector(".pinned")?.classList.remove("pinned");
  if (state.picked !== null) {
    rove(cellAt(state.layer, state.picked)).classList.add("pinned");
    showDetail(state.layer, state.picked);
    movePair(state.picked, state.pair[1]);
  }
  colourText();
}

function pickIn(layer, expert) {
  if (layer !== state.layer) setLayer(layer);
  pick(expert);
}

function setLayer(layer) {
  state.layer = layer;
  state.picked = null;
  $("map").querySelector(".pinned")?.classList.remove("pinned");
  $("layer").value = layer;
  drawLegend();
  colourText();
  drawPairs();
  movePair(0, 1);
}

// Co-activation

const cellSize = () => Math.max(4, Math.min(40, Math.floor(640 / D.experts[state.layer])));

function rgb(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function drawPairs() {
  const experts = D.experts[state.layer], size = cellSize(), sharp = window.devicePixelRatio || 1, canvas = $("pairs");
  $("pairs-layer").textContent = D.layers[state.layer];
  canvas.width = canvas.height = experts * size * sharp;
  canvas.style.width = `${experts * size}px`;
  const context = canvas.getContext("2d"), low = rgb("--fair"), high = rgb("--most"), page = rgb("--page");
  const part = (i, j) => together(state.layer, i, j) / Math.max(D.counts[state.layer][i], 1);
  let most = 1e-9;
  for (let i = 0; i < experts; i++) for (let j = 0; j < experts; j++) if (i !== j) most = Math.max(most, part(i, j));
  $("pairs-most").textContent = percent(most);
  for (let i = 0; i < experts; i++) {
    for (let j = 0; j < experts; j++) {
      const t = part(i, j) / most;
      context.fillStyle = `rgb(${i === j ? page : low.map((c, k) => Math.round(c + t * (high[k] - c)))})`;
      context.fillRect(j * size * sharp, i * size * sharp, size * sharp - (size > 6), size * sharp - (size > 6));
    }
  }
}

function movePair(row, column) {
  const layer = state.layer, last = D.experts[layer] - 1;
  const [i, j] = state.pair = [row, column].map((e) => Math.max(0, Math.min(last, e)));
  const count = D.counts[layer][i], both = together(layer, i, j);
  const share = `${both} tokens (${percent(both / Math.max(count, 1))})`;
  $("pair").textContent = i === j ? `Expert ${i} serves ${count} tokens.`
    : `Of the ${count} tokens of expert ${i}, expert ${j} serves ${share}.`;
  const near = partners(layer, i).slice(0, 8);
  const none = D.chosen === 1 ? "One expert per token: there are no pairs." : "It shares no token.";
  $("closest").replaceChildren(...near.map(([e, part]) => make("li", `expert ${e}: ${percent(part)}`)));
  if (!near.length) $("closest").replaceChildren(none);
}

$("pairs").addEventListener("mousemove", ({ offsetX, offsetY }) => {
  const size = $("pairs").clientWidth / D.experts[state.layer];
  movePair(Math.floor(offsetY / size), Math.floor(offsetX / size));
});
$("pairs").addEventListener("keydown", (event) => {
  if (!MOVES[event.key]) return;
  event.preventDefault();
  movePair(...MOVES[event.key].map((step, axis) => state.pair[axis] + step));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPairs);

// The table, and the first drawing

function drawTable() {
  const head = make("tr");
  head.append(...D.table.head.map((name) => make("th", name, { scope: "col" })));
  const rows = D.table.rows.map((values) => {
    const row = make("tr");
    row.append(...values.map((value) => make("td", value)));
    return row;
  });
  $("layers").replaceChildren(head, ...rows);
}

document.title = `Routing of ${D.title}`;
$("title").textContent = document.title;
const kinds = [...new Set(D.experts)].sort((a, b) => a - b).join(" or ");
const about = [`${D.tokens} tokens`, `${D.layers.length} MoE layers of ${kinds} experts`, `${D.chosen} per token`];
if (D.kept < D.tokens) about.push(`examples from the first ${D.kept} tokens`);
if (D.other) about.push(`compared with ${D.other}`);
$("about").textContent = about.join(" · ");
$("drift-help").hidden = !D.other;
options($("metric"), D.metrics.map(({ name }) => name), colourMap);
options($("layer"), D.layers, setLayer);
options($("rank"), Array.from({ length: D.chosen }, (_, r) => `${r + 1}`), (rank) => { state.rank = rank; colourText(); });
$("clear").addEventListener("click", () => state.picked !== null && pick(state.picked));
document.addEventListener("keydown", ({ key }) => key === "Escape" && state.picked !== null && pick(state.picked));
drawMap();
colourMap(0);
drawTable();
drawText();
setLayer(0);
showDetail(0, D.counts[0].indexOf(Math.max(...D.counts[0])));
