"""What a model writes, on the page: Markdown becomes elements, and nothing that it writes runs."""

import numpy as np
from support.browser import complaints

# ------------------------------------------------------------------------------------ Markdown

OUTLINE = """
const outline = node => node.nodeType === 3 ? node.textContent : node.tagName === "SPAN" && node.dataset.t
  ? node.textContent : `<${node.tagName.toLowerCase()}>${[...node.childNodes].map(outline).join("")}</>`;
return import("/page.js").then(({ markdown }) => {
  const leaf = (parent, text) => parent.append(text);
  return arguments[0].map(text => markdown(text, leaf).map(([, build]) => outline(build())).join(""));
});
"""

CODE = "<div><header><span>text</><button>Copy</></><pre><code>"

MARKDOWN = {
    "a\nb\n\nc": "<p>a\nb</><p>c</>",
    "# A *b*\n### C ##": "<h3>A <em>b</></><h5>C</>",
    "**a** __b__ *c* _d_": "<p><strong>a</> <strong>b</> <em>c</> <em>d</></>",
    "~~e~~ ***f***": "<p><del>e</> <strong><em>f</></></>",
    "snake_case_name 2 * 3 * 4 **": "<p>snake_case_name 2 * 3 * 4 **</>",
    "*a **b** c* **unclosed": "<p><em>a <strong>b</> c</> **unclosed</>",
    "`a*b*` ``c`d`` `e": "<p><code>a*b*</> <code>c`d</> `e</>",
    r"\*a\* \<b\> \q": r"<p>*a* <b> \q</>",
    "- a\n- b\n  - c\n\n  d\n- e": "<ul><li>a</><li><p>b</><ul><li>c</></><p>d</></><li>e</></>",
    "3. a\n4. b\n\ntext": "<ol><li>a</><li>b</></><p>text</>",
    "- a\n\n- b\n1. c": "<ul><li>a</><li>b</></><ol><li>c</></>",
    "1. a\n   ```\n   x\n   ```\n2. b": f"<ol><li>a{CODE}x</></></></><li>b</></>",
    "> a\n> > b\n\n---": "<blockquote><p>a</><blockquote><p>b</></></><hr></>",
    "| a | b |\n|---|:-:|\n| *c* | d\\|e |\nf": (
        "<div><table><thead><tr><th>a</><th>b</></></><tbody><tr><td><em>c</></><td>d|e</></></></></><p>f</>"
    ),
    "[a *b*](https://x.y/z_(1)) <c>": "<p><a>a <em>b</></> <c></>",
    "see https://x.y/a_b_c. (http://z)": "<p>see <a>https://x.y/a_b_c</>. (<a>http://z</>)</>",
    "[x](javascript:alert(1)) [y](/z) [z](data:,)": "<p>[x](javascript:alert(1)) [y](/z) [z](data:,)</>",
    "![i](http://x/i.png)": "<p><a>i</></>",
    "<b>&amp;</b>": "<p><b>&amp;</b></>",
    "```a b\n<i>\n\n*x*": "<div><header><span>a</><button>Copy</></><pre><code><i>\n\n*x*</></></>",
    "~~~\n```\n~~~\na": f"{CODE}```</></></><p>a</>",
    "": "",
    " \n\n": "",
}


def test_markdown_becomes_these_elements(page):
    assert dict(zip(MARKDOWN, page.script(OUTLINE, list(MARKDOWN)))) == MARKDOWN


PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    *"* _ ` ~ # > - + 1 . | [ ] ( ) ! \\ < & : / a é 😀 ** ``` http://a ]( <b>".split(),
]

ELEMENTS = """P H3 H4 H5 UL OL LI BLOCKQUOTE HR PRE CODE DIV HEADER SPAN BUTTON A EM STRONG DEL
TABLE THEAD TBODY TR TH TD""".split()

RENDERED = """
const [texts, known] = arguments, wrong = [];
return import("/page.js").then(({ markdown }) => {
  for (const text of texts) {
    const leaf = (parent, part, place, offset = 0) => {
      for (let i = 0; i < part.length; i++) if (text[place(offset + i)] !== part[i]) wrong.push([part, text]);
      parent.append(part);
    };
    const box = document.createElement("div");
    box.append(...markdown(text, leaf).map(([, build]) => build()));
    for (const each of box.querySelectorAll("*")) {
      if (!known.includes(each.tagName)) wrong.push([each.tagName, text]);
      if (each.tagName === "A" && !/^https?:/.test(each.href)) wrong.push([each.href, text]);
    }
  }
  return wrong;
});
"""


def test_any_text_becomes_known_elements_whose_text_is_where_it_says(page):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(PIECES, rng.integers(1, 60))) for _ in range(1500)]
    assert page.script(RENDERED, texts, ELEMENTS) == []


TIMED = """
return import("/page.js").then(({ markdown }) => arguments[0].map(text => {
  const began = performance.now();
  markdown(text, (parent, part) => parent.append(part)).forEach(([, build]) => build());
  return performance.now() - began;
}));
"""

REPEATED = [*"*a |_a|**a*|[|[a](|![|`|`a|> |- |(|http://|\\|~~a |#|*a* |[a](http://b) ".split("|")]
REPEATED += ["  - a\n", "1. a\n", "|-", "|a|\n"]


def test_rendering_takes_time_in_proportion_to_a_texts_length(page):
    times = page.script(TIMED, [part * (60_000 // len(part)) for part in REPEATED])
    assert max(times) < 5000, dict(zip(REPEATED, times))


HOSTILE = [
    "<img src=x onerror=pwned=1>",
    "<script>pwned=1</script>",
    "[x](javascript:pwned=1)",
    "[x](JaVaScRiPt:pwned=1) [y](java\tscript:pwned=1) [z](<javascript:pwned=1>)",
    "![x](x' onerror='pwned=1) ![y](https://x/\"onerror=pwned=1)",
    "[x](https://a/\"onmouseover=pwned=1) https://a/'onclick=pwned=1",
    "```<script>pwned=1</script>\n<img src=x onerror=pwned=1>\n```",
    "| <svg onload=pwned=1> | b |\n|---|---|\n| <iframe src=javascript:pwned=1> | `</code><script>pwned=1` |",
    "> # <style>*{display:none}</style>\n\n- <a href=javascript:pwned=1>x</a>\n\n<!-- <x> -->",
    "<details open ontoggle=pwned=1><body onload=pwned=1><base href=//x><form action=javascript:pwned=1>",
    "__proto__ constructor [__proto__](http://[)",
]


def test_nothing_a_model_writes_runs(page):
    """As an answer, a message, a title and what another tab stored."""
    every = "return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    for text in ["\n\n".join(HOSTILE[i::4]) for i in range(4)]:
        page.named("New chat").click()
        page.ask(text, text)
        for each in page.all("#messages a"):
            assert each.get_attribute("href").startswith("https://")
            assert each.get_attribute("rel") == "noopener noreferrer nofollow"
        assert page.all("#messages :is(img, script, svg, iframe, style, details, object, form, link)") == []
        assert not [name for name in page.script(every) if name.startswith("on")]
        assert page.text(".user .body") == text and page.text("#title") == text.split("\n")[0][:80]
    page.reload()
    assert page.script("return typeof pwned") == "undefined"
    assert len(page.all("#list li")) == 4 and len(page.all("script")) == 1


ATTACKS = """
const failures = [], blame = error => { failures.push(error.name); };
const script = document.createElement("script");
script.append("pwned = 1");
document.body.append(script);
try { document.body.innerHTML = "<img src=x onerror='pwned = 2'>"; } catch (error) { blame(error); }
try { document.body.setAttribute("onclick", "pwned = 3"); } catch (error) { blame(error); }
document.body.click();
// Not at once: what a driver evaluates itself may use eval.
setTimeout(() => { try { eval("pwned = 4"); } catch (error) { blame(error); } });
const sent = fetch("https://example.com/").then(() => { failures.push("sent"); }, () => {});
const pause = new Promise(done => setTimeout(done, 200));
return Promise.all([sent, pause]).then(() => [typeof pwned, ...failures]);
"""


def test_the_policy_stops_what_a_mistake_would_let_through(page):
    page.expected = ("Content Security Policy", "Trusted", "ERR_BLOCKED_BY_CSP", "violates")
    assert page.script(ATTACKS) == ["undefined", "TypeError", "TypeError", "EvalError"]
    assert complaints(page.driver)
