// What a token might have been, where the model looked and how the token formed; and training runs.
// Everything is built from DOM nodes and text nodes: no text of a model or a server is ever parsed as HTML.

export const $ = id => document.getElementById(id);

const SVG = new Set(["svg", "path", "line", "text", "circle", "g"]);

/** An element. Keys that begin with "on" are listeners, `css` sets properties; children are nodes or text. */
export function h(tag, attributes = {}, ...children) {
  const element = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "css") Object.entries(value).forEach(([name, set]) => element.style.setProperty(name, set));
    else if (value !== false && value != null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter(child => child != null && child !== false));
  return element;
}

class Memory { getItem(key) { return this[key] ?? null; } setItem(key, value) { this[key] = value; } removeItem(key) { delete this[key]; } }

/** The browser's stores; where it denies them, ones that last as long as the page. */
export const [local, session] = ["localStorage", "sessionStorage"].map(name => { try { return window[name] ?? new Memory(); } catch { return new Memory(); } });

/** Store a value, and return whether there was space for it. */
export const keep = (store, key, value) => { try { store.setItem(key, value); return true; } catch { return false; } };

/** An error whose message is a sentence for the page. */
export class Failure extends Error {
  constructor(message, status = 0) { super(message); this.status = status; }
}

/** fetch() that fails with a sentence, also if the server is gone or refuses the request. */
export async function ask(path, body, options = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = session.getItem("tinyllm.key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not reply. Is tinyllm serve still running?");
  }
  if (reply.ok) return reply;
  const said = await reply.json().then(json => json.error?.message, () => null);
  if (reply.status === 401) throw new Failure("The server asks for an API key: enter it under Settings.", 401);
  if (reply.status === 503) {
    const wait = reply.headers.get("Retry-After");
    throw new Failure(`The server is busy: try again ${wait ? `in ${wait} s` : "in a moment"}.`, 503);
  }
  throw new Failure(`The server refused: ${said || `status ${reply.status}`}`, reply.status);
}

// -------------------------------------------------------------------------------- one token

const SHOWN = { "\n": "↵", "\t": "⇥", " ": "␣" };
const percent = p => p >= 0.9995 ? "100%" : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : p > 0 ? "<0.1%" : "0%";

/** A token's text with what cannot be seen made visible: "␣Paris". */
export const visible = text => text === "" ? "∅" : text.replace(/^ +|[\n\t]| +$|[^\p{L}\p{M}\p{N}\p{P}\p{S} ]/gu, found => [...found].map(c => SHOWN[c] ?? `⟨${c.codePointAt(0).toString(16)}⟩`).join(""));

const word = (text, special) =>
  h("span", { class: special ? "word special" : "word", title: JSON.stringify(text) }, special ? text || "end" : visible(text));

const bar = share => h("span", { class: "bar" }, h("i", { css: { width: `${Math.max(0.5, 100 * share)}%` } }));

/** How surprising a token was, 0 (expected) to 3: for the lines under an answer. */
export const surprise = p => p > 0.7 ? 0 : p > 0.3 ? 1 : p > 0.08 ? 2 : 3;

export class Look {
  /** `ends` are the ids that end an answer; `choose(token, alternative)` goes on from there, `moved(token)` marks it. */
  constructor(panel, ends, choose, moved) {
    Object.assign(this, { panel, ends, choose, moved, layer: null, head: null, replies: new Map(), turn: 0 });
    panel.addEventListener("keydown", event => {
      if (event.target.matches("input")) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); this.move(step); }
    });
  }

  /** `answer` has tokens {id, text, p, top} and request(index), the inspection of what came before a token. */
  open(answer, index) {
    const from = this.panel.hidden ? document.activeElement : this.from;
    Object.assign(this, { answer, index, from });
    this.panel.hidden = false;
    this.draw();
    this.panel.focus({ preventScroll: true });
  }

  close() {
    if (this.panel.hidden) return;
    this.panel.hidden = true;
    this.turn++; this.controller?.abort();
    this.moved(null);
    if (this.from?.isConnected) this.from.focus();
  }

  move(step) {
    const next = this.index + step;
    if (next < 0 || next >= this.answer.tokens.length) return;
    this.index = next;
    this.draw();
  }

  draw() {
    const { tokens } = this.answer, token = tokens[this.index], last = tokens.length - 1;
    this.moved(this.index);
    const step = (name, by, off) => h("button", { "aria-label": name, title: name, disabled: off, onclick: () => { this.move(by); this.panel.focus(); } }, by < 0 ? "←" : "→");
    this.bars = h("ul", { class: "bars" });
    this.inside = h("div", { "aria-live": "off" }, h("p", { class: "quiet" }, "Looking inside …"));
    this.panel.replaceChildren(
      h("header", {},
        h("h2", {}, h("mark", {}, visible(token.text)), h("span", { class: "quiet" }, `  ${token.p == null ? "chosen by you" : percent(Math.exp(token.p))} · token ${this.index + 1} of ${last + 1}`)),
        step("Previous token", -1, this.index === 0), step("Next token", 1, this.index === last),
        h("button", { "aria-label": "Close", title: "Close", onclick: () => this.close() }, "✕")),
      h("section", { "aria-label": "What else it might have been" }, h("h3", {}, "It might have been"),
        h("p", { class: "quiet" }, "The model’s probabilities. Choose another, and the answer goes on from there. Words that were less expected are underlined."), this.bars),
      this.inside);
    if (token.top?.length) this.drawBars(token.top);
    this.load(this.layer, reply => this.drawInside(reply));
  }

  drawBars(top) {
    const token = this.answer.tokens[this.index];
    const all = top.some(each => each.id === token.id) || token.p == null ? top : [...top, token];
    this.bars.replaceChildren(...all.map(other => {
      const ends = this.ends.includes(other.id), said = other.id === token.id, p = Math.exp(other.p);
      const broken = !ends && (other.text.includes("\ufffd") || other.text === "");
      const name = `${ends ? "end of the answer" : other.text.trim() || visible(other.text)}, ${percent(p)}${said ? ", chosen" : ""}`;
      return h("li", {}, h("button", {
        class: said ? "said" : "", "aria-label": name, "aria-current": said && "true", disabled: said || broken || this.answer.busy(),
        title: broken ? "part of a character: it cannot be chosen alone" : null, onclick: () => this.choose(this.index, other, ends),
      }, word(ends ? "end of the answer" : other.text, ends), bar(p), h("span", { class: "number" }, percent(p))));
    }));
  }

  /** Look into the model, unless it is known what is there, and show it; of several requests only the last, the others are ended. */
  async load(layer, show) {
    this.controller?.abort(); const turn = ++this.turn, body = { ...this.answer.request(this.index), ...(layer != null && { layer }) }, key = JSON.stringify(body);
    try {
      if (!this.replies.has(key)) {
        await new Promise(done => setTimeout(done, 60)); // a slider, or a key that is held, passes over many
        if (turn !== this.turn) return;
        const reply = await (await ask("/tinyllm/inspect", body, { signal: (this.controller = new AbortController()).signal })).json();
        if (this.replies.size > 60) this.replies.delete(this.replies.keys().next().value);
        this.replies.set(key, reply);
      }
      if (turn === this.turn) show(this.replies.get(key));
    } catch (error) {
      if (turn === this.turn) this.inside.replaceChildren(h("p", { class: "note", role: "alert" }, error.message));
    }
  }

  drawInside(found) {
    this.found = found;
    this.layer = found.layer;
    if (this.head >= found.heads) this.head = null;
    const top = found.lens.at(-1).top.map(each => ({ id: each.id, text: each.text, p: Math.log(each.probability) }));
    if (!this.bars.firstChild) this.drawBars(top);
    const slider = h("input", { type: "range", min: 1, max: found.layers, value: found.layer + 1, "aria-label": "Layer", oninput: event => this.setLayer(event.target.value - 1) });
    slider.value = found.layer + 1;
    this.slider = slider;
    this.label = h("output", {}, `Layer ${found.layer + 1} of ${found.layers}`);
    this.heads = h("div", { class: "heads", role: "group", "aria-label": "Heads" });
    this.seen = h("div", { class: "seen", tabindex: 0, role: "group", "aria-label": "The conversation, darker where the model looked" });
    this.read = h("p", { class: "quiet", "aria-live": "polite" });
    const rows = found.lens.map((row, i) => {
      const best = row.top[0], chosen = this.answer.tokens[this.index].id === best.id, ends = this.ends.includes(best.id);
      const name = `Layer ${i}: ${best.text.trim() || visible(best.text)}, ${percent(best.probability)}`;
      return h("tr", { class: chosen ? "same" : "" }, h("td", {}, h("button", { "aria-label": name, title: row.top.slice(0, 5).map(each => `${visible(each.text)}  ${percent(each.probability)}`).join("\n"), onclick: () => i > 0 && this.setLayer(i - 1) },
        h("span", { class: "number" }, String(i)), word(best.text, ends), bar(best.probability), h("span", { class: "number" }, percent(best.probability)))));
    });
    this.rows = rows;
    this.inside.replaceChildren(
      h("section", { "aria-label": "Where it looked" }, h("h3", {}, "Where it looked"),
        h("p", { class: "quiet" }, "Attention from the place where this token was chosen, over everything before it. The strongest after the first token has the full colour."),
        h("label", { class: "layer" }, this.label, slider), this.heads, this.read, this.seen),
      h("section", { "aria-label": "How it formed" }, h("h3", {}, "How it formed"),
        h("p", { class: "quiet" }, "The most likely token if the model stopped after each layer (0: the embeddings alone). In colour where it is the one that came."),
        h("table", { class: "lens" }, h("tbody", {}, ...rows))));
    this.drawAttention();
  }

  setLayer(layer) {
    if (layer === this.layer) return;
    this.layer = layer;
    this.label.textContent = `Layer ${layer + 1} of ${this.found.layers}`;
    this.slider.value = layer + 1;
    this.load(layer, reply => { this.found = reply; this.drawAttention(); });
  }

  drawAttention() {
    const { attention, tokens, layer } = this.found, count = tokens.length;
    const mean = tokens.map((_, t) => attention.reduce((sum, head) => sum + head[t], 0) / attention.length);
    const choose = head => { this.head = head; this.drawAttention(); this.heads.children[head == null ? 0 : head + 1].focus(); };
    const picture = (weights, head) => {
      const bins = Math.min(count, 40), most = Math.max(...weights.slice(1), 1e-9), stops = [];
      for (let i = 0; i < bins; i++) {
        const part = weights.slice(Math.floor(i * count / bins), Math.max(Math.floor((i + 1) * count / bins), 1 + Math.floor(i * count / bins)));
        const shade = Math.min(1, Math.sqrt(Math.max(...part) / most)) * 100;
        stops.push(`color-mix(in srgb, var(--heat) ${shade.toFixed(0)}%, transparent) ${100 * i / bins}% ${100 * (i + 1) / bins}%`);
      }
      return h("button", { "aria-pressed": String(this.head === head), "aria-label": head == null ? "All heads" : `Head ${head + 1}`, onclick: () => choose(head) },
        h("i", { css: { background: `linear-gradient(to right, ${stops.join(", ")})` } }), head == null ? "all" : String(head + 1));
    };
    this.heads.replaceChildren(picture(mean, null), ...attention.map(picture));
    const weights = this.head == null ? mean : attention[this.head], most = Math.max(...weights.slice(1), 1e-9);
    this.seen.replaceChildren(...tokens.map((token, t) => {
      const share = Math.min(1, weights[t] / most), shade = share < 0.004 ? 0 : Math.sqrt(share) * 92;
      return h("span", { class: [shade > 60 ? "strong" : "", token.special ? "special" : ""].join(" ").trim() || null, css: { "--a": `${shade.toFixed(0)}%` }, title: `${visible(token.text)}  ${percent(weights[t])}` }, token.text);
    }));
    const order = weights.map((weight, t) => [weight, t]).sort((a, b) => b[0] - a[0]).slice(0, 4);
    const who = this.head == null ? "All heads together" : `Head ${this.head + 1}`;
    this.read.replaceChildren(`${who} of layer ${layer + 1}: `, ...order.flatMap(([weight, t], i) =>
      [i ? ", " : "", h("mark", {}, visible(tokens[t].text)), ` ${percent(weight)}`]),
      order[0][1] === 0 ? " (heads that need nothing rest on the first token)." : ".");
    const strong = this.seen.children[order.find(([, t]) => t > 0)?.[1]];
    if (strong) this.seen.scrollTop = Math.max(0, strong.offsetTop - this.seen.offsetTop - this.seen.clientHeight / 2);
    this.rows.forEach((row, i) => row.querySelector("button").setAttribute("aria-pressed", String(i === layer + 1)));
  }
}

// ---------------------------------------------------------------------------- training runs

const COLORS = ["light-dark(#2f6db0, #7db3ea)", "light-dark(#c4571f, #f09a6c)", "light-dark(#2f7f50, #79c79a)", "light-dark(#7d53a3, #c3a0e3)",
  "light-dark(#94720f, #dcb955)", "light-dark(#1f838f, #6fcbd6)", "light-dark(#a83c6f, #ec8fb9)", "light-dark(#5f5f5f, #b5b5b5)"];
const number = value => value == null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(4));
const short = value => Math.abs(value) >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : number(value);
const duration = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
const COLUMN = { step: 0, tokens: 1, seconds: 2 };

/** Round numbers between low and high, about `wanted` of them. */
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw), found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-6 ? 0 : t);
  return found;
}

/** A chart of series {name, color, style, points [[x, y]]}; `zero` begins the vertical axis at 0. */
function chart(title, series, { width, height, zero, format }) {
  const points = series.flatMap(each => each.points);
  const figure = h("div", { class: "tile" }, h("h3", {}, title));
  if (!points.length) return figure.append(h("p", { class: "quiet" }, "nothing recorded yet")), figure;
  const range = (values, from) => { let low = from ?? Infinity, high = -Infinity; for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); } return [low, high]; };
  let [x0, x1] = range(points.map(p => p[0])), [y0, y1] = range(points.map(p => p[1]), zero ? 0 : undefined);
  if (x0 === x1) x1 = x0 + 1;
  const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
  y1 += pad; if (!zero) y0 -= pad;
  const left = 52, right = 12, top = 8, bottom = 24;
  const sx = x => left + (x - x0) / (x1 - x0) * (width - left - right), sy = y => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
  const svg = h("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${series.filter(s => s.points.length && s.name).map(s => `${s.name}: ${number(s.points.at(-1)[1])} at ${format(s.points.at(-1)[0])}`).join("; ")}` });
  for (const y of ticks(y0, y1, height / 45)) svg.append(h("line", { class: "grid", x1: left, x2: width - right, y1: sy(y), y2: sy(y) }), h("text", { x: left - 8, y: sy(y) + 4, "text-anchor": "end" }, short(y)));
  for (const x of ticks(x0, x1, width / 80)) svg.append(h("text", { x: sx(x), y: height - 6, "text-anchor": "middle" }, format(x)));
  for (const each of series) {
    const group = h("g", { css: { "--c": each.color } });
    group.append(h("path", { class: each.style, d: each.points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join("") }));
    if (each.dots && each.points.length) {
      each.points.forEach(([x, y]) => group.append(h("circle", { cx: sx(x), cy: sy(y), r: 3 })));
      const best = each.points.reduce((a, b) => b[1] < a[1] ? b : a);
      group.append(h("circle", { class: "ring", cx: sx(best[0]), cy: sy(best[1]), r: 7 }));
    }
    svg.append(group);
  }
  const cross = h("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" }), key = h("div", { class: "key" });
  svg.append(cross);
  const show = at => {
    cross.setAttribute("visibility", at == null ? "hidden" : "visible");
    key.replaceChildren(...series.filter(s => s.name && s.points.length).map(s => {
      const near = at == null ? s.points.at(-1) : s.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      return h("span", {}, h("span", { class: "dot", css: { "--c": s.color, display: "inline-block" } }), ` ${s.name} ${number(near[1])}${at == null ? "" : ` at ${format(near[0])}`}`);
    }));
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    if (x < left || x > width - right) return show(null);
    cross.setAttribute("x1", x); cross.setAttribute("x2", x);
    show(x0 + (x - left) / (width - left - right) * (x1 - x0));
  });
  svg.addEventListener("pointerleave", () => show(null));
  show(null);
  figure.append(svg, key);
  return figure;
}

export class Watch {
  constructor(place) {
    this.place = place;
    for (const id of ["x", "y"]) $(id).addEventListener("change", () => this.draw());
    addEventListener("resize", () => { clearTimeout(this.late); this.late = setTimeout(() => this.draw(), 120); });
  }

  async start() {
    if (this.going) return;
    for (this.going = true; this.going;) {
      if (document.visibilityState === "visible") await this.update();
      await new Promise(done => setTimeout(done, 2000));
    }
  }

  stop() { this.going = false; }

  async update() {
    try {
      const runs = (await (await ask("/tinyllm/runs")).json()).runs, now = JSON.stringify(runs);
      this.problem = null;
      if (now !== this.before) { this.before = now; this.runs = runs; this.draw(); }
    } catch (error) {
      if (this.problem === error.message) return;
      this.problem = error.message; this.before = null;
      this.draw();
    }
  }

  draw() {
    const { place, runs } = this;
    if (place.closest("main").hidden) return;
    const problem = this.problem && h("p", { class: "note", role: "alert" }, this.problem);
    if (!runs) return place.replaceChildren(...[problem].filter(Boolean));
    const x = $("x").value, column = COLUMN[x], bits = $("y").value === "bits", one = runs.length === 1;
    const format = x === "seconds" ? duration : short;
    const curve = (run, key, unit = 1) => (run.curves[key] || []).map(point => [point[column], point[3] / unit]);
    const unit = run => bits ? run.bytes_per_token ? Math.LN2 * run.bytes_per_token : Infinity : 1;
    const loss = runs.flatMap((run, i) => {
      if (!isFinite(unit(run))) return [];
      const name = one ? "" : `${run.name} `, of = key => curve(run, key, unit(run));
      return [{ name: one && "training batch", color: COLORS[i], style: "faint", points: of("train_loss") },
        { name: `${name}training`, color: COLORS[i], style: "dash", points: of("train_eval_loss") },
        { name: `${name}validation`, color: one ? COLORS[1] : COLORS[i], dots: true, points: of("val_loss") }];
    });
    const width = Math.max(300, place.clientWidth - 76), narrow = innerWidth < 800, third = narrow ? width : Math.max(260, width / 3 - 30);
    const small = (title, key, zero) => chart(title, runs.map((run, i) => ({ name: one ? "now" : run.name, color: COLORS[i], points: curve(run, key) })), { width: third, height: 170, zero, format });
    const missing = bits ? runs.filter(run => !run.bytes_per_token).map(run => run.name) : [];
    const open = new Set([...place.querySelectorAll("details[open]")].map(each => each.dataset.run));
    place.replaceChildren(...[problem,
      h("div", { class: "tiles" }, ...runs.map((run, i) => this.tile(run, COLORS[i], unit(run), bits))),
      missing.length ? h("p", { class: "quiet" }, `No bits per byte were recorded for ${missing.join(", ")}.`) : null,
      h("div", { class: "charts" },
        chart(bits ? "Loss, bits per byte" : `Loss, nats per ${[...new Set(runs.map(run => run.unit))].join(" or ")}`, loss, { width, height: narrow ? 240 : 330, format }),
        small("Tokens per second", "tokens_per_s", true), small("Learning rate", "lr", true), small("Gradient norm", "grad_norm", true)),
      h("div", { class: "tiles" }, ...runs.filter(run => run.samples.length).map(run => {
        const [last, ...earlier] = [...run.samples].reverse(), line = each => h("li", {}, h("span", { class: "quiet" }, `step ${each.step.toLocaleString("en")}`), h("p", {}, each.text));
        return h("div", { class: "tile samples" }, h("h3", {}, one ? "Samples" : `Samples of ${run.name}`), h("ul", {}, line(last)),
          earlier.length ? h("details", { open: open.has(run.name), "data-run": run.name }, h("summary", { class: "quiet" }, `${earlier.length} earlier`), h("ul", {}, ...earlier.map(line))) : null);
      }))].filter(Boolean));
  }

  tile(run, color, unit, bits) {
    const { last, best } = run, show = value => value == null || !isFinite(unit) ? "–" : (value / unit).toFixed(bits ? 3 : 4);
    const state = run.age == null ? "" : run.age < 60 ? "wrote just now" : `wrote ${duration(run.age)} ago`;
    const line = (name, value) => [h("dt", {}, name), h("dd", {}, value)];
    return h("div", { class: "tile" }, h("h3", {}, h("span", { class: "dot", css: { "--c": color } }), run.name), h("span", { class: "quiet" }, state),
      ...run.notes.map(note => h("p", { class: "note" }, note)),
      last ? h("dl", {}, line("step", number(last.step)), line("tokens", number(last.tokens)), line("training time", duration(last.seconds)),
        line("tokens per second", number(last.tokens_per_s)), line("training batch", show(last.train_loss)),
        line("validation", show(last.val_loss)), line("best validation", best ? `${show(best.val_loss)} at step ${number(best.step)}` : "–")) : null);
  }
}
