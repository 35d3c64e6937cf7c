// The picture: where the model's bytes are, and which of them are being read, live from the server.
import { $, call, events, h } from "./server.js";
const WIDTH = 360, TALL = 96, STRIP = 72, FRAMES = 120; // units of drawings; a minute of frames
const isStill = matchMedia("(prefers-reduced-motion: reduce)");
const STRIPS = [["tokens", "tokens/s", 1, 1], ["read", "GB/s from disk", 2, 0.01], ["hits", "% found in memory", 0, 100]]; // digits, least top
const EXPERT = { ".": ["on disk", [128, 128, 128, 45]], "-": ["in memory", [47, 101, 178, 150]], h: ["in memory when asked for", [96, 165, 250, 255]],
  r: ["read ahead in time", [63, 185, 80, 255]], l: ["read ahead, late", [240, 198, 116, 255]], c: ["waited for", [248, 81, 73, 255]] };
let plan = null, last = null, stop = null, isWanted = false, made = {}, past = {}; // elements that change, and strips' values, by name
const mb = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
const sum = (items, of = (item) => item) => items.reduce((all, item, i) => all + of(item, i), 0);
const set = (element, attributes) => { for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value); };
function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}
/** A rectangle; `says`: what is told of it when it is pointed at. */
const rect = (x, y, width, height, kind, says) => Object.assign(s("rect", { x, y, width, height, class: kind }), { says });
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
const figure = (name, title, height, ...children) => h("figure", {}, h("figcaption", {}, title, made[name] = h("b")),
  s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title }, ...children));
const legend = (kinds) => h("p", { className: "note" }, ...Object.entries(kinds).flatMap(([kind, name]) =>
  [s("svg", { viewBox: "0 0 10 10", class: "key" }, rect(0, 0, 10, 10, kind)), name]));
function facts(part, i) { // [where it is, MB/s read]
  const held = last.held[i], tier = part.tier.replace("memory", "disk");
  return [held === 1 ? "in memory" : held ? `${(100 * held).toFixed(0)} % in memory` : tier, mb(last.read_bytes[i] / last.seconds)];
}
/** The whole model, every area as large as its bytes, from the embedding to the head. */
function model() {
  const all = sum(plan.parts, (part) => part.bytes), bars = s("g"), flashes = s("g");
  let x = 0;
  for (const column of Map.groupBy(plan.parts, (part) => part.layer ?? part.part).values()) { // a layer each
    const size = sum(column, (part) => part.bytes), width = size / all * WIDTH;
    let y = TALL;
    for (const part of column) {
      const height = part.bytes / size * TALL, i = plan.parts.indexOf(part), named = part.layer === null ? "" : `layer ${part.layer}, `;
      y -= height;
      part.place = [x, y, width - Math.min(0.8, width / 4), Math.max(0, height - (column.length > 1 && 0.8))];
      const says = () => `${named}${part.part}: ${mb(part.bytes)}, ${facts(part, i).join(", ")}/s read`;
      bars.append(rect(...part.place, "away", says), part.bar = rect(...part.place, "held", says));
      flashes.append(part.flash = rect(...part.place, "flash"));
    }
    x += width;
  }
  const hatch = s("path", { d: "M-1 1 1-1M0 4 4 0M3 5 5 3", class: "hatch" });
  const pattern = s("pattern", { id: "disk", width: 4, height: 4, patternUnits: "userSpaceOnUse" }, rect(0, 0, 4, 4, "disk"), hatch);
  return figure("model", "Model, layer by layer", TALL, s("defs", {}, pattern), bars, flashes);
}
/** What is planned of the process's memory, the budget, and a mark at what it has now. */
function budget() {
  const { "keys and values": kv, reserve, ...fixed } = plan.fixed, all = Math.max(plan.budget_bytes, plan.planned_bytes);
  const edge = plan.budget_bytes / all * WIDTH, others = Object.entries(fixed).map(([name, size]) => [name, size, "fixed"]);
  const pieces = row([["weights", plan.held_bytes, "held"], ["keys and values", kv, "kv"], ...others], all, 8, 20, (name, size) => `${name}: ${mb(size)} planned`);
  made.now = s("path", { d: "M-4 0h8l-3.5 6v24h-1v-24z", class: "now" });
  return figure("process", "This process and its budget", 32, rect(0, 8, edge, 20, "free", () => "left free"), ...pieces, rect(edge - 1.5, 5, 1.5, 26, "edge"), made.now);
}
function experts() {
  const layers = plan.parts.filter(({ part }) => part === "experts"), [width, height] = [layers[0]?.records, layers.length];
  if (!height) return [];
  made.heat = h("canvas", { width, height, role: "img", ariaLabel: "Experts across, layers down" });
  made.heat.says = ({ offsetX, offsetY, target }) => {
    const y = Math.floor(offsetY / target.clientHeight * height), x = Math.floor(offsetX / target.clientWidth * width);
    return `layer ${layers[y]?.layer}, expert ${x}: ${EXPERT[last.experts[y]?.[x]]?.[0]}`;
  };
  const key = legend({ held: "in memory", ready: "read ahead", late: "late", edge: "waited for" });
  return [h("figure", {}, h("figcaption", {}, "Experts across, layers down"), made.heat, key)];
}
function build(placement) {
  [plan, made, past] = [placement, {}, {}];
  const strips = STRIPS.map(([name, title]) => figure(name, title, STRIP, made[`${name} line`] = s("path", { class: "line" })));
  $("picture").replaceChildren(budget(), legend({ held: "weights", kv: "keys, values", fixed: "program" }), model(),
    legend({ held: "in memory", away: "on disk", "flash-key": "being read" }), figure("kv", "Keys and values", 14, made.streams = s("g")),
    h("div", { className: "strips" }, ...strips, figure("drafts", "drafts right", STRIP, made.places = s("g"))), ...experts());
}
function paint(frame) {
  const { parts, budget_bytes: most, planned_bytes: planned } = plan, all = sum(parts, (part) => part.bytes), asked = frame.hits + frame.misses;
  last = frame;
  parts.forEach((part, i) => {
    const [x, y, , height] = part.place, held = frame.held[i], isRead = frame.read_bytes[i] > 0, timing = { duration: 420, delay: 420 * x / WIDTH };
    set(part.bar, { height: height * held, y: y + height * (1 - held) });
    set(part.flash, { opacity: isStill.matches && isRead ? 0.6 : 0 });
    if (isRead && !isStill.matches) part.flash.animate([{ opacity: 1 }, { opacity: 0 }], timing); // in reading order
  });
  made.model.textContent = `${mb(all)}, ${(100 * sum(parts, (part, i) => part.bytes * frame.held[i]) / all).toFixed(0)} % in memory`;
  made.process.textContent = `${mb(frame.process_bytes)} of ${mb(most)}`;
  set(made.now, { transform: `translate(${Math.min(1, frame.process_bytes / Math.max(most, planned)) * WIDTH} 0)` });
  const values = [frame.tokens_per_s, sum(frame.read_bytes) / frame.seconds / 1e9, asked ? 100 * frame.hits / asked : null];
  STRIPS.forEach((kind, i) => strip(...kind, values[i]));
  for (const show of [streams, drafts, heat]) show(frame);
}
function streams({ kv_room: free, kv_tokens: used, prefix_tokens: kept, streams: live, running, waiting }) {
  const room = free || plan.kv_tokens, pieces = live.map((one, i) => [`stream ${one.number} (${one.state})`, one.kv_tokens, i % 2 ? "kv odd" : "kv"]);
  made.streams.replaceChildren(rect(0, 0, WIDTH, 14, "free", () => "room"), ...row([...pieces, ["kept for later prompts", kept, "prefix"]], room, 0, 14,
    (name, tokens) => `${name}: ${tokens.toLocaleString("en")} tokens, ${mb(tokens * plan.kv_bytes_a_token)}`));
  const counts = [[running, "running"], [waiting, "waiting"]].filter(([n]) => n).map((words) => `, ${words.join(" ")}`);
  made.kv.textContent = `${used.toLocaleString("en")} of ${room.toLocaleString("en")} tokens${counts.join("")}`;
}
function strip(name, title, digits, top, value) {
  const values = past[name] = [...(past[name] ?? []), value].slice(-FRAMES), most = Math.max(top, ...values);
  const place = (v, i) => `${(WIDTH * (i + FRAMES - values.length) / (FRAMES - 1)).toFixed(1)} ${(STRIP - 4 - (STRIP - 8) * v / most).toFixed(1)}`;
  set(made[`${name} line`], { d: values.map((v, i) => v === null ? "" : (i && values[i - 1] !== null ? "L" : "M") + place(v, i)).join("") });
  made[name].textContent = value?.toFixed(digits) ?? "";
}
function drafts({ drafts: pairs }) { // [tried, right] by place in a draft
  const share = ([tried, right]) => tried && right / tried, wide = WIDTH / Math.max(6, pairs.length), size = STRIP - 4;
  made.drafts.textContent = pairs.length ? `${(100 * share(pairs[0])).toFixed(0)} %` : "none yet";
  made.places.replaceChildren(...pairs.map((pair, i) => rect(i * wide, STRIP - 2 - size * share(pair), wide - 4, size * share(pair) + 1, "held",
    () => `draft token ${i + 1}: ${pair[1]} of ${pair[0]} were right`)));
}
function heat({ experts: rows }) {
  const context = made.heat?.getContext("2d"), image = context?.createImageData(made.heat.width, made.heat.height);
  [...rows.join("")].forEach((letter, at) => image.data.set(EXPERT[letter][1], 4 * at));
  context?.putImageData(image, 0, 0);
}
function twin() {
  const line = (tag, ...cells) => h("tr", {}, ...cells.map((words) => h(tag, {}, `${words ?? ""}`)));
  const rows = plan?.parts.map((part, i) => line("td", part.layer, part.part, mb(part.bytes), ...facts(part, i))) ?? [];
  const head = h("thead", {}, line("th", "layer", "part", "size", "where", "read a second"));
  $("twin").lastElementChild.replaceChildren(h("table", {}, head, h("tbody", {}, ...rows)));
}
async function run(mine = stop = new AbortController()) {
  const options = { signal: mine.signal, silent: true };
  const nothing = (words) => { plan = null; $("picture").textContent = words; };
  try {
    for await (const frame of events(await call("v1/live", options))) {
      if (frame.held && !plan) build(await (await call("v1/placement", options)).json());
      frame.held ? paint(frame) : nothing("The model is not in memory now.");
    }
  } catch (problem) {
    if (problem.name === "AbortError") return;
    nothing(problem.message);
  }
  setTimeout(() => stop === mine && run(mine), 2000);
}
/** Show the picture live, or stop asking for it, as where nobody sees the page. */
export function watch(isOpen = isWanted) {
  [isWanted, stop] = [isOpen, stop?.abort()];
  if (isOpen && !document.hidden) run();
}
addEventListener("visibilitychange", () => watch());
$("memory").addEventListener("pointermove", (event) => { $("says").textContent = event.target.says?.(event) ?? "Point at anything for its numbers."; });
$("twin").addEventListener("toggle", ({ target }) => target.open && twin());
