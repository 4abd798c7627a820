"""Texts, splits, windows, batches: against the classic run's numbers, plain loops, and bad input."""

import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import data
from tinyllm.data import Batches, Text, Windows, check_ids, load_text, train_validation_split
from tinyllm.errors import Error
from tinyllm.tokenizer import load_tokenizer

# Texts


def test_python_docs_is_always_at_hand():
    from pydoc_data.topics import topics

    docs = load_text("python-docs")
    assert docs.name == "python-docs"
    assert docs.sha256 == hashlib.sha256(docs.text.encode("utf-8")).hexdigest()
    assert 300_000 < len(docs.text) < 1_000_000
    assert docs.text.startswith(topics[min(topics)])
    assert all(topic in docs.text for topic in topics.values())
    assert load_text("python-docs") == docs


@pytest.fixture(scope="module")
def verdict():
    folder = os.environ.get("TINYLLM_DATA")
    if folder and (Path(folder) / "the-verdict.txt").exists():
        return load_text("the-verdict")  # outside the try: here an error is a failure, not a skip
    try:
        return load_text("the-verdict")
    except Error as error:
        pytest.skip(f"neither TINYLLM_DATA nor the network has it: {error}")


def test_the_verdict_and_the_classic_run(verdict):
    assert verdict.name == "the-verdict"
    assert verdict.sha256 == data.VERDICT_SHA256
    assert len(verdict.text) == 20_479
    gpt2 = load_tokenizer("gpt2")
    assert len(gpt2.encode(verdict.text)) == 5145
    parts = [gpt2.encode(part) for part in train_validation_split(verdict.text)]
    assert [len(part) for part in parts] == [4612, 534]
    windows = [Windows(part, context=256) for part in parts]
    assert [len(w) for w in windows] == [18, 2]
    assert [w.unused_tokens for w in windows] == [3, 21]
    assert Batches(windows[0], batch_size=2, seed=0).steps_per_epoch == 9


@pytest.fixture
def small_verdict(tmp_path, monkeypatch):
    """The pinned text becomes a small one, the cache and the current folder empty ones."""
    content = b"I HAD always thought Jack Gisburn rather a cheap genius\r\n"
    monkeypatch.setattr(data, "VERDICT_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "VERDICT_URL", "http://127.0.0.1:1/the-verdict.txt")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("TINYLLM_DATA", raising=False)
    return content


@pytest.fixture
def server(monkeypatch):
    """A web server for one file; ``server.content`` is what it serves, ``server.asked`` counts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked = 0
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_the_verdict_is_fetched_once_and_cached(small_verdict, server, monkeypatch):
    server.content = small_verdict
    monkeypatch.setattr(data, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
    first = load_text("the-verdict")
    assert first.text.encode("utf-8") == small_verdict
    assert load_text("the-verdict") == first
    assert server.asked == 1


def test_the_verdict_with_another_hash_is_refused(small_verdict, server, monkeypatch):
    server.content = small_verdict.replace(b"cheap", b"great")
    monkeypatch.setattr(data, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
    with pytest.raises(Error, match="could not be downloaded"):
        load_text("the-verdict")


def test_the_verdict_without_network_says_what_to_do(small_verdict):
    with pytest.raises(Error, match=r"put http://127.0.0.1:1/the-verdict.txt .* TINYLLM_DATA") as raised:
        load_text("the-verdict")
    assert "\n" not in str(raised.value)


def test_the_verdict_comes_from_tinyllm_data_first(small_verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_DATA", str(tmp_path))
    with pytest.raises(Error, match="could not be downloaded"):  # not there: the network is next
        load_text("the-verdict")
    (tmp_path / "the-verdict.txt").write_bytes(small_verdict)
    assert load_text("the-verdict").text.encode("utf-8") == small_verdict
    (tmp_path / "the-verdict.txt").write_bytes(small_verdict + b"more")
    with pytest.raises(Error, match=r"the-verdict.txt' is not the expected text"):
        load_text("the-verdict")


@given(content=st.text().filter(lambda text: text.strip()))
def test_file_is_taken_byte_for_byte(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content.encode("utf-8"))
    loaded = load_text(path)
    assert loaded == Text(str(path), content, hashlib.sha256(content.encode("utf-8")).hexdigest())


def test_file_keeps_its_newlines_and_spaces(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"  one\r\ntwo\rthree\n ")
    assert load_text(str(path)).text == "  one\r\ntwo\rthree\n "


def test_known_name_wins_unless_given_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python-docs").write_text("mine")
    assert load_text("python-docs").text != "mine"
    assert load_text("./python-docs").text == "mine"
    assert load_text(Path("python-docs")).text == "mine"


def test_bad_files(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b" \n\t\r\n")
    for name, said in [
        ("missing", "no text .*missing.*python-docs, the-verdict"),
        (".", "is a folder"),
        ("latin", r"latin.* not UTF-8 at byte offset 3 \(0xe9\)"),
        ("empty", "empty"),
        ("blank", "whitespace"),
        ("zero\0byte", "cannot be read"),
        ("n" * 5000, "cannot be read|no text"),  # which of the two depends on the system
    ]:
        with pytest.raises(Error, match=said):
            load_text(tmp_path / name)


# Splits


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_split_loses_nothing(text, fraction):
    try:
        train, validation = train_validation_split(text, fraction)
    except Error:
        assert int(len(text) * (1 - fraction)) in (0, len(text))
    else:
        assert train and validation
        assert train + validation == text
        assert len(train) == int(len(text) * (1 - fraction))


def test_split_is_nine_to_one_unless_told_otherwise():
    assert train_validation_split("abcdefghij") == ("abcdefghi", "j")
    assert train_validation_split("abcd", validation_fraction=0.5) == ("ab", "cd")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_outside_0_1(fraction):
    with pytest.raises(Error, match="validation_fraction"):
        train_validation_split("some text", fraction)


@pytest.mark.parametrize("text", ["", "a"])
def test_split_of_too_little(text):
    with pytest.raises(Error, match=f"{len(text)} characters"):
        train_validation_split(text)


# Token ids


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        (1, 2),
        range(3),
        [[0, 9], [5, 5]],
        7,
        np.array([1, 2], np.uint8),
        [np.int16(3), 4],
        np.array([[9]]),
    ],
)
def test_check_ids_gives_int64(ids):
    checked = check_ids(ids, vocab_size=10)
    assert checked.dtype == np.int64
    assert np.array_equal(checked, np.asarray(ids))


def test_check_ids_gives_an_array_of_its_own():
    ids = np.array([1, 2])
    check_ids(ids, 10)[0] = 5
    assert ids[0] == 1


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 10, 11], r"^ids\[1\] is 10, .* 0 to 9"),
        ([[1, 2], [3, -1]], r"^ids\[1, 1\] is -1, .* 0 to 9"),
        (np.array([3, 2**64 - 1], np.uint64), r"^ids\[1\] is 18446744073709551615, .* 0 to 9"),
        ([2**80], r"^ids\[0\] is 1208925819614629174706176, .* 0 to 9"),
        (12, "^ids is 12, .* 0 to 9"),
        ([1, 2.0], r"^ids\[1\] is 2.0, not an integer"),
        (np.array([1.5]), r"^ids\[0\] is 1.5, not an integer"),
        ([1, True], r"^ids\[1\] is True, not an integer"),
        (np.array([False]), r"^ids\[0\] is False, not an integer"),
        ([[1], [2, 3]], r"^ids\[0\] is \[1\], not an integer"),
        ("12", "^ids is '12', not an integer"),
        (None, "^ids is None, not an integer"),
        ([], "^ids is empty"),
        (np.zeros((2, 0), int), "^ids is empty"),
    ],
)
def test_check_ids_names_value_position_and_range(ids, said):
    with pytest.raises(Error, match=said):
        check_ids(ids, vocab_size=10)


def test_check_ids_uses_the_name_it_is_given():
    with pytest.raises(Error, match=r"^targets\[0\] is -100"):
        check_ids([-100], 10, name="targets")


# Windows


@given(st.integers(2, 60), st.integers(1, 12), st.none() | st.integers(1, 20))
def test_windows_against_plain_loops(length, context, stride):
    tokens = [100 + i for i in range(length)]  # all different, so that a token names its place
    if length < context + 1:
        with pytest.raises(Error, match=f"{length} tokens .* window of {context}"):
            Windows(tokens, context, stride)
        return
    windows = Windows(tokens, context, stride)
    inputs, targets, seen = [], [], set()
    start = 0
    while start + context + 1 <= length:
        inputs.append(tokens[start : start + context])
        targets.append(tokens[start + 1 : start + context + 1])
        seen.update(tokens[start : start + context + 1])
        start += stride or context
    assert len(windows) == len(inputs)
    x, y = windows[np.arange(len(windows))]
    assert x.dtype == y.dtype == np.int64
    assert x.tolist() == inputs
    assert y.tolist() == targets
    assert windows.unused_tokens == length - len(seen)


def test_windows_index_as_numpy_does():
    windows = Windows(range(10), context=3)  # starts 0, 3, 6
    assert windows[[2, 0]][0].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert windows[-1][1].tolist() == [7, 8, 9]
    assert windows[:2][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [x[0] for x, _ in windows] == [0, 3, 6]
    with pytest.raises(IndexError):
        windows[[3]]


def test_windows_do_not_follow_later_changes_of_the_tokens():
    tokens = np.arange(5)
    windows = Windows(tokens, context=4)
    tokens[:] = 0
    assert windows[0][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "said"),
    [
        (range(9), 0, None, "context is 0"),
        (range(9), -1, None, "context is -1"),
        (range(9), 2.0, None, "context is 2.0"),
        (range(9), 2, 0, "stride is 0"),
        ([], 4, None, "0 tokens .* window of 4 .*need 5"),
        (range(4), 4, None, "4 tokens .* window of 4 .*need 5"),
        (np.zeros((3, 3), int), 1, None, r"shape \(3, 3\)"),
        (np.zeros(9), 2, None, r"tokens\[0\] is 0.0, not an integer"),
        ("some text", 2, None, "tokens is 'some text', not an integer"),
    ],
)
def test_windows_bad_arguments(tokens, context, stride, said):
    with pytest.raises(Error, match=said):
        Windows(tokens, context, stride)


# Batches


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_every_window_once_per_epoch(count, batch_size, seed, epoch):
    batches = Batches(Windows(range(count + 1), context=1), batch_size, seed)
    assert batches.steps_per_epoch == len(range(0, count, batch_size))
    first = epoch * batches.steps_per_epoch
    sizes, seen = [], []
    for step in range(first, first + batches.steps_per_epoch):
        inputs, targets = batches.at(step)
        assert inputs.shape == targets.shape == (len(inputs), 1)
        assert np.array_equal(inputs + 1, targets)
        sizes.append(len(inputs))
        seen += inputs[:, 0].tolist()
    assert sorted(seen) == list(range(count))
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_any_step_without_the_ones_before(seed, steps):
    windows = Windows(range(24), context=2)  # 11 windows, 4 steps an epoch
    visited = Batches(windows, 3, seed)
    for step in steps:
        expected = Batches(windows, 3, seed).at(step)
        assert np.array_equal(visited.at(step), expected)


def test_order_depends_on_seed_and_epoch():
    windows = Windows(range(101), context=1)

    def order(seed, epoch):
        return Batches(windows, 100, seed).at(epoch)[0][:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), order(2**63, 0), order(2**63 + 1, 0)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert all(sorted(o) == list(range(100)) and o != list(range(100)) for o in orders)


def test_order_is_the_documented_one():
    batches = Batches(Windows(range(8), context=1), 3, seed=5)
    order = np.random.Generator(np.random.Philox(key=[5, 2])).permutation(7)
    for i in range(3):
        assert batches.at(2 * 3 + i)[0][:, 0].tolist() == order[3 * i : 3 * i + 3].tolist()


@pytest.mark.parametrize(
    ("batch_size", "seed", "said"),
    [
        (0, 0, "batch_size is 0"),
        (2.5, 0, "batch_size is 2.5"),
        (2, -1, "seed is -1"),
        (2, 2**64, "seed is 18446744073709551616"),
    ],
)
def test_batches_bad_arguments(batch_size, seed, said):
    with pytest.raises(Error, match=said):
        Batches(Windows(range(9), context=2), batch_size, seed)


def test_batches_negative_step():
    with pytest.raises(Error, match="step is -1"):
        Batches(Windows(range(9), context=2), 2, 0).at(-1)
