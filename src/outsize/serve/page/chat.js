// The chat: conversations kept in this browser, answers as they stream.
import { $, call, events, h, Refusal } from "./server.js";
import { writer } from "./markdown.js";
import { watch } from "./picture.js";

const KEPT = "outsize.chat.", SAMPLING = "outsize.sampling", SAVE_MS = 1000, NEAR = 80; // pixels from the end: then the log follows
const isTouch = matchMedia("(pointer: coarse)").matches, isWide = () => innerWidth > 900;
const fresh = () => ({ id: crypto.randomUUID(), at: Date.now(), system: "", messages: [] });
let chat = fresh(), busy = null, saved = 0;

const button = (name, onclick, more) => h("button", { type: "button", onclick, ...more }, name);
const copier = (text) => button("Copy", ({ target }) => navigator.clipboard.writeText(text()).then(() => { target.textContent = "Copied"; }));
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
const kept = (name, otherwise = "{}") => JSON.parse(localStorage[name] ?? otherwise);
const conversations = () => Object.keys(localStorage).filter((name) => name.startsWith(KEPT)).map((name) => kept(name)).sort((a, b) => b.at - a.at);
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
      isOpen ? choose(fresh()) : list();
    };
    const open = button(title, () => choose(one), { ariaCurrent: String(isOpen) });
    return h("li", {}, open, button("✕", remove, { ariaLabel: `Delete “${title}”` }));
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
  const text = (x) => { if (typeof x === "string") return x; throw new TypeError("no text"); };
  const message = ({ role, content, reasoning = "" }) =>
    ({ role: role === "user" ? role : "assistant", content: text(content), reasoning: text(reasoning), finish: "stop" });
  try {
    const found = JSON.parse(await file.text()).conversations.map(({ system = "", messages }) =>
      ({ ...fresh(), system: text(system), messages: messages.map(message) }));
    found.forEach((one) => save(one));
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
  const flush = (finish) => { // once a frame, however many pieces come
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    out.write(content);
    thought.append(reasoning);
    thinking.hidden &&= !reasoning;
    [content, reasoning, frame] = ["", "", 0];
    finish?.();
    if (follows) log.scrollTop = log.scrollHeight;
  };
  const add = (more, thoughts = "") => {
    [content, reasoning] = [content + more, reasoning + thoughts];
    frame ||= requestAnimationFrame(() => flush());
  };
  const end = () => {
    cancelAnimationFrame(frame);
    article.ariaBusy = "false";
    flush(() => { out.end(); foot.replaceChildren(...notes(message), ...actions(message, at, text)); });
  };
  return { article, add, end };
}
const ENDS = { length: "Cut at the longest answer allowed.", stopped: "Stopped.", undefined: "Interrupted." };
function notes({ role, error, finish, usage }) {
  const how = error || (role === "assistant" && ENDS[finish]);
  return [how && h("p", error ? { className: "error", role: "alert" } : { className: "note" }, how), usage && account(usage)].filter(Boolean);
}
/** What an answer cost, in a line; opened, all that the server says of it. */
function account({ outsize: own = {}, prompt_tokens_details: { cached_tokens: cached } = {}, completion_tokens_details: _, ...usage }) {
  const number = (x, digits = 2) => x.toLocaleString("en", { maximumFractionDigits: digits });
  const line = [own.tokens_per_s && `${number(own.tokens_per_s, 1)} tokens/s`, own.first_token_s && `first token ${number(own.first_token_s)} s`,
    `${number(usage.completion_tokens)} tokens`, cached && `${number(cached)} of ${number(usage.prompt_tokens)} prompt tokens cached`];
  const rows = Object.entries({ ...usage, cached_tokens: cached, ...own }).filter(([, value]) => Number.isFinite(value));
  const named = (name) => name.replace(/_per_s$/, " a second").replace(/_s$/, ", seconds").replaceAll("_", " ");
  const shown = rows.flatMap(([name, value]) => [h("dt", {}, named(name)), h("dd", {}, number(value, 4))]);
  return h("details", { className: "account" }, h("summary", {}, line.filter(Boolean).join(" · ")), h("dl", {}, ...shown));
}
function actions(message, at, text) {
  const isLast = at === chat.messages.length - 1 && message.role === "assistant";
  const retry = button(message.error ? "Try again" : "Regenerate", () => { if (!busy) { chat.messages.length = at; answer(); } });
  const goOn = button("Continue", () => answer(true)), change = button("Edit", () => edit(message, at, text));
  const isEmpty = !message.content;
  return [isEmpty || copier(() => message.content), isEmpty || change, !isLast || retry, isEmpty || !isLast || goOn].filter((x) => x !== true);
}
function edit(message, at, text) {
  if (busy) return;
  const isUser = message.role === "user", box = h("textarea", { value: message.content, ariaLabel: "Edit this message" });
  const keep = () => { Object.assign(message, { content: box.value, finish: "stop", usage: undefined }); save(); show(); };
  const go = button(isUser ? "Send" : "Continue from here", () => { chat.messages.length = at + 1; keep(); answer(!isUser); }, { className: "main" });
  text.replaceChildren(box, h("p", { className: "row" }, button("Cancel", show), button("Save", keep), go));
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
    ...kept(SAMPLING), ...(goesOn && { continue_final_message: true, add_generation_prompt: false }) };
}
/** Stream an answer to the last message, or, `goesOn`, more of it. */
async function answer(goesOn = false) {
  if (busy) return;
  const here = chat, { signal } = sending(new AbortController());
  if (!goesOn) here.messages.push({ role: "assistant", content: "" });
  const message = Object.assign(here.messages.at(-1), { finish: undefined, error: undefined, usage: undefined });
  show();
  const shown = view(message, here.messages.length - 1);
  shown.article.ariaBusy = "true";
  $("log").lastChild.replaceWith(shown.article);
  shown.add(message.content, message.reasoning);
  try {
    for await (const chunk of events(await call("v1/chat/completions", { body: request(goesOn), signal }))) {
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
    Object.assign(message, { finish: "stopped", ...(problem.name !== "AbortError" && { error: `${problem.message} ${problem.advice ?? ""}` }) });
    say("Stopped");
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
  Object.assign(chat, { at: Date.now(), messages: [...chat.messages, { role: "user", content }] });
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
    $("model").replaceChildren(...data.map(({ id }) => h("option", { value: id, selected: id === chosen }, id)));
    document.title = `${data[0].id} · outsize`;
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
$("form").onsubmit = (event) => { event.preventDefault(); busy ? busy.abort() : send(); };
$("box").onkeydown = (event) => { // on a phone, Enter makes a line
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch) { event.preventDefault(); send(); }
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
