// Markdown as it arrives, into elements: no HTML is ever parsed, no address but a link's is taken from a model.
import * as smd from "./vendor/smd.min.js";
import { tokenizeWith } from "./vendor/tokenize.js";
import { copy, h } from "./server.js";
const NAMES = { PARAGRAPH: "p", BLOCKQUOTE: "blockquote", LINE_BREAK: "br", RULE: "hr", HEADING_1: "h3", HEADING_2: "h4", HEADING_3: "h5",
  HEADING_4: "h6", HEADING_5: "h6", HEADING_6: "h6", ITALIC_AST: "em", ITALIC_UND: "em", STRONG_AST: "strong", STRONG_UND: "strong",
  STRIKE: "s", CODE_INLINE: "code", LINK: "a", RAW_URL: "a", IMAGE: "a", LIST_UNORDERED: "ul", LIST_ORDERED: "ol", LIST_ITEM: "li",
  EQUATION_BLOCK: "code", EQUATION_INLINE: "code", TABLE_ROW: "tr", TABLE_CELL: "td" };
const TAGS = Object.fromEntries(Object.entries(NAMES).map(([name, tag]) => [smd[name], tag]));
const LANGUAGES = "bash c css diff go html java js json py rs sql todo toml ts xml yaml".split(" ");
const ALIASES = { sh: "bash", shell: "bash", cpp: "c", "c++": "c", javascript: "js", jsx: "js", python: "py", rust: "rs",
  typescript: "ts", tsx: "ts", yml: "yaml", golang: "go", svg: "xml" };
const MOST = 20000, LONGEST = 2000, GROUP = 30; // characters of code that are coloured; of an address; blocks
let grammars = null; // loaded when the first code block ends
async function colour(code) {
  const name = ALIASES[code.dataset.language] ?? code.dataset.language, pieces = [];
  if (!LANGUAGES.includes(name) || code.textContent.length > MOST) return;
  grammars ??= Promise.all(LANGUAGES.map(async (l) => [l, (await import(`./vendor/${l}.js`)).default])).then(Object.fromEntries);
  const languages = await grammars, add = (text, kind) => pieces.push(kind ? h("span", { className: `code-${kind}` }, text) : text);
  tokenizeWith(code.textContent, languages[name], add, { languages });
  code.replaceChildren(...pieces);
}
/** A token's element, put into the one that is open. */
function made(parent, token) {
  if (token === smd.CODE_BLOCK || token === smd.CODE_FENCE) {
    const code = h("code"), onclick = ({ target }) => copy(code.textContent, target);
    parent.append(h("div", { className: "code" }, h("button", { className: "copy", onclick }, "Copy"), h("pre", { tabIndex: 0 }, code)));
    return code;
  }
  if (token === smd.TABLE) {
    const table = h("table", {}, h("thead"), h("tbody"));
    parent.append(h("div", { className: "wide-table", tabIndex: 0, role: "region", ariaLabel: "Table" }, table));
    return table;
  }
  if (token === smd.CHECKBOX) return parent.appendChild(h("input", { type: "checkbox", disabled: true, ariaLabel: "done" }));
  const isHead = token === smd.TABLE_CELL && parent.parentElement.tagName === "THEAD";
  const place = token !== smd.TABLE_ROW ? parent : parent.tHead.rows.length ? parent.tBodies[0] : parent.tHead;
  return place.appendChild(h(isHead ? "th" : TAGS[token]));
}
function attribute(element, kind, value) {
  if (kind === smd.LANG) element.dataset.language = value.toLowerCase();
  else if (kind === smd.CHECKED) element.checked = true;
  else if (kind === smd.START) element.start = value;
  else if (/^(https?|mailto):/i.test(value)) Object.assign(element, { href: value, target: "_blank", rel: "noopener noreferrer" });
  if (kind === smd.SRC && !element.textContent) element.textContent = value; // a picture is a link: we ask no other server
}
/** Writes a text into an element piece by piece; what the parser cannot take is shown as it is. */
export function writer(root) {
  const group = () => root.appendChild(h("div")), stack = [group()]; // blocks in groups, so that those out of sight cost nothing
  let all = "", isPlain = false;
  const parser = smd.parser({
    add_token: (_, token) => {
      if (stack.length === 1 && stack[0].childElementCount >= GROUP) stack[0] = group();
      if (token !== smd.DOCUMENT) stack.push(made(stack.at(-1), token));
    },
    end_token: () => { const ended = stack.pop(); if (ended.dataset.language) colour(ended); },
    add_text: (_, text) => stack.at(-1).append(text),
    set_attr: (_, kind, value) => attribute(stack.at(-1), kind, value),
  });
  const attempt = (text, step) => {
    all += text;
    try { isPlain ? root.append(text) : step(); } catch { isPlain = true; root.replaceChildren(all); root.classList.add("plain"); }
  };
  const write = (text) => { smd.parser_write(parser, text); if (parser.pending.length > LONGEST) throw new RangeError("an endless address"); };
  const end = () => { smd.parser_end(parser); stack[0].append(parser.pending.trim()); };
  return { write: (text) => attempt(text, () => write(text)), end: () => attempt("", end) };
}
