// The picture: where the model's bytes are, and which of them are being read, live from the server.

import { $, call, events, h } from "./server.js";

const WIDTH = 360, TALL = 96, STRIP = 36, FRAMES = 120; // units of drawings; a minute of frames
const isStill = matchMedia("(prefers-reduced-motion: reduce)");
const STRIPS = [["tokens_per_s", "tokens/s", 1], ["gb_per_s", "GB/s from disk", 2], ["hit_percent", "% found in memory", 0]];
const EXPERT = { ".": ["on disk", [128, 128, 128, 45]], "-": ["in memory", [47, 101, 178, 150]], h: ["in memory when asked for", [96, 165, 250]],
  r: ["read ahead in time", [63, 185, 80]], l: ["read ahead, late", [240, 198, 116]], c: ["waited for", [248, 81, 73]] };
let plan = null, last = null, stop = null, isWanted = false;
let made = {}, past = {}; // elements that change, and the values of strips, by name

const mb = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
const count = (number) => number.toLocaleString("en");
const sum = (items, of = (item) => item) => items.reduce((all, item, i) => all + of(item, i), 0);

function s(tag, attributes = {}, ...children) { // an SVG element
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A rectangle; `says`: what is told of it when it is pointed at. */
const rect = (x, y, width, height, kind, says) =>
  Object.assign(s("rect", { x, y, width: Math.max(0, width), height: Math.max(0, height), class: kind }), { says });

/** [name, size, kind] side by side, `all` being the whole width. */
function row(pieces, all, y, height, says) {
  let x = 0;
  return pieces.filter(([, size]) => size).map(([name, size, kind]) => {
    const width = Math.max(1.5, size / all * WIDTH);
    x += width;
    return rect(x - width, y, width - 0.7, height, kind, () => says(name, size));
  });
}

/** A drawing below its title and a value that changes. */
function figure(name, title, height, ...children) {
  made[name] = h("b");
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title }, ...children);
  return h("figure", {}, h("figcaption", {}, title, made[name]), drawing);
}

const legend = (...kinds) => h("p", { className: "note" }, ...kinds.flatMap(([kind, name]) =>
  [s("svg", { viewBox: "0 0 10 10", class: "key" }, rect(0, 0, 10, 10, kind)), name]));

function where(part, i) {
  const held = last?.held[i] ?? 0;
  return held === 1 ? "in memory" : held ? `${(100 * held).toFixed(0)} % in memory` : part.tier.replace("memory", "disk");
}

/** The whole model, every area as large as its bytes: a column a layer, from the embedding to the head. */
function model() {
  const all = sum(plan.parts, (part) => part.bytes), columns = Map.groupBy(plan.parts, (part) => part.layer ?? part.part);
  const bars = s("g"), flashes = s("g"), line = s("path", { d: "M-1 1 1-1M0 4 4 0M3 5 5 3", class: "hatch" });
  let x = 0;
  for (const column of columns.values()) {
    const size = sum(column, (part) => part.bytes), width = size / all * WIDTH;
    let y = TALL;
    for (const part of column) {
      const height = part.bytes / size * TALL, i = plan.parts.indexOf(part), named = part.layer === null ? "" : `layer ${part.layer}, `;
      y -= height;
      part.place = [x, y, width - Math.min(0.8, width / 4), height - (column.length > 1 ? 0.8 : 0)];
      const says = () => `${named}${part.part}: ${mb(part.bytes)}, ${where(part, i)}, ${mb(last.read_bytes[i] / last.seconds)}/s read`;
      part.bar = rect(...part.place, "held", says);
      part.flash = rect(...part.place, "flash");
      bars.append(rect(...part.place, "away", says), part.bar);
      flashes.append(part.flash);
    }
    x += width;
  }
  const pattern = s("pattern", { id: "disk", width: 4, height: 4, patternUnits: "userSpaceOnUse" }, rect(0, 0, 4, 4, "disk"), line);
  return figure("model", "Model, layer by layer", TALL, s("defs", {}, pattern), bars, flashes);
}

/** What is planned of the process's memory, the budget, and a mark at what it has now. */
function budget() {
  const { "keys and values": kv, reserve, ...fixed } = plan.fixed, all = Math.max(plan.budget_bytes, plan.planned_bytes);
  const pieces = [["weights", plan.held_bytes, "held"], ["keys and values", kv, "kv"], ...Object.entries(fixed).map(([name, size]) => [name, size, "fixed"])];
  made.now = Object.assign(s("path", { d: "M-4 0h8l-3.5 6v24h-1v-24z", class: "now" }), { says: () => `this process now: ${mb(last.process_bytes)}` });
  const edge = plan.budget_bytes / all * WIDTH;
  return figure("process", "This process and its budget", 32, rect(0, 8, edge, 20, "free", () => `left of the budget: ${mb(plan.budget_bytes - last.process_bytes)}`),
    ...row(pieces, all, 8, 20, (name, size) => `${name}: ${mb(size)} planned`), rect(edge - 1.5, 5, 1.5, 26, "edge"), made.now);
}

function experts() {
  const layers = plan.parts.filter(({ part }) => part === "experts");
  if (!layers.length) return [];
  made.heat = h("canvas", { width: layers[0].records, height: layers.length, role: "img", ariaLabel: "Experts across, layers down" });
  past.heat = layers.map(({ records }) => Array.from({ length: records }, () => ({ letter: ".", level: 0 })));
  made.heat.says = ({ offsetX, offsetY, target: { clientWidth, clientHeight } }) => {
    const y = Math.floor(offsetY / clientHeight * layers.length), x = Math.floor(offsetX / clientWidth * layers[0].records);
    return `layer ${layers[y]?.layer}, expert ${x}: ${EXPERT[last.experts[y]?.[x]]?.[0]}`;
  };
  const kinds = [["hit", "in memory"], ["ready", "read ahead"], ["late", "late"], ["edge", "waited for"]];
  return [h("figure", {}, h("figcaption", {}, "Experts across, layers down"), made.heat, legend(...kinds))];
}

function build() {
  const strips = STRIPS.map(([name, title]) => figure(name, title, STRIP, made[`${name} line`] = s("path", { class: "line" })));
  $("picture").replaceChildren(budget(), legend(["held", "weights"], ["kv", "keys, values"], ["fixed", "program"]), model(),
    legend(["held", "in memory"], ["away", "on disk"], ["flash-key", "being read"]), figure("kv", "Keys and values", 14, made.streams = s("g")),
    h("div", { className: "strips" }, ...strips, figure("drafts", "drafts right", STRIP, made.places = s("g"))), ...experts());
}

function paint(frame) {
  const { parts, budget_bytes: most, planned_bytes: planned } = plan, all = sum(parts, (part) => part.bytes);
  last = frame;
  parts.forEach((part, i) => {
    const [x, y, , height] = part.place, held = frame.held[i];
    part.bar.setAttribute("height", height * held);
    part.bar.setAttribute("y", y + height * (1 - held));
    part.flash.setAttribute("opacity", isStill.matches && frame.read_bytes[i] ? 0.6 : 0);
    if (isStill.matches || !frame.read_bytes[i]) return;
    part.flash.animate([{ opacity: 1 }, { opacity: 0 }], { duration: 420, delay: 420 * x / WIDTH, fill: "backwards" }); // in reading order
  });
  made.model.textContent = `${mb(all)}, ${(100 * sum(parts, (part, i) => part.bytes * frame.held[i]) / all).toFixed(0)} % in memory`;
  made.process.textContent = `${mb(frame.process_bytes)} of ${mb(most)}`;
  made.now.setAttribute("transform", `translate(${Math.min(1, frame.process_bytes / Math.max(most, planned)) * WIDTH} 0)`);
  const asked = frame.hits + frame.misses;
  strip("tokens_per_s", frame.tokens_per_s);
  strip("gb_per_s", sum(frame.read_bytes) / frame.seconds / 1e9);
  strip("hit_percent", asked ? 100 * frame.hits / asked : null, 100);
  streams(frame);
  const share = ([tried, right]) => tried && right / tried, wide = WIDTH / Math.max(6, frame.drafts.length);
  made.drafts.textContent = frame.drafts.length ? `${(100 * share(frame.drafts[0])).toFixed(0)} % of the first` : "none yet";
  made.places.replaceChildren(...frame.drafts.map((pair, i) => rect(i * wide, STRIP - 2 - 32 * share(pair), wide - 4, 32 * share(pair) + 1, "held",
    () => `draft token ${i + 1}: ${pair[1]} of ${pair[0]} were right`)));
  if (made.heat) heat(frame.experts);
}

function streams({ kv_room: free, kv_tokens: used, prefix_tokens: kept, streams: live, running, waiting }) {
  const room = free || plan.kv_tokens, pieces = live.map((one, i) => [`stream ${one.id} (${one.state})`, one.kv_tokens, i % 2 ? "kv odd" : "kv"]);
  if (!live.length) pieces.push(["all streams", used, "kv"]);
  made.streams.replaceChildren(rect(0, 0, WIDTH, 14, "free"), ...row([...pieces, ["kept for later prompts", kept, "prefix"]], room, 0, 14,
    (name, tokens) => `${name}: ${count(tokens)} tokens, ${mb(tokens * plan.kv_bytes_a_token)}`));
  made.kv.textContent = `${count(used + kept)} of ${count(room)} tokens${running ? `, ${running} running` : ""}${waiting ? `, ${waiting} waiting` : ""}`;
}

function strip(name, value, top) {
  const values = past[name] = [...(past[name] ?? []), value].slice(-FRAMES), most = top ?? Math.max(1e-3, ...values);
  const place = (v, i) => `${(WIDTH * (i + FRAMES - values.length) / (FRAMES - 1)).toFixed(1)} ${(STRIP - 2 - (STRIP - 4) * v / most).toFixed(1)}`;
  made[`${name} line`].setAttribute("d", values.map((v, i) => v === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${place(v, i)}`).join("") || "M0 0");
  made[name].textContent = value?.toFixed(STRIPS.find(([n]) => n === name)[2]) ?? "";
}

function heat(rows) {
  const context = made.heat.getContext("2d"), image = context.createImageData(made.heat.width, made.heat.height);
  past.heat.flat().forEach((cell, at) => {
    const letter = rows[Math.floor(at / image.width)][at % image.width], isAsked = !".-".includes(letter);
    cell.level = isAsked ? 1 : cell.level * 0.75; // fades
    if (isAsked || cell.level < 0.1) cell.letter = letter;
    const [red, green, blue, alpha = 60 + 195 * cell.level] = EXPERT[cell.letter][1];
    image.data.set([red, green, blue, alpha], 4 * at);
  });
  context.putImageData(image, 0, 0);
}

function twin() {
  const line = (tag, cells) => h("tr", {}, ...cells.map((words) => h(tag, {}, String(words))));
  const rows = plan?.parts.map((part, i) => line("td", [part.layer ?? "", part.part, mb(part.bytes), where(part, i), mb(last.read_bytes[i] / last.seconds)])) ?? [];
  $("twin").lastElementChild.replaceChildren(h("table", {}, h("thead", {}, line("th", ["layer", "part", "size", "where", "read a second"])), h("tbody", {}, ...rows)));
}

async function run(mine = stop = new AbortController()) {
  try {
    for await (const frame of events(await call("v1/live", { signal: mine.signal, silent: true }))) {
      if (!frame.held) { plan = null; $("picture").textContent = "The model is not in memory now."; continue; }
      if (!plan) {
        plan = await (await call("v1/placement", { signal: mine.signal, silent: true })).json();
        [made, past] = [{}, {}];
        build();
      }
      paint(frame);
    }
  } catch (problem) {
    if (problem.name === "AbortError") return;
    $("picture").textContent = problem.message;
    plan = null;
  }
  if (stop === mine) setTimeout(() => stop === mine && run(mine), 2000);
}

/** Show the picture live, or stop asking for it, as where nobody sees the page. */
export function watch(isOpen = isWanted) {
  isWanted = isOpen;
  stop = stop?.abort();
  if (isOpen && !document.hidden) run();
}

document.addEventListener("visibilitychange", () => watch());
$("memory").addEventListener("pointermove", (event) => { $("says").textContent = event.target.says?.(event) ?? "Point at anything for its numbers."; });
$("twin").addEventListener("toggle", ({ target }) => target.open && twin());
