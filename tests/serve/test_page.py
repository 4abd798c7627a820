"""The page in a real browser: a chat, a token looked at from inside, runs in progress."""

import json
import re
import time
from importlib.resources import files

import numpy as np
import pytest
from support.browser import NARROW, WIDE, By, Keys, Page, complaints, prefer, resize
from support.page_server import PageServer

from tinyllm.serve.scheduler import Busy
from tinyllm.tools.inspect import inspect

# ------------------------------------------------------------------------------------ the chat


def test_an_answer_streams_and_is_announced(page):
    page.server.say(["Hello **wor", 0.6, "ld**. And", 0.3, " more"])
    page.write("Hi")
    page.until(lambda: "wor" in page.text(".assistant .body"))
    assert page.one("#stop").is_displayed() and not page.is_idle() and page.all(".writing")
    page.until(page.is_idle)
    assert page.text(".assistant .body") == "Hello world. And more" and page.texts(".assistant strong") == [
        "world"
    ]
    assert page.texts(".user .body") == ["Hi"] and page.text("#title") == "Hi" and not page.all(".writing")
    assert page.one("#live").get_attribute("aria-live") == "polite"
    assert page.texts("#live p") == ["Hello world.", "And more"]
    assert page.driver.title == "Hi – tinyllm"


def test_stop_keeps_what_was_written_and_frees_the_row(page):
    page.server.say(["The beginning", 20.0, " and the end"])
    page.write("Hi")
    page.until(lambda: page.text(".assistant .body") == "The beginning")
    # The scripted wait is in the model's step, which ends when the script is replaced.
    page.named("Stop").click()
    page.until(page.is_idle)
    assert page.text(".assistant .body") == "The beginning" and "Stopped." in page.text(".assistant .acts")


def test_another_answer_is_a_version_and_none_is_lost(page):
    page.ask("Hi", "one")
    page.server.say("two")
    page.named("Answer again").click()
    page.until(lambda: page.texts(".assistant .body") == ["two"] and page.is_idle())
    assert "2 / 2" in page.text(".assistant .acts")
    page.named("Previous version").click()
    assert page.texts(".assistant .body") == ["one"]
    assert not page.named("Previous version").is_enabled()
    page.ask("More", "three")
    page.one("[aria-label='Next version']").click()
    assert page.texts(".body") == ["Hi", "two"]
    page.named("Previous version").click()
    assert page.texts(".body") == ["Hi", "one", "More", "three"]


def test_an_edited_message_is_sent_again(page):
    page.ask("Hi", "one")
    page.ask("And?", "two")
    page.one("[aria-label='Edit message']").click()
    area = page.named("Edited message")
    assert area.get_property("value") == "Hi"
    area.send_keys(Keys.ESCAPE)
    assert page.texts(".body") == ["Hi", "one", "And?", "two"]
    page.one("[aria-label='Edit message']").click()
    page.server.say("three")
    page.named("Edited message").send_keys(" there" + Keys.ENTER)
    page.until(lambda: page.texts(".body") == ["Hi there", "three"] and page.is_idle())
    page.named("Previous version").click()
    assert page.texts(".body") == ["Hi", "one", "And?", "two"]


def test_conversations_are_kept_and_can_be_removed(page):
    page.ask("First", "one")
    page.named("New chat").click()
    page.ask("Second", "two\n\n- a\n- b")
    page.reload()
    assert page.texts(".body") == ["Second", "twoab"] and page.texts("#list .name") == ["Second", "First"]
    page.look("a")
    page.named("First").click()
    assert page.texts(".body") == ["First", "one"] and not page.one("#look").is_displayed()
    page.ask("Third", "three")
    assert page.texts("#list .name") == ["First", "Second"]
    page.script(
        "localStorage.setItem('tinyllm.chat.x', '{broken'); localStorage.setItem('tinyllm.settings', '7{')"
    )
    page.reload()
    assert page.texts(".body") == ["First", "one", "Third", "three"]
    page.one("[aria-label='Remove Second']").click()
    page.driver.switch_to.alert.dismiss()
    assert len(page.all("#list li")) == 2
    page.one("[aria-label='Remove First']").click()
    page.driver.switch_to.alert.accept()
    assert page.texts("#list .name") == ["Second"] and page.all(".body") == []


def test_an_answer_that_was_being_written_is_there_after_a_reload(page):
    page.server.say(["half", 1.0, " of it"])
    page.write("Hi")
    page.until(lambda: page.text(".assistant .body") == "half")
    page.reload()
    page.until(lambda: page.texts(".body") == ["Hi", "half"])
    assert "Stopped." in page.text(".assistant .acts")


def damaged_conversations():
    """What the storage may hold under the key of a conversation: each is skipped, and the page works."""
    user = {"id": "u", "role": "user", "text": "Hi", "parent": None, "made": 1}
    answer = {"id": "a", "role": "assistant", "text": "one", "parent": "u", "made": 2, "tokens": []}
    chat = {"id": "x", "title": "Damaged", "used": 1, "nodes": {"u": user, "a": answer}, "leaf": "a"}
    yield from (None, 7, [], chat | {"title": {}}, chat | {"leaf": "z"}, chat | {"nodes": {"u": user}})
    for change in ({"parent": "a"}, {"parent": "z"}, {"text": 5}, {"made": None}, {"tokens": None},
                   {"tokens": [{}]}, {"role": "system"}, {"id": "b"}):  # fmt: skip
        yield chat | {"nodes": {"u": user, "a": answer | change}}


def test_damaged_conversations_and_settings_are_skipped(page):
    put = "localStorage.setItem(arguments[0], JSON.stringify(arguments[1]))"
    page.script(put, "tinyllm.settings", {"temperature": "hot", "top_k": None, "max_tokens": 7, "seed": []})
    for value in damaged_conversations():
        page.script(put, "tinyllm.chat.x", value)
        page.script("sessionStorage.setItem('tinyllm.open', 'x')")
        page.reload()
        assert page.texts("#list .name") == [], value
    page.ask("Hi", "one and more")
    assert page.text(".assistant .body") == "one and" and page.server.answers.sampling[-1] == (0.2, None, 0.9)


def test_a_browser_that_denies_storage(page):
    source = """for (const name of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });"""
    cdp = page.driver.execute_cdp_cmd
    found = cdp("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page.reload()
        page.ask("Hi", "one")
        page.named("Dark").click()
        assert page.texts(".body") == ["Hi", "one"] and page.texts("#list .name") == ["Hi"]
    finally:
        cdp("Page.removeScriptToEvaluateOnNewDocument", found)


def test_a_conversation_removed_while_its_answer_is_written_does_not_come_back(page):
    page.server.say(["half", 20.0])
    page.write("Hi")
    page.until(lambda: page.text(".assistant .body") == "half")
    page.one("[aria-label='Remove Hi']").click()
    page.driver.switch_to.alert.accept()
    page.until(page.is_idle)
    assert page.stored() == [] and page.texts("#list .name") == [] and page.all(".body") == []
    page.ask("Next", "one")
    assert page.texts("#list .name") == ["Next"]


def test_two_tabs_lose_nothing_of_each_other(page):
    page.ask("Hi", "one")
    (chat,) = page.stored()
    last = chat["leaf"]
    more = {"id": "theirs", "role": "user", "text": "Theirs", "parent": last, "made": chat["used"]}
    page.store(chat | {"nodes": chat["nodes"] | {"theirs": more}, "leaf": "theirs"})  # as another tab does
    page.ask("Ours", "two")
    (chat,) = page.stored()
    assert {node["text"] for node in chat["nodes"].values()} == {"Hi", "one", "Theirs", "Ours", "two"}
    assert page.texts(".body") == ["Hi", "one", "Ours", "two"]


def test_a_message_cannot_be_edited_while_an_answer_is_written(page):
    """Its end draws the messages anew, and the edit would be lost."""
    page.ask("Hi", "one")
    page.server.say(["two", 20.0])
    page.write("More")
    page.until(lambda: page.texts(".assistant .body")[-1] == "two")
    assert not page.one("[aria-label='Edit message']").is_enabled()
    assert not page.one("[aria-label='Answer again']").is_enabled()
    page.server.say()
    page.until(page.is_idle)
    assert page.one("[aria-label='Edit message']").is_enabled()


def test_settings_reach_the_model_and_are_kept(page):
    page.named("Settings").click()
    page.named("Instructions to the model").send_keys("Be brief")
    for name, value in (("temperature", "1.5"), ("top_p", "0.5"), ("top_k", "7")):
        page.change(name, value)
    longest = page.one("[name='max_tokens']")
    longest.clear()
    longest.send_keys("3")
    page.named("Done").click()
    page.ask("Hi", "abcdef")
    assert page.server.answers.sampling[-1] == (1.5, 7, 0.5)
    assert page.text(".assistant .body") == "abc" and "longest answer" in page.text(".assistant .acts")
    texts = page.server.engine.scheduler.cache.texts
    assert any("system\nBe brief" in page.server.tokenizer.decode(text) for text in texts)
    page.reload()
    page.named("Settings").click()
    assert page.one("[name='temperature']").get_property("value") == "1.5"
    page.named("Defaults").click()
    assert page.one("[name='temperature']").get_property("value") == "0.2"
    page.active().send_keys(Keys.ESCAPE)
    assert not page.one("#settings").is_displayed()


def test_a_server_that_is_busy_refuses_or_is_gone_is_a_sentence(page, tmp_path, monkeypatch):
    def busy(*_):
        raise Busy

    page.expected = ("Failed to load resource",)
    with monkeypatch.context() as patch:
        patch.setattr(page.server.engine.scheduler, "submit", busy)
        page.write("Hi")
        page.until(lambda: re.search(r"busy: try again in \d+ s", page.text("#messages")))
    page.write("x" * 1200)
    page.until(lambda: "The server refused" in page.texts(".assistant")[-1] and page.is_idle())
    with PageServer(tmp_path / "model") as other:
        gone = Page(page.driver, other)
        gone.open()
        other.say(["begun", 2.0, " never"])
        gone.write("Hi")
        gone.until(lambda: gone.text(".assistant .body") == "begun")
        other.stop()
        gone.until(lambda: gone.all(".assistant .note"))
        gone.until(gone.is_idle)
        assert gone.text(".assistant .body") == "begun"
        gone.write("More")
        gone.until(lambda: "does not reply" in gone.texts(".assistant")[-1])
    page.expected += ("net::ERR",)


def test_the_api_key_is_asked_for(driver, tmp_path):
    with PageServer(tmp_path / "model", api_key="secret") as server:
        page = Page(driver, server)
        page.open()
        page.write("Hi")
        page.until(lambda: "asks for an API key" in page.text("#messages"))
        page.named("Settings").click()
        page.named("API key").send_keys("secret")
        page.named("Done").click()
        page.ask("Hi", "in")
        assert page.texts(".body")[-1] == "in"
        page.look("i")
        assert "secret" not in page.script("return JSON.stringify(localStorage)")
    assert all("401" in each for each in complaints(driver))


def test_a_model_without_a_chat_template_continues_a_text(driver, tmp_path):
    with PageServer(tmp_path / "model", chat=False) as server:
        page = Page(driver, server)
        page.open()
        page.ask("Once", " upon é")
        page.ask(" a", " time")
        assert page.texts(".body") == ["Once", " upon é", " a", " time"]
        page.look("m")
        assert page.text(".seen") == "Once upon \ufffd\ufffd a ti"
    assert complaints(driver) == []


# ---------------------------------------------------------------------------------- inside a token


def test_a_token_shows_its_probabilities_and_another_one_goes_on(page):
    page.ask("Hi", "Say no.")
    page.look("n")
    bars = page.all(".bars button")
    shares = [float(each.text.splitlines()[-1].strip("<%")) for each in bars]
    assert (
        len(bars) == 11 and 0 < sum(shares[:10]) <= 100.5 and shares[:10] == sorted(shares[:10], reverse=True)
    )
    (said,) = page.all(".bars .said")
    assert (
        said.accessible_name.startswith("n, ")
        and said.accessible_name.endswith("chosen")
        and not said.is_enabled()
    )
    other = next(each for each in bars if each.is_enabled())
    chosen = other.find_element(By.CSS_SELECTOR, ".word").get_attribute("title")
    page.server.say("!?")
    other.click()
    page.until(lambda: page.is_idle() and "2 / 2" in page.text(".assistant .acts"))
    assert page.text(".assistant .body") == f"Say {json.loads(chosen)}!?"
    tokens = page.script("return document.querySelectorAll('.assistant [data-t]').length")
    assert tokens == len(page.text(".assistant .body"))
    page.named("Previous version").click()
    assert page.text(".assistant .body") == "Say no."


def test_the_end_of_the_answer_can_be_chosen(page):
    page.ask("Hi", "Say no.")
    end = page.server.engine.stop_ids[0]
    (chat,) = page.stored()
    (node,) = [each for each in chat["nodes"].values() if each["role"] == "assistant"]
    node["tokens"][4]["top"][0] = {"id": end, "text": "<|im_end|>", "p": -0.5}
    page.store(chat)
    page.reload()
    page.look("n")
    assert page.one(".bars button").accessible_name == "end of the answer, 60.7%"
    page.one(".bars button").click()
    assert page.texts(".body") == ["Hi", "Say "]
    assert "2 / 2" in page.text(".assistant .acts")


def test_layers_and_heads_show_the_models_attention(page):
    page.ask("Hi", "Yes")
    page.look("s")
    read = page.server.tokenizer.encode(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYe", special="allow"
    )
    expected = inspect(page.server.model, read)

    def shown():
        titles = page.script("return [...document.querySelectorAll('.seen span')].map(e => e.title)")
        return [float(each.split("  ")[-1].strip("<%")) / 100 for each in titles]

    def assert_shown(layer, head):
        weights = expected.attention(layer)[:, -1]
        page.until(lambda: f"layer {layer + 1}" in page.text("#look"))
        np.testing.assert_allclose(
            shown(), weights.mean(axis=0) if head is None else weights[head], atol=1.01e-3
        )

    assert page.text(".seen") == page.server.tokenizer.decode(read)
    assert_shown(1, None)
    page.named("Head 2").click()
    assert page.named("Head 2").get_attribute("aria-pressed") == "true"
    assert_shown(1, 1)
    page.named("Layer").send_keys(Keys.ARROW_LEFT)
    page.until(lambda: "Head 2 of layer 1" in page.text("#look"))
    assert_shown(0, 1)
    names = [each.accessible_name for each in page.all(".lens button")]
    assert [name.partition(":")[0] for name in names] == ["Layer 0", "Layer 1", "Layer 2"]
    best = expected.lens.probabilities[:, -1, 0]
    assert [float(name.rpartition(", ")[2].strip("%")) for name in names] == pytest.approx(
        100 * best, abs=0.06
    )
    page.all(".lens button")[2].click()
    assert_shown(1, 1)


def test_the_keyboard_moves_through_an_answer_and_escape_closes(page):
    page.ask("Hi", "Yes, a\n\n```py\nb\n```")
    page.named("Look inside this answer").send_keys(Keys.ENTER)
    page.until(lambda: page.all("#look .lens"))
    assert page.texts(".now") == ["Y"] and page.one("#look").is_displayed()
    assert page.active().get_attribute("id") == "look"
    for expected in ("e", "s"):
        page.active().send_keys(Keys.ARROW_RIGHT)
        assert page.texts(".now") == [expected]
    page.active().send_keys(Keys.ARROW_LEFT)
    assert page.texts(".now") == ["e"] and "token 2 of 19" in page.text("#look h2")
    page.named("Next token").click()
    assert page.texts(".now") == ["s"]
    page.active().send_keys(Keys.ESCAPE)
    assert not page.one("#look").is_displayed() and page.texts(".now") == []
    assert page.active().accessible_name == "Look inside this answer"


def test_half_characters_are_one_thing_to_click(page):
    page.ask("Hi", "a😀é b")
    assert page.text(".assistant .body") == "a😀é b"
    page.look("😀")
    assert page.text("#look h2").startswith("�") and "token 5 of 9" in page.text("#look h2")
    page.named("Close").click()
    page.look("b")
    assert page.text(".seen").endswith("a" + "\ufffd" * 6 + " ")


def test_a_byte_order_mark_is_a_character_like_any_other(page):
    page.ask("Hi", "\ufeffYes")
    (chat,) = page.stored()
    (answer,) = [node for node in chat["nodes"].values() if node["role"] == "assistant"]
    assert [answer["text"], *(token["end"] for token in answer["tokens"])] == ["\ufeffYes", 0, 0, 1, 2, 3, 4]


def test_alternatives_are_fetched_where_the_browser_has_none(page):
    page.ask("Hi", "Yes")
    (chat,) = page.stored()
    for node in chat["nodes"].values():
        for token in node.get("tokens", []):
            del token["top"]
    page.store(chat)
    page.reload()
    page.look("e")
    assert len(page.all(".bars button")) == 11


# ------------------------------------------------------------------------------- how it looks


# The element that has the focus, and whether that can be seen: the message's is that of the box around it.
FOCUS = """
const element = document.activeElement;
const style = selector => getComputedStyle(document.querySelector(selector));
const lit = element.id === "text" ? style("#box").borderColor === style("#send").backgroundColor
  : element.id === "look" || getComputedStyle(element).outlineStyle !== "none";
return [element, lit];
"""


def test_every_control_has_a_name_and_can_be_reached(page):
    page.ask("Hi", "Yes\n\n```\nx\n```\n\n[a](https://b.c)")
    page.look("s")
    controls = [each for each in page.all("button, input, textarea, select, a[href]") if each.is_displayed()]
    assert len(controls) > 20 and all(each.accessible_name.strip() for each in controls)
    page.script("document.querySelector('.skip').focus()")
    reached, lit = set(), set()
    for _ in range(80):
        page.active().send_keys(Keys.TAB)
        active, outline = page.script(FOCUS)
        if active.tag_name == "body":
            break
        reached.add(active)
        if outline:
            lit.add(active)
    assert {each for each in controls if each.is_enabled()} - reached == set()
    assert lit == reached


def luminance(driver, selector, which):
    """Of an element's colour, in sRGB: what the contrast of the WCAG is computed from."""
    style = f"return getComputedStyle(document.querySelector('{selector}')).{which}"
    rgb = np.array([float(each) for each in re.findall(r"[\d.]+", driver.execute_script(style))[:3]]) / 255
    return float(
        [0.2126, 0.7152, 0.0722] @ np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(page, scheme):
    prefer(page.driver, scheme)
    page.ask("Hi", "Yes")
    paper = luminance(page.driver, "body", "backgroundColor")
    assert (paper < 0.05) == (scheme == "dark")
    for selector, least in (("body", 7), (".acts", 4.5), ("#look", 7)):
        ink = luminance(page.driver, selector, "color")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > least, selector
    page.named("Light" if scheme == "dark" else "Dark").click()
    assert (luminance(page.driver, "body", "backgroundColor") < 0.05) == (scheme == "light")
    page.reload()
    assert (luminance(page.driver, "body", "backgroundColor") < 0.05) == (scheme == "light")


def test_a_narrow_screen_has_everything(page):
    resize(page.driver, NARROW)

    def fits():
        inside = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        return page.script(inside) <= NARROW[0]

    assert not page.one("#side").is_displayed() or page.one("#side").location["x"] < 0
    page.ask(
        "Hi " + "long" * 40,
        "A" + "b" * 90 + "\n\n```\n" + "c" * 90 + "\n```\n\n| a | b |\n|---|---|\n| " + "d" * 60 + " | e |",
    )
    assert fits()
    page.named("Conversations").click()
    page.until(lambda: page.one("#side").location["x"] == 0)
    assert page.active().accessible_name == "New chat" and fits()
    page.active().send_keys(Keys.ESCAPE)
    page.until(lambda: page.one("#side").location["x"] < 0)
    page.look("A")
    assert fits()
    token, panel = page.one(".now").rect, page.one("#look").rect
    assert token["y"] + token["height"] <= panel["y"] and panel["width"] == NARROW[0]
    page.named("Close").click()
    page.named("Conversations").click()
    page.until(lambda: page.one("#side").location["x"] == 0)
    page.named("Settings").click()
    assert fits() and page.one("#settings").rect["width"] <= NARROW[0]
    page.named("Done").click()


# ------------------------------------------------------------------------------------- the runs


def record(step):
    speed = {"tokens_per_s": 50.0, "lr": 0.1, "grad_norm": 1.0}
    return {"step": step, "tokens": 100 * step, "train_loss": 4 / step} | speed


def append(folder, *records):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


def test_runs_that_have_not_come_far_are_drawn_beside_others(driver, tmp_path):
    """One without a step, one without an evaluation, one with a single point; names are text."""
    names = ["none", "<img src=x onerror=pwned=1>", "one", "many"]
    append(tmp_path / names[0])
    append(tmp_path / names[1], record(1), record(2))
    append(tmp_path / names[2], record(1) | {"val_loss": 3.0})
    append(tmp_path / names[3], *(record(step) | {"val_loss": 3.0 / step} for step in range(1, 9)))
    resize(driver, WIDE)
    with PageServer(tmp_path, runs=[tmp_path / name for name in names], model=False) as server:
        page = Page(driver, server)
        page.open()
        page.until(lambda: page.all(".chart"))
        assert page.texts("#runs .tiles:first-child h3") == names and len(page.all(".chart")) == 4
        assert [len(page.all(f".charts .tile:first-child {mark}")) for mark in ("circle", "circle.ring")] == [
            11,
            2,
        ]
        assert "no step is recorded yet" in page.text("#runs")
        page.change("x", "seconds")
        assert len(page.all(".chart")) == 4 and not page.script("return window.pwned")
    assert complaints(driver) == []


def test_runs_are_drawn_as_they_go_on(driver, tmp_path):
    def log(name, *records):
        append(tmp_path / name, *records)

    for name in ("a", "b"):
        log(name, record(1), record(2) | {"val_loss": 3.0, "train_eval_loss": 2.5})
    (tmp_path / "a" / "samples.txt").write_text("--- step 2\n<img src=x onerror=pwned=1>\n")
    (tmp_path / "b" / "config.json").write_text('{"task": "dpo"}')
    resize(driver, WIDE)
    with PageServer(tmp_path, runs=[tmp_path / "a", tmp_path / "b"], model=False) as server:
        page = Page(driver, server)
        page.open()
        page.until(lambda: page.all(".chart"))
        assert page.texts("#runs .tiles:first-child h3") == ["a", "b"] and len(page.all(".chart")) == 4
        assert not page.one("#new").is_displayed() and not page.one("#chat").is_displayed()
        assert page.text(".samples p") == "<img src=x onerror=pwned=1>"

        def label():
            return page.script("return document.querySelector('.chart').getAttribute('aria-label')")

        assert "a validation: 3 at 2" in label() and "b training: 2.5 at 2" in label()
        assert "Loss, nats per token or pair" in label()
        log("a", record(3), record(4) | {"val_loss": 2.25})
        with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
            file.write("{broken\n")
        page.until(lambda: "a validation: 2.25 at 4" in label())
        assert "line 3 of metrics.jsonl is damaged" in page.text("#runs")
        page.change("x", "tokens")
        assert "a validation: 2.25 at 400" in label()
        resize(driver, NARROW)
        time.sleep(0.3)
        assert driver.execute_script("return document.getElementById('runs').scrollWidth") <= NARROW[0]
        assert complaints(driver) == []
        server.stop()
        page.until(lambda: "does not reply" in page.text("#runs"))
        assert len(page.all(".chart")) == 4
    complaints(driver)


def test_the_page_is_small():
    folder = files("tinyllm.serve") / "page"
    lengths = {each.name: each.read_text(encoding="utf-8").count("\n") for each in folder.iterdir()}
    assert set(lengths) == {"index.html", "page.js", "look.js"} and sum(lengths.values()) < 1200
