// Talking to the server: its key, its errors in its own words, its event streams.
export const $ = (id) => document.getElementById(id);
/** An element: h("p", {className: "note"}, "text", another). Text stays text: nothing is parsed as HTML. */
export function h(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
/** To the clipboard; a page from another machine, without TLS, has the old way alone. */
export async function copy(text, button) {
  const box = document.body.appendChild(h("textarea", { value: text }));
  box.select();
  await (navigator.clipboard?.writeText(text) ?? document.execCommand("copy"));
  box.remove();
  button.textContent = "Copied";
}
const ADVICE = { 0: "See whether `outsize serve` is still running, then try again.", 401: "Ask whoever runs this server for its key.",
  503: "Try again in a moment.", context_length_exceeded: "Start a new chat, or edit an earlier message and go on from there." };
/** What the server said no with, and what to do about it. */
export class Refusal extends Error {
  constructor(status, error = {}, wait = null) {
    super(error.message ?? (status ? `The server answered with status ${status}.` : "The server does not answer."));
    Object.assign(this, { status, advice: status === 429 ? `Try again in ${wait} s.` : ADVICE[error.code] ?? ADVICE[status] ?? "" });
  }
}
let key = sessionStorage.getItem("outsize.key") ?? "", asking;
/** Once, however many requests were refused; false if there is no answer. */
function askForKey() {
  return asking ??= new Promise((answered) => {
    const input = h("input", { type: "password", autocomplete: "off" }), use = h("button", { className: "main" }, "Use it");
    const form = h("form", { method: "dialog" }, h("h2", {}, "This server asks for a key"), h("label", {}, "API key", input), h("p", { className: "row" }, use));
    const dialog = document.body.appendChild(h("dialog", { id: "key", ariaLabel: "API key" }, form));
    dialog.onclose = () => {
      sessionStorage.setItem("outsize.key", key = input.value.trim());
      asking = dialog.remove();
      answered(key !== "");
    };
    dialog.showModal();
  });
}
/** GET, or POST a body; the response, if it is a good one. Throws Refusal, or AbortError. `silent`: asks for no key. */
export async function call(path, { body, signal, silent } = {}) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) })
    .catch((problem) => { throw problem.name === "AbortError" ? problem : new Refusal(0); });
  if (response.ok) return response;
  if (response.status === 401 && !silent && (await askForKey())) return call(path, { body, signal });
  const { error, progress } = await response.json().catch(() => ({}));
  throw Object.assign(new Refusal(response.status, error, response.headers.get("retry-after")), { progress });
}
/** The JSON of each event of a server-sent stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let text = "", lines = []; ; text = lines.pop()) {
      for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
      const { value, done } = await reader.read();
      if (done) return;
      lines = (text + value).split("\n");
    }
  } finally { reader.cancel().catch(() => {}); } // whoever leaves ends the request
}
