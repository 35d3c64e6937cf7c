// The chat: conversations kept in this browser, answers as they stream.
import { $, call, copy, events, h, Refusal } from "./server.js";
import { writer } from "./markdown.js";
import { watch } from "./picture.js";
const KEPT = "outsize.chat.", SAMPLING = "outsize.sampling", SAVE_MS = 1000, FLUSH_MS = 33, NEAR = 80; // pixels from the end: then the log follows
const isTouch = matchMedia("(pointer: coarse)").matches, isWide = () => innerWidth > 900;
const fresh = () => ({ id: Date.now().toString(36) + Math.random().toString(36).slice(2), at: Date.now(), system: "", messages: [] });
let chat = fresh(), busy = null, saved = 0;
const button = (name, onclick, more) => h("button", { type: "button", onclick, ...more }, name);
const short = (id) => id.replace(/-[0-9a-f]{12}-\w+$/, ""); // a pack's name, without its hash
const say = (words) => { $("status").textContent = words; }; // to screen readers
function tell(words = "", progress) {
  $("banner").hidden = !words;
  $("banner").replaceChildren(words, ...(progress === undefined ? [] : [h("progress", { value: progress, ariaLabel: "Loading" })]));
}
function toggle(id, isOpen = $(id).hidden) {
  $(id).hidden = !isOpen;
  $(`show-${id}`).ariaExpanded = String(isOpen);
  if (id === "memory") watch(isOpen);
}
// Conversations
const kept = (name) => JSON.parse(localStorage[name] ?? "{}");
const conversations = () => Object.keys(localStorage).filter((name) => name.startsWith(KEPT)).map(kept).sort((a, b) => b.at - a.at);
function save(one = chat) {
  saved = performance.now();
  try { if (one.messages.length) localStorage[KEPT + one.id] = JSON.stringify(one); }
  catch { tell("This browser's storage is full, so this conversation goes with the page: delete others, or export all."); }
}
function list() {
  $("list").replaceChildren(...conversations().map((one) => {
    const title = one.messages[0].content.slice(0, 60), isOpen = one.id === chat.id;
    const remove = () => {
      if (!confirm(`Delete “${title}”?`)) return;
      localStorage.removeItem(KEPT + one.id);
      if (isOpen) chat.messages = []; // an answer under way is not kept again
      isOpen ? choose(fresh()) : list();
    };
    return h("li", {}, button(title, () => choose(one), { ariaCurrent: String(isOpen) }), button("✕", remove, { ariaLabel: `Delete “${title}”` }));
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
  const file = new Blob([JSON.stringify({ conversations: conversations() }, null, 1)], { type: "application/json" });
  h("a", { download: "outsize-chats.json", href: URL.createObjectURL(file) }).click();
}
async function importAll(file) {
  const text = (x) => x.trim() && x, message = ({ role, content, reasoning = "" }) => // what is no text has no trim
    ({ role: role === "user" ? role : "assistant", content: text(content), reasoning: text(reasoning), finish: "stop" });
  try {
    const found = JSON.parse(await file.text()).conversations;
    found.map(({ system = "", messages }) => ({ ...fresh(), system: text(system), messages: messages.map(message) })).forEach((one) => save(one));
  } catch { tell("That file holds no conversations: choose one that “Export all” made."); }
  $("import").value = ""; // so that the same file can be chosen again
  list();
}
// Messages
/** One message on the page: made from what is kept, and added to while it streams. */
function view(message, at) {
  const isUser = message.role === "user", log = $("log"), text = h("div", { className: "text" }), foot = h("footer");
  const thought = h("div"), article = h("article", { className: message.role }, h("h2", { className: "sr" }, isUser ? "You" : "Answer"), text, foot);
  const out = isUser ? { write: (piece) => text.append(piece), end() {} } : writer(text);
  let content = "", reasoning = "", timer = 0;
  const flush = (finish) => { // 30 times a second, however many pieces come
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    out.write(content);
    if (reasoning && !thought.firstChild) text.before(h("details", { className: "thinking" }, h("summary", {}, "Thinking"), thought));
    thought.append(reasoning);
    [content, reasoning, timer] = ["", "", 0];
    finish?.();
    if (follows) log.scrollTop = log.scrollHeight;
  };
  const add = (more, thoughts = "") => { [content, reasoning, timer] = [content + more, reasoning + thoughts, timer || setTimeout(flush, FLUSH_MS)]; };
  const end = () => {
    clearTimeout(timer);
    article.ariaBusy = "false";
    flush(() => { out.end(); foot.replaceChildren(...notes(message), ...actions(message, at, text)); });
  };
  return { article, add, end };
}
const ENDS = { length: "Cut at the longest answer allowed.", stopped: "Stopped.", undefined: "Interrupted." };
const notes = ({ role, error, finish, usage }, how = error || (role === "assistant" && ENDS[finish])) =>
  [how && h("p", error ? { className: "error", role: "alert" } : { className: "note" }, how), usage && account(usage)].filter(Boolean);
/** What an answer cost, in a line; opened, all that the server says of it. */
function account({ outsize: own = {}, prompt_tokens_details: { cached_tokens: cached } = {}, completion_tokens_details: _, ...usage }) {
  const number = (x, digits = 2) => x.toLocaleString("en", { maximumFractionDigits: digits });
  const line = [own.tokens_per_s && `${number(own.tokens_per_s, 1)} tokens/s`, own.first_token_s && `first token ${number(own.first_token_s)} s`,
    `${number(usage.completion_tokens)} tokens`, cached && `${number(cached)} of ${number(usage.prompt_tokens)} prompt tokens cached`];
  const shown = Object.entries({ ...usage, cached_tokens: cached, ...own }).filter(([, value]) => Number.isFinite(value))
    .flatMap(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, number(value, 4))]);
  return h("details", { className: "account" }, h("summary", {}, line.filter(Boolean).join(" · ")), h("dl", {}, ...shown));
}
function actions(message, at, text) {
  const isLast = at === chat.messages.length - 1 && message.role === "assistant";
  const retry = button(message.error ? "Try again" : "Regenerate", () => { if (!busy) { chat.messages.length = at; answer(); } });
  const goOn = button("Continue", () => answer(true)), change = button("Edit", () => edit(message, at, text)), isEmpty = !message.content;
  return [isEmpty || button("Copy", ({ target }) => copy(message.content, target)), isEmpty || change, !isLast || retry, isEmpty || !isLast || goOn].filter((x) => x !== true);
}
function edit(message, at, text) {
  if (busy) return;
  const isUser = message.role === "user", box = h("textarea", { value: message.content, ariaLabel: "Edit this message" });
  const keep = () => { Object.assign(message, { content: box.value, finish: "stop", usage: undefined }); save(); show(); };
  const go = button(isUser ? "Send" : "Continue from here", () => { chat.messages.length = at + 1; keep(); answer(!isUser); }, { className: "main" });
  text.replaceChildren(box, h("p", { className: "row" }, button("Cancel", () => show()), button("Save", keep), go));
  box.focus();
}
/** The whole conversation, anew; the last message's view. `goesOn`: to which there will be more. */
function show(goesOn = false) {
  const views = chat.messages.map(view), last = views.at(-1), log = $("log");
  log.replaceChildren(...views.map(({ article }) => article));
  views.forEach(({ add }, at) => add(chat.messages[at].content, chat.messages[at].reasoning));
  for (const one of views) if (!goesOn || one !== last) one.end();
  if (goesOn) last.article.ariaBusy = "true";
  log.classList.toggle("empty", !views.length);
  log.scrollTop = log.scrollHeight;
  return last;
}
// Answers
function request(goesOn) {
  const messages = [{ role: "system", content: chat.system }, ...chat.messages].filter((m) => m.content).map(({ role, content }) => ({ role, content }));
  return { model: $("model").value || undefined, messages, stream: true, stream_options: { include_usage: true },
    ...kept(SAMPLING), ...(goesOn && { continue_final_message: true, add_generation_prompt: false }) };
}
/** Stream an answer to the last message, or, `goesOn`, more of it. */
async function answer(goesOn = false) {
  if (busy) return;
  const here = chat, { signal } = sending(new AbortController());
  if (!goesOn) here.messages.push({ role: "assistant", content: "" });
  const message = Object.assign(here.messages.at(-1), { finish: undefined, error: undefined, usage: undefined });
  const shown = show(true);
  try {
    for await (const chunk of events(await call("v1/chat/completions", { body: request(goesOn), signal }))) {
      if (chunk.error) throw new Refusal(500, chunk.error);
      const { delta: { content, reasoning_content: reasoning } = {}, finish_reason: finish } = chunk.choices?.[0] ?? {};
      message.content += content ?? "";
      message.reasoning = (message.reasoning ?? "") + (reasoning ?? "");
      shown.add(content ?? "", reasoning ?? "");
      Object.assign(message, { finish: finish ?? message.finish, usage: chunk.usage ?? message.usage });
      if (performance.now() - saved > SAVE_MS) save(here);
    }
    say(`Answer ready, ${message.content.split(/\s+/).filter(Boolean).length} words`);
  } catch (problem) {
    Object.assign(message, { finish: "stopped", ...(problem.name !== "AbortError" && { error: `${problem.message} ${problem.advice ?? ""}` }) });
    say("Stopped");
    if ([0, 503].includes(problem.status)) ready();
  }
  sending(null);
  shown.end();
  save(here); list();
}
/** The answer under way, to be stopped; null: there is none. */
function sending(what) {
  $("send").textContent = what ? "Stop" : "Send";
  if (!what && !isTouch && [document.body, $("send")].includes(document.activeElement)) $("box").focus();
  return busy = what;
}
function send() {
  const content = $("box").value.trim();
  if (busy || !content) return;
  [chat.at, $("box").value] = [Date.now(), ""];
  chat.messages.push({ role: "user", content });
  history.replaceState(null, "", `#${chat.id}`);
  answer();
}
// The page around it
/** Wait until a model is open, telling how far it is. */
async function ready() {
  for (let heard = ""; ; await new Promise((over) => setTimeout(over, 500))) try {
    await call("health", { silent: true });
    const { data } = await (await call("v1/models", { silent: true })).json(), chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => h("option", { value: id, selected: id === chosen }, short(id))));
    document.title = `${short(data[0].id)} · outsize`;
    if (heard) say("Ready");
    return tell();
  } catch (problem) {
    tell(`${problem.message} ${problem.status ? "" : problem.advice}`, problem.progress);
    if (!heard) say(heard = problem.message);
  }
}
function settings() {
  const dialog = $("settings"), [system, ...fields] = dialog.querySelectorAll("[name]"), now = kept(SAMPLING);
  system.value = chat.system;
  for (const field of fields) field.value = now[field.name] ?? "";
  dialog.onclose = () => {
    if (dialog.returnValue === "clear") dialog.firstElementChild.reset();
    const filled = fields.filter(({ value }) => value).map(({ name, value, type }) => [name, type === "number" ? Number(value) : value]);
    localStorage[SAMPLING] = JSON.stringify(Object.fromEntries(filled));
    chat.system = system.value;
    save();
  };
  dialog.showModal();
}
const isSend = ({ key, shiftKey, isComposing }) => key === "Enter" && !shiftKey && !isComposing && !isTouch; // on a phone, Enter makes a line
$("form").onsubmit = (event) => { event.preventDefault(); busy ? busy.abort() : send(); };
$("box").onkeydown = (event) => { if (isSend(event)) { event.preventDefault(); send(); } };
addEventListener("keydown", (event) => {
  if (event.key === "Escape") busy ? busy.abort() : isWide() || ["chats", "memory"].forEach((id) => toggle(id, false));
  if (event.key === "O" && event.ctrlKey && event.shiftKey) { event.preventDefault(); choose(fresh()); }
});
const CLICKS = { new: () => choose(fresh()), export: exportAll, "show-settings": settings, "show-chats": () => toggle("chats"), "show-memory": () => toggle("memory") };
for (const [id, onclick] of Object.entries(CLICKS)) Object.assign($(id), { onclick: () => onclick() });
$("import").onchange = ({ target }) => importAll(target.files[0]);
addEventListener("pagehide", () => busy && save());
toggle("chats", innerWidth > 1200);
toggle("memory", isWide());
chat = conversations().find(({ id }) => `#${id}` === location.hash) ?? chat;
[show, list, ready].forEach((begin) => begin());
