"""The page of an inspection: its data are the numbers, no text of a token runs, and it works in a browser."""

import base64
import gzip
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from support.models import EVERYTHING, SMALL_LLAMA, random_model

from tinyllm import Error, LlamaConfig, nn
from tinyllm.models import SequenceClassifier
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tools import inspect_page
from tinyllm.tools.inspect import inspect
from tinyllm.tools.inspect_page import check_size, write_page

BYTES = BPETokenizer([])
CONFIG = LlamaConfig(**SMALL_LLAMA | dict(vocab_size=257, max_position_embeddings=128))
HOSTILE = "</script><script>document.title='ran'</script><img src=x onerror=document.title='ran'>\n&lt; €"


def read(text=HOSTILE, **options):
    return inspect(random_model(CONFIG), BYTES.encode(text), 5, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(read(), BYTES, path, "a <b>model</b>")
    return path


class Elements(html.parser.HTMLParser):
    """The names and attributes of all elements, and the contents of the scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)


def data_of(page):
    return json.loads(Elements(page).scripts[0])


def arrays_of(data):
    """Lens ids as labels, lens probabilities, and for each layer and head its lower triangle."""
    packed = gzip.decompress(base64.b64decode(data["arrays"]))
    shape = len(data["norms"]), len(data["tokens"]), data["top"]
    count, T = int(np.prod(shape)), shape[1]
    ids = np.frombuffer(packed, "<u4", count).reshape(shape)
    shares = np.frombuffer(packed, "<u2", count, 4 * count).reshape(shape) / 65535
    triangles = np.frombuffer(packed, np.uint8, offset=6 * count).reshape(-1, T * (T + 1) // 2)
    assert len(triangles) == sum(data["heads"])
    return np.array(data["words"])[ids], shares, (triangles / 255) ** 2


def test_the_data_are_the_numbers(page):
    found, data = read(), data_of(page)
    labels, shares, triangles = arrays_of(data)
    np.testing.assert_allclose(shares, found.lens.probabilities, atol=0.6 / 65535)
    T = len(found.ids)
    expected = np.concatenate([found.attention(0), found.attention(1)])[:, np.tri(T, dtype=bool)]
    np.testing.assert_allclose(np.sqrt(triangles), np.sqrt(expected), atol=0.51 / 255)
    np.testing.assert_allclose(data["norms"], found.norms, rtol=1e-3)
    tokens = data["tokens"]
    assert [token["id"] for token in tokens] == found.ids.tolist()
    assert [token["rank"] for token in tokens[1:]] == found.rank[1:].tolist()
    np.testing.assert_allclose([token["p"] for token in tokens[1:]], found.probability[1:])
    assert tokens[0]["p"] is None and "rank" not in tokens[0]
    shown = "".join("\n" if token["text"] == "⏎" else token["text"] for token in tokens if not token["part"])
    assert shown == HOSTILE and [token["text"] for token in tokens[-3:]] == ["⋯", "⋯", "€"]
    assert [token["line"] for token in tokens].count(True) == 1
    assert [data["words"][i] for i in data["wordOf"]] == [token["label"] for token in tokens]
    assert labels[-1, 3, 0] == inspect_page.token_label(BYTES, int(found.lens.ids[-1, 3, 0]))


def test_one_layer(tmp_path):
    found = read("abc")
    write_page(found, BYTES, tmp_path / "page.html", layer=1)
    data = data_of(tmp_path / "page.html")
    assert (data["layers"], data["heads"]) == ([1], [6])
    _, _, triangles = arrays_of(data)
    np.testing.assert_allclose(
        np.sqrt(triangles), np.sqrt(found.attention(1)[:, np.tri(3, dtype=bool)]), atol=0.51 / 255
    )


def test_a_layer_that_cannot_be_seen_has_no_maps(tmp_path):
    class Nothing(nn.Module):
        def forward(self, x, *_):
            return x

    model = random_model(CONFIG)
    nn.replace(model, "layers.0.self_attn", lambda name, layer: Nothing())
    write_page(inspect(model, [1, 2, 3]), BYTES, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert data["heads"] == [0, 6] and len(arrays_of(data)[2]) == 6


def test_a_classifier_has_classes_and_no_probabilities(tmp_path):
    model = SequenceClassifier(random_model(EVERYTHING), ["bad", "good"], rng=0)
    write_page(inspect(model, [1, 2, 3]), CharTokenizer("abcdefghijklm"), tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert not data["predicts"] and all(token["p"] is None for token in data["tokens"])
    assert set(arrays_of(data)[0].ravel()) == {"class 0", "class 1"}


def test_the_page_loads_nothing_and_allows_only_its_own_script(page):
    elements = Elements(page)
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}] and len(elements.scripts) == 2
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and not re.search(r"https?://", text)
    assert "innerHTML" not in text and "<title>a &lt;b&gt;model&lt;/b&gt;</title>" in text


def test_wrong_requests(tmp_path):
    with pytest.raises(Error, match="positions=None"):
        write_page(read("abc", positions=[1]), BYTES, tmp_path / "page.html")
    with pytest.raises(Error, match="layers 0 to 1"):
        write_page(read("abc"), BYTES, tmp_path / "page.html", layer=2)
    with pytest.raises(Error, match="cannot be written"):
        write_page(read("abc"), BYTES, tmp_path / "no" / "page.html")
    check_size(600, 270)
    with pytest.raises(Error, match=r"270 maps of 1,000 tokens would be too large .* one layer"):
        check_size(1000, 270)


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def driver():
    from support.browser import browser  # skips where Selenium is missing

    with browser() as driver:
        driver.set_window_size(1400, 1200)
        yield driver


def eventually(driver, condition):
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, 30).until(condition)


@pytest.fixture
def opened(page, driver):
    driver.get("about:blank")
    driver.get(page.as_uri())
    eventually(driver, lambda d: d.execute_script("return document.getElementById('map').width > 300"))
    yield driver
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert (driver.title, errors) == ("a <b>model</b>", [])


def run(driver, script):
    return driver.execute_script(f"return {script}")


def strongest(driver):
    """The position of the token with the strongest background."""
    script = """[...document.querySelectorAll("#text button")].map(
        b => Number((b.style.background.match(/([\\d.]+)\\)$/) || [0, 0])[1]))"""
    return int(np.argmax(run(driver, script)))


def test_a_hostile_text_is_shown_and_not_run(opened):
    texts = run(opened, '[...document.querySelectorAll("#text button")].map(b => b.textContent).join("")')
    assert texts == HOSTILE.replace("\n", "⏎").replace("€", "⋯⋯€")
    assert run(opened, "document.images.length") == 0 and run(opened, "document.scripts.length") == 2


def test_tokens_heads_and_layers_are_chosen_by_mouse_and_keyboard(opened):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.select import Select

    found, tokens = read(), opened.find_elements("css selector", "#text button")
    ActionChains(opened).move_to_element(tokens[9]).perform()
    assert strongest(opened) == found.attention(0, 0)[9].argmax()
    tokens[12].click()
    assert tokens[12].get_attribute("aria-pressed") == "true"
    assert strongest(opened) == found.attention(0, 0)[12].argmax()
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.PAGE_DOWN, Keys.PAGE_DOWN).perform()
    assert run(opened, "document.activeElement.dataset.t") == "13"
    assert opened.find_element("id", "maphead").text == "Attention of layer 1, head 2"
    assert strongest(opened) == found.attention(1, 2)[13].argmax()
    Select(opened.find_element("id", "head")).select_by_visible_text("mean")
    assert strongest(opened) == found.attention(1).mean(axis=0)[13].argmax()
    Select(opened.find_element("id", "way")).select_by_value("from")
    assert strongest(opened) == found.attention(1).mean(axis=0)[:, 13].argmax()
    assert run(opened, "location.hash") == "#t=13&l=1&h=-1&w=from"
    cells = run(
        opened, '[...document.querySelectorAll("#lens tbody tr:first-child td")].map(d => d.textContent)'
    )
    expected = [inspect_page.token_label(BYTES, int(i)) for i in found.lens.ids[-1, 13]]
    assert cells[:5] == expected


def test_light_and_dark(opened):
    def brightness():
        colour = run(opened, "getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    def background():  # of the map, above its diagonal
        canvas = "document.getElementById('map')"
        return sum(
            run(opened, f"[...{canvas}.getContext('2d').getImageData({canvas}.width - 2, 1, 1, 1).data]")[:3]
        )

    def prefer(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def drawn(is_dark):  # the page repaints after the event
        limit = (lambda *c: max(c) < 200) if is_dark else (lambda *c: min(c) > 650)
        return eventually(opened, lambda _: limit(brightness(), background()))

    button = opened.find_element("id", "theme")
    prefer("light")
    assert drawn(is_dark=False) and button.text == "dark"
    prefer("dark")
    assert drawn(is_dark=True) and button.text == "light"
    button.click()
    assert drawn(is_dark=False) and button.text == "dark"
    prefer("light")


def test_a_narrow_page_does_not_scroll_sideways(opened):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert run(opened, "document.documentElement.scrollWidth") <= 360
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
