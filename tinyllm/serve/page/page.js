// The chat: conversations kept in the browser, answers that stream as Markdown, and every token a thing to click.
import { $, Failure, Look, Watch, ask, h, keep, local, session, surprise } from "./look.js";

// --------------------------------------------------------------------------------- Markdown
//
// A text is a pair of a string and the place of each of its characters in the answer, so that what is shown
// knows its token. The result is built from elements and text nodes alone: HTML in an answer stays text.

const LIST = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/;
const DIVIDER = /^ *\|?( *:?-+:? *\|)* *:?-+:? *\|? *$/;
const INLINE = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,3}|~~|!?\[([^[\]]*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)|https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/g;
const DEEPEST = 12; // of lists, quotes and emphasis within each other

class Line {
  constructor(text, at) { this.text = text; this.at = at; } // `at`: of the first character
  from(i) { return new Line(this.text.slice(i), this.at + i); }
}

const linesOf = text => { let at = 0; return text.split("\n").map(line => { const found = new Line(line, at); at += line.length + 1; return found; }); };

/** The top blocks of an answer as [key, build]: a block with the same key need not be built again. */
export function markdown(text, leaf) {
  return group(linesOf(text), 0).map(([kind, lines, more]) =>
    [`${kind} ${lines[0].at} ${lines.map(line => line.text).join("\n")}`, () => build(kind, lines, more, leaf, 0)]);
}

/** Lines to blocks [kind, lines, more]. */
function group(lines, depth) {
  const blocks = [], add = (...block) => blocks.push(block);
  for (let i = 0; i < lines.length;) {
    const line = lines[i], text = line.text, from = i;
    let found;
    if (!text.trim()) { i++; continue; }
    if ((found = FENCE.exec(text))) {
      const close = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},} *$`);
      for (i++; i < lines.length && !close.test(lines[i].text);) i++;
      add("code", lines.slice(from, ++i), found[2].trim());
    } else if (RULE.test(text)) { add("rule", lines.slice(i, ++i)); } else if (HEADING.test(text)) { add("heading", lines.slice(i, ++i)); } else if (/^ {0,3}>/.test(text) && depth < DEEPEST) {
      while (i < lines.length && /^ {0,3}>/.test(lines[i].text)) i++;
      add("quote", lines.slice(from, i));
    } else if ((found = LIST.exec(text)) && depth < DEEPEST) {
      const indent = found[1].length, numbered = /\d/.test(found[2]);
      for (i++; i < lines.length; i++) {
        const item = LIST.exec(lines[i].text), deeper = /^ */.exec(lines[i].text)[0].length > indent;
        if (!lines[i].text.trim()) { // a list goes on after an empty line if what follows belongs to it
          const next = lines[i + 1]?.text ?? "", after = LIST.exec(next);
          if (!(after && /\d/.test(after[2]) === numbered) && !/^ {2,}\S/.test(next)) break;
        } else if (item ? item[1].length <= indent && (item[1].length < indent || /\d/.test(item[2]) !== numbered) : !deeper && !lines[i - 1].text.trim()) break;
        else if (!item && !deeper && (FENCE.test(lines[i].text) || HEADING.test(lines[i].text))) break;
      }
      add(numbered ? "ol" : "ul", lines.slice(from, i), indent);
    } else if (text.includes("|") && DIVIDER.test(lines[i + 1]?.text ?? "") && lines[i + 1].text.includes("-")) {
      while (i < lines.length && lines[i].text.includes("|")) i++;
      add("table", lines.slice(from, i));
    } else {
      for (i++; i < lines.length && lines[i].text.trim() && ![FENCE, RULE, HEADING, /^ {0,3}>/, LIST].some(start => start.test(lines[i].text));) i++;
      add("p", lines.slice(from, i));
    }
  }
  return blocks;
}

function build(kind, lines, more, leaf, depth) {
  const inside = (parent, rows) => { parent.append(...group(rows, depth + 1).map(([k, l, m]) => build(k, l, m, leaf, depth + 1))); return parent; };
  if (kind === "rule") return h("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0].text), at = lines[0].text.indexOf(text, marks.length);
    return inline(h(`h${Math.min(5, marks.length + 2)}`), [new Line(text, lines[0].at + at)], leaf);
  }
  if (kind === "quote") return inside(h("blockquote"), lines.map(line => line.from(/^ {0,3}> ?/.exec(line.text)[0].length)));
  if (kind === "code") {
    const closed = lines.length > 1 && new RegExp(`^ {0,3}[\`~]{3,} *$`).test(lines.at(-1).text), rows = lines.slice(1, closed ? -1 : undefined);
    const code = h("code");
    rows.forEach((line, i) => { leaf(code, line.text, k => line.at + k); if (i < rows.length - 1) code.append("\n"); });
    return h("div", { class: "code" }, h("header", {}, h("span", {}, more.split(/\s/)[0] || "text"), copyButton(() => code.textContent, "Copy code")), h("pre", { tabindex: 0 }, code));
  }
  if (kind === "ul" || kind === "ol") {
    const list = h(kind), items = [];
    for (const line of lines) {
      const item = LIST.exec(line.text);
      if (item && item[1].length === more) items.push({ width: item[0].length, rows: [line.from(item[0].length)] });
      else items.at(-1).rows.push(line.from(Math.min(/^ */.exec(line.text)[0].length, items.at(-1).width)));
    }
    if (kind === "ol") list.setAttribute("start", parseInt(lines[0].text, 10));
    for (const { rows } of items) {
      while (rows.length > 1 && !rows.at(-1).text.trim()) rows.pop();
      const entry = inside(h("li"), rows);
      if (entry.firstChild?.tagName === "P" && !rows.some(row => !row.text.trim())) entry.firstChild.replaceWith(...entry.firstChild.childNodes);
      list.append(entry);
    }
    return list;
  }
  if (kind === "table") {
    const cells = (line, tag) => {
      const row = h("tr"), end = line.text.replace(/\s*\|?\s*$/, "").length;
      let at = /^ *\|?/.exec(line.text)[0].length;
      for (const cell of line.text.slice(at, end).split(/(?<!\\)\|/)) {
        const lead = /^ */.exec(cell)[0].length;
        row.append(inline(h(tag), [new Line(cell.trim(), line.at + at + lead)], leaf));
        at += cell.length + 1;
      }
      return row;
    };
    return h("div", { class: "table" }, h("table", {}, h("thead", {}, cells(lines[0], "th")), h("tbody", {}, ...lines.slice(2).map(line => cells(line, "td")))));
  }
  return inline(h("p"), lines, leaf);
}

/** Append the text of lines, with emphasis, code and links, to an element. */
function inline(element, lines, leaf) {
  const text = lines.map(line => line.text).join("\n"), places = new Int32Array(text.length);
  let n = 0;
  for (const line of lines) for (let k = 0; k <= line.text.length; k++) places[n++] = line.at + k;
  span(element, text, 0, text.length, places, leaf, 0);
  return element;
}

function span(parent, text, from, end, places, leaf, depth) {
  let plain = from;
  const flush = to => { if (to > plain) leaf(parent, text.slice(plain, to), k => places[k], plain); };
  const put = (node, at, stop) => { flush(at); parent.append(node); plain = stop; };
  const missing = new Set(); // marks that are not closed: each is searched once
  for (let i = from; i < end;) {
    INLINE.lastIndex = i;
    const found = INLINE.exec(text);
    if (!found || found.index + found[0].length > end) break;
    const [mark, label, url] = found, at = found.index;
    i = at + mark.length;
    if (mark[0] === "\\") { flush(at); plain = at + 1; } else if (mark[0] === "`") {
      const close = missing.has(mark) ? -1 : closing(text, mark, i, end);
      if (close < 0) { missing.add(mark); continue; }
      const code = h("code");
      leaf(code, text.slice(i, close), k => places[k], i);
      put(code, at, i = close + mark.length);
    } else if (label !== undefined || mark.startsWith("http")) {
      const target = safe(label === undefined ? mark : url);
      if (!target) continue; // no link: its text stays as it was written
      const link = h("a", { href: target, rel: "noopener noreferrer nofollow", target: "_blank", title: target });
      const start = label === undefined ? at : at + mark.indexOf("[") + 1;
      if (label !== undefined && depth < DEEPEST) span(link, text, start, start + label.length, places, leaf, depth + 1);
      else leaf(link, label ?? mark, k => places[k], start);
      put(link, at, i);
    } else {
      const inWord = c => c !== undefined && /[\p{L}\p{N}]/u.test(c);
      if (depth >= DEEPEST || missing.has(mark) || /^\s|^$/.test(text.slice(i, i + 1)) || (mark[0] === "_" && inWord(text[at - 1]))) continue;
      let close = i;
      do { close = closing(text, mark, close + 1, end); } while (close > 0 && (/\s/.test(text[close - 1]) || (mark[0] === "_" && inWord(text[close + mark.length]))));
      if (close < 0) { missing.add(mark); continue; }
      const inner = h(mark[0] === "~" ? "del" : mark.length === 1 ? "em" : "strong"), core = mark.length === 3 ? inner.appendChild(h("em")) : inner;
      span(core, text, i, close, places, leaf, depth + 1);
      put(inner, at, i = close + mark.length);
    }
  }
  flush(end);
}

/** Where a mark closes before `end`: a run of the same characters of the same length, or -1. */
function closing(text, mark, from, end) {
  for (let at = text.indexOf(mark, from); at >= 0 && at + mark.length <= end;) {
    let stop = at + mark.length;
    while (text[stop] === mark[0]) stop++;
    if (stop - at === mark.length) return at;
    at = text.indexOf(mark, stop);
  }
  return -1;
}

/** The address of a link, if it is one of the web. */
function safe(url) {
  try {
    const { protocol, href } = new URL(url);
    return protocol === "https:" || protocol === "http:" ? href : null;
  } catch { return null; }
}

// ---------------------------------------------------------------------- conversations, kept

const PREFIX = "tinyllm.chat.";
const number = () => Math.random().toString(36).slice(2, 10);

/** Conversations in local. Messages form a tree: another answer or an edit is a sibling, and nothing is lost. */
const kept = {
  // null if it is not ours, or damaged: it stays where it is
  one(key) { try { const one = JSON.parse(local.getItem(key)); return PREFIX + one.id === key && isWhole(one) ? one : null; } catch { return null; } },
  all() { return Object.keys(local).filter(key => key.startsWith(PREFIX)).map(this.one).filter(Boolean).sort((a, b) => b.used - a.used); },
  save(chat) {
    const put = one => one.removed || keep(local, PREFIX + one.id, JSON.stringify(one));
    chat.nodes = { ...this.one(PREFIX + chat.id)?.nodes, ...chat.nodes }; // with what another tab has added
    if (put(chat)) return; // or it was removed while its answer was written
    for (const older of this.all().reverse()) { // a full store forgets alternatives of old answers first
      Object.values(older.nodes).forEach(node => node.tokens?.forEach(token => delete token.top));
      if (put(older) && put(chat)) return;
    }
    note("The browser’s storage is full: remove a conversation, or this one is lost when you leave it.");
  },
  remove(id) { local.removeItem(PREFIX + id); },
};

/** Whether a conversation has all that the page relies on, and its messages lead to a first one. */
function isWhole({ title, used, nodes, leaf }) {
  const valid = ([id, { role, text, parent, made, tokens, ...node }]) => node.id === id && typeof text === "string" && typeof made === "number"
    && (parent === null || parent in nodes) && (role === "user" || (role === "assistant" && Array.isArray(tokens) && tokens.every(token => typeof token.text === "string" && typeof token.end === "number")));
  for (let left = Object.keys(nodes).length; leaf && left; left--) leaf = nodes[leaf].parent;
  return typeof title === "string" && typeof used === "number" && leaf === null && Object.entries(nodes).every(valid);
}

const STANDARD = { system: "", temperature: 0.2, top_p: 0.9, top_k: 0, max_tokens: 512, seed: "" };
const settings = { ...STANDARD };
try { // damaged ones are the standard ones
  for (const [name, value] of Object.entries(JSON.parse(local.getItem("tinyllm.settings")))) if (typeof value === typeof STANDARD[name]) settings[name] = value;
} catch { /* not JSON */ }
const fresh = () => ({ id: number(), title: "", used: Date.now(), nodes: {}, leaf: null });

let about, chat = fresh(), look, watch, running = null; // `running`: {chat, id, stop} of the answer that is being written

const path = (of = chat, id = of.leaf) => { const found = []; for (; id; id = of.nodes[id].parent) found.unshift(of.nodes[id]); return found; };
const children = (parent, of = chat) => Object.values(of.nodes).filter(node => node.parent === parent).sort((a, b) => a.made - b.made);
const tip = id => { for (let next; (next = children(id).at(-1)); id = next.id); return id; };

function add(role, text, parent, more = {}) {
  const node = { id: number(), role, text, parent, made: Math.max(Date.now(), 1 + (children(parent).at(-1)?.made ?? 0)), ...more };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  return node;
}

// --------------------------------------------------------------------- asking for an answer

/** What the model is asked to continue: the messages before an answer and its beginning, or for a base model a text. */
function prompt(node, begun, of = chat) {
  const before = path(of, node.parent);
  if (!about.chat) return { prompt: before.map(each => each.text).join("") + begun };
  const messages = before.map(({ role, text }) => ({ role, content: text }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system.trim() });
  if (begun) messages.push({ role: "assistant", content: begun });
  return { messages, ...(begun && { continue_final_message: true }) };
}

/** Let the model write `node`, whose text so far it continues. */
async function answer(node) {
  const controller = new AbortController(), of = chat;
  running = { chat: of, id: node.id, stop: () => controller.abort() };
  node.end = "stopped"; // until it ends otherwise: so it is if the page is left
  note();
  kept.save(of);
  draw();
  const { temperature, top_p, top_k, max_tokens, seed } = settings;
  const body = { model: about.model, ...prompt(node, node.text), stream: true, temperature, top_p, max_tokens: Math.min(max_tokens, about.max_tokens), ...(top_k && { top_k }), ...(seed !== "" && { seed: +seed }) };
  Object.assign(body, about.chat ? { logprobs: true, top_logprobs: 20 } : { logprobs: 20 });
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // whose characters are those of the text
  let end = node.text.length, done = false, drawn = false;
  const redraw = () => { if (!drawn) { drawn = true; requestAnimationFrame(() => { drawn = false; drawBody(node); }); } };
  try {
    const reply = await ask(about.chat ? "/v1/chat/completions" : "/v1/completions", body, { signal: controller.signal });
    for await (const event of events(reply.body)) {
      if (event.error) throw new Failure(`The server ended the answer: ${event.error.message}`);
      const choice = event.choices?.[0];
      if (!choice) continue;
      node.text += choice.delta?.content ?? choice.text ?? "";
      for (const entry of choice.logprobs?.content ?? []) {
        end += decoder.decode(new Uint8Array(entry.bytes ?? []), { stream: true }).length;
        const top = (entry.top_logprobs ?? []).slice(0, 10).map(other => ({ id: other.id, text: other.token, p: round(other.logprob) }));
        node.tokens.push({ id: entry.id, text: entry.token, p: round(entry.logprob), end, top });
      }
      if (choice.finish_reason) { node.end = choice.finish_reason; done = true; }
      speak(node.text, false);
      redraw();
    }
    if (!done) throw new Failure("The answer broke off: the server is gone.");
  } catch (error) {
    if (controller.signal.aborted) node.end = "stopped";
    else if (error instanceof Failure) node.problem = error.message;
    else node.problem = "The answer broke off: the server is gone.";
  }
  speak(node.text, true);
  running = null;
  of.used = Date.now();
  kept.save(of);
  draw();
}

const round = value => Math.round(Math.max(value, -99) * 1000) / 1000;

/** The events of a stream, as objects, until [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) for (const line of part.split(/\r?\n/)) if (line.startsWith("data:")) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

let spoken = 0;

/** Pass whole sentences of an answer on to screen readers. */
function speak(text, whole) {
  if (whole && !spoken) $("live").replaceChildren();
  const stop = whole ? text.length : Math.max(...[". ", "! ", "? ", "\n"].map(end => text.lastIndexOf(end))) + 1;
  if (stop > spoken) { $("live").append(h("p", {}, text.slice(spoken, stop).replace(/\*+|`+|~~|\||^#+ /gm, "").trim())); spoken = stop; }
  if (whole) spoken = 0;
}

function send(text, parent = chat.leaf) {
  if (running || !text.trim()) return;
  const user = add("user", text, parent);
  if (!chat.title) chat.title = text.trim().split("\n")[0].slice(0, 80);
  $("live").replaceChildren();
  answer(add("assistant", "", user.id, { tokens: [] }));
  $("scroll").scrollTop = 1e9;
}

function again(node) {
  if (running) return;
  look.close();
  answer(add("assistant", "", node.parent, { tokens: [] }));
}

/** Another answer that begins as `node` does, with `other` in place of a token, and goes on from there. */
function branch(node, index, other, ends) {
  if (running) return;
  const start = index ? node.tokens[index - 1].end : 0, text = node.text.slice(0, start) + (ends ? "" : other.text);
  const tokens = node.tokens.slice(0, index);
  if (!ends) tokens.push({ ...node.tokens[index], id: other.id, text: other.text, p: other.p, end: text.length });
  const next = add("assistant", text, node.parent, { tokens, end: "stop" });
  look.close();
  if (!ends) return answer(next);
  kept.save(chat);
  draw();
}

// ------------------------------------------------------------------------------- the page

function note(text = "") { $("note").textContent = text; }

function copyButton(text, name) {
  const button = h("button", { type: "button", "aria-label": name, onclick: async () => {
    try { await navigator.clipboard.writeText(text()); button.textContent = "Copied"; } catch { button.textContent = "Not allowed"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return button;
}

/** For markdown(): appends text to an element, each token of an answer in a span of its own. */
function leafOf(node) {
  const ends = node.tokens?.map(token => token.end) ?? [];
  const tokenAt = place => { let low = 0, high = ends.length; while (low < high) { const middle = (low + high) >> 1; if (ends[middle] <= place) low = middle + 1; else high = middle; } return low; };
  return (parent, text, place, offset = 0) => {
    for (let i = 0; i < text.length;) {
      const token = tokenAt(place(offset + i)), from = i;
      while (i < text.length && place(offset + i) < (ends[token] ?? Infinity)) i++;
      const part = text.slice(from, i);
      if (token >= ends.length) parent.append(part);
      else parent.append(h("span", { "data-t": token, "data-p": node.tokens[token].p == null ? 0 : surprise(Math.exp(node.tokens[token].p)) }, part));
    }
  };
}

const itemOf = node => document.querySelector(`#messages > [data-id="${node.id}"]`);

function drawBody(node) {
  const body = itemOf(node)?.querySelector(".body");
  if (!body) return;
  if (node.role === "user") { body.textContent = node.text; return; }
  const scroll = $("scroll"), atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  const blocks = markdown(node.text, leafOf(node));
  blocks.forEach(([key, make], i) => {
    const old = body.children[i], full = `${key} ${node.tokens.length && i === blocks.length - 1 ? node.tokens.length : ""}`;
    if (old?.made === full) return;
    const element = make();
    element.made = full;
    if (old) old.replaceWith(element); else body.append(element);
  });
  while (body.children.length > blocks.length) body.lastChild.remove();
  if (look?.node === node.id && !$("look").hidden) mark(node, look.index);
  if (atEnd && running?.id === node.id) scroll.scrollTop = scroll.scrollHeight;
}

function mark(node, index) {
  document.querySelectorAll(".now").forEach(each => each.classList.remove("now"));
  document.querySelectorAll("#messages > .open").forEach(each => each.classList.remove("open"));
  if (index == null) return;
  const item = itemOf(node);
  item?.classList.add("open");
  const found = item?.querySelectorAll(`[data-t="${index}"]`) ?? [];
  found.forEach(each => each.classList.add("now"));
  found[0]?.scrollIntoView({ block: innerWidth < 480 ? "start" : "nearest" }); // where a phone shows it above the panel
}

function lookAt(node, index) {
  const tokens = node.tokens;
  look.node = node.id;
  look.choose = (i, other, ends) => branch(node, i, other, ends);
  look.moved = i => mark(node, i);
  look.open({ tokens, busy: () => running !== null, request: i => {
    const ids = tokens.slice(0, i).map(token => token.id);
    return { ...prompt(node, ""), ids };
  } }, index);
}

const ENDS = { length: "The longest answer allowed was reached.", stopped: "Stopped." };

function item(node) {
  const same = children(node.parent), at = same.indexOf(node), writing = running?.id === node.id, acts = h("div", { class: "acts" });
  const act = (name, run, label) => acts.append(h("button", { type: "button", "aria-label": label, onclick: run, disabled: running && label !== "Look inside this answer" }, name));
  if (!writing) {
    if (same.length > 1) {
      const go = by => { look.close(); chat.leaf = tip(same[at + by].id); kept.save(chat); draw(); };
      const turn = (name, label, by) => acts.append(h("button", { type: "button", "aria-label": label, disabled: !same[at + by], onclick: () => go(by) }, name));
      turn("‹", "Previous version", -1);
      acts.append(h("span", {}, `${at + 1} / ${same.length}`));
      turn("›", "Next version", 1);
    }
    acts.append(copyButton(() => node.text, "Copy message"));
    if (node.role === "user") act("Edit", () => edit(node), "Edit message");
    else {
      act("Again", () => again(node), "Answer again");
      if (node.tokens?.length) act("Look inside", () => lookAt(node, 0), "Look inside this answer");
      if (!node.problem && ENDS[node.end]) acts.append(h("span", {}, ` ${ENDS[node.end]}`));
    }
  }
  return h("li", { class: `${node.role}${writing ? " writing" : ""}${same.length > 1 ? " many" : ""}`, "data-id": node.id },
    h("h3", { class: "sr" }, node.role === "user" ? "You" : "Answer"),
    h("div", { class: "body", onclick: event => {
      const token = event.target.closest("[data-t]");
      if (token && !event.target.closest("a") && getSelection().isCollapsed) lookAt(node, +token.dataset.t);
    } }), node.problem ? h("p", { class: "note", role: "alert" }, node.problem) : null, acts);
}

function edit(node) {
  const place = itemOf(node), area = h("textarea", { "aria-label": "Edited message", rows: Math.min(12, node.text.split("\n").length + 1) });
  area.value = node.text;
  const finish = () => { const text = area.value; if (text.trim() && !running) { look.close(); send(text, node.parent); } };
  place.querySelector(".acts").hidden = true;
  place.querySelector(".body").replaceWith(h("div", { class: "edit", onkeydown: event => {
    if (event.key === "Escape") { event.stopPropagation(); draw(); itemOf(node).querySelector('[aria-label="Edit message"]').focus(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); finish(); }
  } }, area, h("div", {}, h("button", { type: "button", onclick: draw }, "Cancel"), h("button", { type: "button", class: "main", onclick: finish }, "Send"))));
  area.focus();
}

function draw() {
  const nodes = path(), writing = running?.chat === chat;
  $("title").textContent = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} – tinyllm` : "tinyllm";
  $("hello").hidden = nodes.length > 0;
  $("messages").replaceChildren(...nodes.map(item));
  nodes.forEach(drawBody);
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (look && !writing && !$("look").hidden && !nodes.some(node => node.id === look.node)) look.close();
  drawList();
}

function drawList() {
  $("list").replaceChildren(...kept.all().map(one => h("li", { class: one.id === chat.id ? "open" : "" },
    h("button", { class: "name", "aria-current": one.id === chat.id && "page", title: one.title, onclick: () => openChat(one) }, one.title || "New chat"),
    h("button", { class: "remove", "aria-label": `Remove ${one.title}`, onclick: () => {
      if (!confirm(`Remove the conversation “${one.title}”?`)) return;
      if (running?.chat.id === one.id) { running.chat.removed = true; running.stop(); }
      kept.remove(one.id);
      if (one.id === chat.id) openChat(fresh()); else drawList();
    } }, "✕"))));
}

function openChat(one) {
  look?.close();
  chat = running?.chat.id === one.id ? running.chat : one; // the one that is being written is not yet stored
  keep(session, "tinyllm.open", chat.id);
  note();
  show("chat");
  draw();
  $("scroll").scrollTop = 1e9;
  $("text").focus();
}

function show(which) {
  look?.close();
  $("chat").hidden = which !== "chat";
  $("watch").hidden = which !== "watch";
  menu(false);
  if (which === "watch") { watch.draw(); watch.start(); } else watch.stop();
}

function menu(open) {
  $("side").classList.toggle("shown", open);
  document.querySelectorAll(".menu").forEach(each => each.setAttribute("aria-expanded", String(open)));
  if (open) $("new").focus();
}

function theme(next) {
  const dark = next ?? local.getItem("tinyllm.theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  if (next) keep(local, "tinyllm.theme", next);
  if (local.getItem("tinyllm.theme")) document.documentElement.dataset.theme = dark;
  $("theme").textContent = dark === "dark" ? "Light" : "Dark";
  $("theme").onclick = () => theme(dark === "dark" ? "light" : "dark");
}

function prepareSettings() {
  const form = $("settings").querySelector("form"), fields = [...form.elements].filter(each => each.name);
  const fill = () => fields.forEach(field => {
    field.value = field.name === "key" ? session.getItem("tinyllm.key") ?? "" : settings[field.name];
    say(field);
  });
  const say = field => { const out = field.parentNode.querySelector("output"); if (out) out.textContent = field.name === "top_k" && field.value === "0" ? "all" : field.value; };
  form.addEventListener("input", ({ target }) => {
    if (target.name === "key") { keep(session, "tinyllm.key", target.value.trim()); return; }
    if (!target.checkValidity()) return;
    settings[target.name] = target.type === "range" || target.name === "max_tokens" ? +target.value : target.value;
    keep(local, "tinyllm.settings", JSON.stringify(settings));
    say(target);
  });
  $("defaults").onclick = () => { Object.assign(settings, STANDARD); local.removeItem("tinyllm.settings"); fill(); };
  $("set").onclick = () => { menu(false); fill(); $("settings").showModal(); };
}

function grow() { const area = $("text"); area.style.height = "auto"; area.style.height = `${area.scrollHeight}px`; }

async function start() {
  theme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
  prepareSettings();
  watch = new Watch($("runs"));
  try {
    about = await (await ask("/tinyllm/about")).json();
  } catch (error) {
    show("chat");
    return note(error.message);
  }
  look = new Look($("look"), about.ends, () => {}, () => {});
  const hasModel = about.model !== null;
  for (const id of ["new", "list", "set"]) $(id).hidden = !hasModel;
  $("chats").hidden = $("training").hidden = !(hasModel && about.watch);
  $("chats").onclick = () => { show("chat"); $("text").focus(); };
  $("training").onclick = () => show("watch");
  $("new").onclick = () => openChat(fresh());
  document.querySelectorAll(".menu").forEach(each => { each.onclick = () => menu(!$("side").classList.contains("shown")); });
  addEventListener("keydown", event => {
    if (event.key !== "Escape" || $("settings").open) return;
    if ($("side").classList.contains("shown")) { menu(false); document.querySelector("main:not([hidden]) .menu").focus(); } else if (!$("look").hidden) look.close(); else running?.stop();
  });
  if (!hasModel) return show("watch");
  $("model").textContent = about.model;
  if (!about.chat) { $("text").placeholder = "A text for the model to continue"; $("hello").firstChild.textContent = "Begin a text, and the model goes on."; }
  $("ask").onsubmit = event => { event.preventDefault(); if (running) return; const text = $("text").value; if (!text.trim()) return; $("text").value = ""; grow(); send(text); };
  $("text").oninput = grow;
  $("text").onkeydown = event => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); } };
  $("stop").onclick = () => running?.stop();
  addEventListener("pagehide", () => { if (running) { kept.save(running.chat); running.stop(); } });
  addEventListener("storage", event => { // another tab
    if (!event.key?.startsWith(PREFIX) || running) return;
    const same = kept.all().find(one => one.id === chat.id);
    if (same && $("look").hidden && !document.querySelector(".edit")) { chat = same; draw(); } else drawList();
  });
  openChat(kept.all().find(one => one.id === session.getItem("tinyllm.open")) ?? fresh());
}

start();
