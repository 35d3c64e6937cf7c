// The chat: conversations kept in this browser, answers as they stream.

import { $, call, events, h, Refusal } from "./server.js";
import { writer } from "./markdown.js";
import { watch } from "./picture.js";

const KEPT = "outsize.chat.", SAMPLING = "outsize.sampling", SAVE_MS = 1000, NEAR = 80;
const isTouch = matchMedia("(pointer: coarse)").matches, isWide = () => innerWidth > 900;
const fresh = () => ({ id: crypto.randomUUID(), at: Date.now(), system: "", messages: [] });
let chat = fresh(), busy = null, saved = 0;

const button = (name, onclick, className = "") => h("button", { type: "button", onclick, className }, name);
const say = (words) => { $("status").textContent = words; }; // to screen readers

function tell(words = "", progress) {
  $("banner").hidden = !words;
  $("banner").replaceChildren(words, ...(progress === undefined ? [] : [h("progress", { value: progress, ariaLabel: "Loading" })]));
}

function toggle(id, open = $(id).hidden) {
  $(id).hidden = !open;
  $(`show-${id}`).ariaExpanded = String(open);
  if (id === "memory") watch(open);
}

// Conversations

function conversations() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(KEPT));
  return names.map((name) => JSON.parse(localStorage[name])).sort((a, b) => b.at - a.at);
}

function save(one = chat) {
  saved = performance.now();
  try { if (one.messages.length) localStorage[KEPT + one.id] = JSON.stringify(one); }
  catch { tell("This browser's storage is full, so this conversation goes with the page: delete others, or export all."); }
}

function list() {
  $("list").replaceChildren(...conversations().map((one) => {
    const title = one.messages[0].content.slice(0, 60), open = button(title, () => choose(one));
    open.ariaCurrent = String(one.id === chat.id);
    const remove = button("✕", () => {
      if (!confirm(`Delete “${title}”?`)) return;
      localStorage.removeItem(KEPT + one.id);
      one.id === chat.id ? choose(fresh()) : list();
    });
    remove.ariaLabel = `Delete “${title}”`;
    return h("li", {}, open, remove);
  }));
}

function choose(one) {
  busy?.abort();
  chat = one;
  history.replaceState(null, "", `#${chat.messages.length ? chat.id : ""}`);
  show();
  list();
  if (!isWide()) toggle("chats", false);
  if (!isTouch) $("box").focus();
}

function exportAll() {
  const text = JSON.stringify({ conversations: conversations() }, null, 1);
  const link = h("a", { download: "outsize-chats.json", href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function importAll(file) {
  const text = (x, otherwise) => { if (typeof x === "string") return x; if (otherwise === undefined) throw new TypeError(); return otherwise; };
  try {
    const found = JSON.parse(await file.text()).conversations.map(({ system, messages }) => ({ ...fresh(), system: text(system, ""),
      messages: messages.map((m) => ({ role: m.role === "user" ? "user" : "assistant", content: text(m.content), reasoning: text(m.reasoning, ""), finish: "stop" })) }));
    found.filter((one) => one.messages.length).forEach(save);
    say(`${found.length} conversations imported`);
  } catch { tell("That file holds no conversations: choose one that “Export all” made."); }
  list();
}

// Messages

/** One message on the page: made from what is kept, and added to while it streams. */
function view(message, at) {
  const isUser = message.role === "user", log = $("log"), text = h("div", { className: "text" }), foot = h("footer");
  const thought = h("div"), thinking = h("details", { className: "thinking", hidden: true }, h("summary", {}, "Thinking"), thought);
  const article = h("article", { className: message.role }, h("h2", { className: "sr" }, isUser ? "You" : "Answer"), thinking, text, foot);
  const out = isUser ? { write: (piece) => text.append(piece), end() {} } : writer(text);
  let content = "", reasoning = "", frame = 0;
  const flush = () => { // once a frame, however many pieces come
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    if (content) out.write(content);
    if (reasoning) thought.append(reasoning);
    thinking.hidden &&= !reasoning;
    content = reasoning = "";
    frame = 0;
    if (follows) log.scrollTop = log.scrollHeight;
  };
  const add = (more, thoughts = "") => {
    content += more;
    reasoning += thoughts;
    frame ||= requestAnimationFrame(flush);
  };
  const end = () => {
    cancelAnimationFrame(frame);
    out.write(content);
    out.end();
    content = "";
    article.ariaBusy = "false";
    foot.replaceChildren(...notes(message), ...actions(message, at, text));
    flush();
  };
  return { article, add, end };
}

function notes({ role, error, finish, usage }) {
  const how = { length: "Cut at the longest answer allowed.", stopped: "Stopped.", undefined: "Interrupted." }[finish];
  const found = error ? [h("p", { className: "error", role: "alert" }, error)] : [];
  if (role === "assistant" && how && !error) found.push(h("p", { className: "note" }, how));
  return usage ? [...found, account(usage)] : found;
}

const LABELS = {
  tokens_per_s: "tokens a second", first_token_s: "first token, seconds", prompt_tokens: "prompt, tokens", cached: "of it in the cache",
  completion_tokens: "answer, tokens", read_mb: "read from disk, MB", hit_percent: "found in memory, %", waited_s: "waited for the disk, seconds",
  drafted: "tokens drafted", accepted: "of them right", batch: "answers at once",
};

/** What an answer cost, in a line; opened, all of it. */
function account(usage) {
  const own = usage.outsize ?? {}, cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const all = { ...usage, ...own, cached, read_mb: own.bytes_read / 1e6, hit_percent: own.hit_rate * 100 };
  const number = (x, digits = 2) => x.toLocaleString("en", { maximumFractionDigits: digits });
  const line = [own.tokens_per_s && `${number(own.tokens_per_s, 1)} tokens/s`, own.first_token_s && `first token ${number(own.first_token_s)} s`,
    `${number(all.completion_tokens)} tokens`, cached && `${number(cached)} of ${number(all.prompt_tokens)} prompt tokens cached`];
  const rows = Object.keys(LABELS).filter((name) => Number.isFinite(all[name]));
  return h("details", { className: "account" }, h("summary", {}, line.filter(Boolean).join(" · ")),
    h("dl", {}, ...rows.flatMap((name) => [h("dt", {}, LABELS[name]), h("dd", {}, number(all[name]))])));
}

function actions(message, at, text) {
  const isLast = at === chat.messages.length - 1 && message.role === "assistant";
  const copy = button("Copy", () => navigator.clipboard.writeText(message.content).then(() => { copy.textContent = "Copied"; say("Copied"); }));
  const found = message.content ? [copy, button("Edit", () => edit(message, at, text))] : [];
  if (isLast) found.push(button(message.error ? "Try again" : "Regenerate", () => retry(at)));
  return isLast && message.content ? [...found, button("Continue", () => answer(true))] : found;
}

function retry(at) {
  if (busy) return;
  chat.messages.length = at;
  answer();
}

function edit(message, at, text) {
  if (busy) return;
  const isUser = message.role === "user", box = h("textarea", { value: message.content, ariaLabel: "Edit this message" });
  const keep = () => { Object.assign(message, { content: box.value, finish: "stop", usage: undefined }); save(); show(); };
  const goOn = () => { chat.messages.length = at + 1; keep(); answer(!isUser); };
  text.replaceChildren(box, h("p", { className: "row" }, button("Cancel", show), button("Save", keep), button(isUser ? "Send" : "Continue from here", goOn, "main")));
  box.focus();
}

function show() {
  const views = chat.messages.map(view);
  $("log").replaceChildren(...views.map(({ article }) => article));
  views.forEach(({ add, end }, at) => { add(chat.messages[at].content, chat.messages[at].reasoning); end(); });
  $("log").classList.toggle("empty", !views.length);
  $("log").scrollTop = $("log").scrollHeight;
}

// Answers

function request(goesOn) {
  const system = chat.system ? [{ role: "system", content: chat.system }] : [];
  const messages = chat.messages.filter((m) => m.content).map(({ role, content }) => ({ role, content }));
  return { model: $("model").value, messages: [...system, ...messages], stream: true, stream_options: { include_usage: true },
    ...JSON.parse(localStorage[SAMPLING] ?? "{}"), ...(goesOn && { continue_final_message: true, add_generation_prompt: false }) };
}

/** Stream an answer to the last message, or, `goesOn`, more of it. */
async function answer(goesOn = false) {
  if (busy) return;
  const here = chat, stop = sending(new AbortController());
  if (!goesOn) here.messages.push({ role: "assistant", content: "" });
  const message = Object.assign(here.messages.at(-1), { finish: undefined, error: undefined, usage: undefined });
  show();
  const shown = view(message, here.messages.length - 1);
  shown.article.ariaBusy = "true";
  $("log").lastChild.replaceWith(shown.article);
  shown.add(message.content, message.reasoning);
  try {
    for await (const chunk of events(await call("v1/chat/completions", { body: request(goesOn), signal: stop.signal }))) {
      if (chunk.error) throw new Refusal(500, chunk.error);
      const { delta: { content, reasoning_content: reasoning } = {}, finish_reason: finish } = chunk.choices?.[0] ?? {};
      message.content += content ?? "";
      if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
      shown.add(content ?? "", reasoning ?? "");
      Object.assign(message, { finish: finish ?? message.finish, usage: chunk.usage ?? message.usage });
      if (performance.now() - saved > SAVE_MS) save(here);
    }
    say(`Answer ready, ${message.content.split(/\s+/).filter(Boolean).length} words`);
  } catch (problem) {
    message.finish = "stopped";
    if (problem.name === "AbortError") say("Stopped");
    else message.error = `${problem.message} ${problem.advice ?? ""}`;
    if ([0, 503].includes(problem.status)) ready();
  }
  sending(null);
  shown.end();
  save(here);
  list();
}

/** The answer under way, to be stopped; null: there is none. */
function sending(what) {
  busy = what;
  $("send").textContent = busy ? "Stop" : "Send";
  if (!busy && !isTouch && [document.body, $("send")].includes(document.activeElement)) $("box").focus();
  return busy;
}

function send() {
  const content = $("box").value.trim();
  if (busy || !content) return;
  chat.messages.push({ role: "user", content });
  chat.at = Date.now();
  $("box").value = "";
  history.replaceState(null, "", `#${chat.id}`);
  answer();
}

// The page around it

/** Wait until a model is open, telling how far it is. */
async function ready() {
  for (let heard = ""; ; await new Promise((over) => setTimeout(over, 500))) try {
    await call("health", { silent: true });
    const { data } = await (await call("v1/models", { silent: true })).json(), chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => h("option", { selected: id === chosen }, id)));
    document.title = `${data[0].id} · outsize`;
    if (heard) say("Ready");
    return tell();
  } catch (problem) {
    tell(`${problem.message} ${problem.status ? "" : problem.advice}`, problem.progress);
    if (!heard) say(heard = problem.message);
  }
}

function settings() {
  const form = $("settings").querySelector("form"), fields = [...form.elements].filter(({ name }) => name);
  const kept = { ...JSON.parse(localStorage[SAMPLING] ?? "{}"), system: chat.system };
  for (const field of fields) field.value = kept[field.name] ?? "";
  $("settings").onclose = () => {
    if ($("settings").returnValue === "clear") form.reset();
    const filled = fields.filter(({ name, value }) => name !== "system" && value !== "");
    localStorage[SAMPLING] = JSON.stringify(Object.fromEntries(filled.map(({ name, value, type }) => [name, type === "number" ? Number(value) : value])));
    chat.system = form.elements.system.value;
    save();
  };
  $("settings").showModal();
}

$("form").onsubmit = (event) => { event.preventDefault(); busy ? busy.abort() : send(); };
$("box").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  send();
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape") busy ? busy.abort() : isWide() || ["chats", "memory"].forEach((id) => toggle(id, false));
  if (event.key === "O" && event.ctrlKey && event.shiftKey) { event.preventDefault(); choose(fresh()); }
});
$("new").onclick = () => choose(fresh());
$("export").onclick = exportAll;
$("import").onchange = ({ target }) => importAll(target.files[0]);
$("show-settings").onclick = settings;
for (const id of ["chats", "memory"]) $(`show-${id}`).onclick = () => toggle(id);
addEventListener("pagehide", () => save());
chat = conversations().find(({ id }) => `#${id}` === location.hash) ?? chat;
toggle("chats", innerWidth > 1200);
toggle("memory", isWide());
show();
list();
ready();
