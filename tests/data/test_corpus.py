"""Texts: known names, files, folders; pieces and documents; every way in which they can be wrong."""

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm.data import corpus as text
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import (
    Piece,
    Text,
    encode_documents,
    load_text,
    open_corpus,
    train_validation_split,
)
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer

GPT2 = load_tokenizer("gpt2")
OWN = BPETokenizer(train_bpe("it's 12 12  12\n\n  it's..   漢字 漢字!\x1c !\x1c", 268))


def sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()


def jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode("utf-8")


# Known names, and single files


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
    assert verdict.sha256 == text.VERDICT_SHA256
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
    monkeypatch.setattr(text, "VERDICT_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(text, "VERDICT_URL", "http://127.0.0.1:1/the-verdict.txt")
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
    monkeypatch.setattr(text, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
    first = load_text("the-verdict")
    assert first.text.encode("utf-8") == small_verdict
    assert load_text("the-verdict") == first
    assert server.asked == 1


def test_the_verdict_with_another_hash_is_refused(small_verdict, server, monkeypatch):
    server.content = small_verdict.replace(b"cheap", b"great")
    monkeypatch.setattr(text, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt")
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
    assert loaded == Text(str(path), (content,), hashlib.sha256(content.encode("utf-8")).hexdigest())


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


def test_a_file_that_does_not_fit_the_description(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    (tmp_path / "cut").write_bytes("abc é".encode()[:-1])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b" \n\t\r\n")
    for name, said in [
        ("missing", "no text .*missing.*python-docs, the-verdict"),
        ("latin", r"latin.* not UTF-8 at byte offset 3 \(0xe9\)"),
        ("cut", r"cut.* not UTF-8 at byte offset 4 \(0xc3\)"),
        ("empty", "empty"),
        ("blank", "whitespace"),
        ("zero\0byte", "cannot be read"),
        ("n" * 5000, "cannot be read|no text"),  # which of the two depends on the system
    ]:
        with pytest.raises(Error, match=said):
            load_text(tmp_path / name)
    with pytest.raises(Error, match="no text ''"):
        load_text("")


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7])
def test_where_utf8_ends_does_not_depend_on_the_blocks(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    content = "aé漢🙂\r\n" * 3
    (tmp_path / "good").write_bytes(content.encode())
    assert load_text(tmp_path / "good").text == content
    for number, byte in enumerate(content.encode()):
        if byte >= 0xC0:  # the first byte of a character, with an a in place of the second
            damaged = bytearray(content.encode())
            damaged[number + 1] = ord("a")
            (tmp_path / "bad").write_bytes(damaged)
            with pytest.raises(Error, match=rf"not UTF-8 at byte offset {number} \({byte:#04x}\)"):
                open_corpus(tmp_path / "bad")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(Error, match="neither a file nor a folder"):
        open_corpus(tmp_path / "pipe.txt")


# .jsonl and .gz


def test_documents_of_a_jsonl_file(tmp_path):
    documents = ["one", "", "two\nlines é\u2028", "three"]
    lines = jsonl({"id": i, "body": document} for i, document in enumerate(documents))
    (tmp_path / "some.jsonl").write_bytes(b"\r\n" + lines + b"\n\n" + b'{"body": "no newline"}')
    corpus = open_corpus(tmp_path / "some.jsonl", field="body")
    assert list(corpus.documents()) == [*documents, "no newline"]
    assert corpus.num_documents == 5
    assert corpus.num_characters == sum(map(len, corpus.documents()))
    assert corpus.num_bytes == sum(len(document.encode()) for document in corpus.documents())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json", "line 2 of .*some.jsonl' is not JSON"),
        (b'{"text": "cut', "line 2 .* is not JSON"),
        (b"[" * 100_000, "line 2 .* is not JSON"),
        (b"9" * 5000, "line 2 .* is not JSON"),
        (b'["text"]', "line 2 .* is a JSON list"),
        (b'"text"', "line 2 .* is a JSON str"),
        (b"null", "line 2 .* is a JSON NoneType"),
        (b'{"body": "a", "Text": "b"}', r"line 2 .* no field 'text' among its \['body', 'Text'\]"),
        (b"{}", r"line 2 .* no field 'text' among its \[\]"),
        (b'{"text": ["a"]}', "field 'text' in line 2 .* is a list"),
        (b'{"text": null}', "field 'text' in line 2 .* is a NoneType"),
        (b'{"text": "\\ud83d"}', r"field 'text' in line 2 .* lone surrogate '\\ud83d'"),
        (b'{"text": "\xe9"}', r"line 2 .* not UTF-8 at its byte offset 10 \(0xe9\)"),
    ],
)
def test_bad_lines(tmp_path, line, said):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(Error, match=said) as raised:
        open_corpus(tmp_path / "some.jsonl", field="text")
    assert "\n" not in str(raised.value)


def test_blank_jsonl(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": " "}\n{"text": ""}\n')
    with pytest.raises(Error, match="empty or only whitespace"):
        open_corpus(tmp_path / "some.jsonl", field="text")


def test_field_where_it_belongs_and_only_there(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "good"}\n')
    (tmp_path / "some.txt").write_bytes(b"good")
    with pytest.raises(Error, match=r"some.jsonl' holds JSON objects: say which field"):
        open_corpus(tmp_path / "some.jsonl")
    with pytest.raises(Error, match=r"some.jsonl' holds JSON objects: say which field"):
        open_corpus(tmp_path)
    for name in (tmp_path / "some.txt", "python-docs"):
        with pytest.raises(Error, match=r"has no .jsonl file: leave the field 'text' out"):
            open_corpus(name, field="text")
    assert list(open_corpus(tmp_path, field="text").documents()) == ["good", "good"]


def test_gzip_is_the_same_text(tmp_path):
    lines = jsonl({"text": f"document {i}"} for i in range(100))
    for name, content, field in [
        ("a.txt", "caf\u00e9\r\n".encode() * 1000, None),
        ("b.jsonl", lines, "text"),
    ]:
        (tmp_path / name).write_bytes(content)
        half = len(content) // 2  # gzip files may be put one after another
        compressed = gzip.compress(content[:half]) + gzip.compress(content[half:])
        (tmp_path / (name + ".GZ")).write_bytes(compressed)
        plain, packed = (open_corpus(tmp_path / n, field) for n in (name, name + ".GZ"))
        assert list(plain.documents()) == list(packed.documents())
        assert (plain.num_bytes, plain.sha256) == (packed.num_bytes, packed.sha256)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (
        whole[:-1],
        whole[:-4000],
        whole[:5],
        b"",
        b"plain text",
        bytes(flipped),
        whole + b"more",
    ):
        (tmp_path / "some.txt.gz").write_bytes(content)
        with pytest.raises(Error, match=r"some.txt.gz' is damaged or cut short \(") as raised:
            open_corpus(tmp_path / "some.txt.gz")
        assert "\n" not in str(raised.value)


# Folders


def test_folder_in_the_order_of_paths(tmp_path):
    files = {
        "b.txt": "b",
        "a/z.txt": "z",
        "a/deep/er/y.TXT": "y",
        "a.txt": "a",
        "c.jsonl": '{"text": "c"}\n{"text": "d"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "a" / "packed.txt.gz").write_bytes(gzip.compress(b"p"))
    (tmp_path / "a" / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "q"}'))
    for name in ("notes.md", "a/image.png", "a/txt", "only.gz"):
        (tmp_path / name).write_bytes(b"\xff")
    corpus = open_corpus(tmp_path, field="text")
    assert [path.relative_to(tmp_path).as_posix() for path in corpus.files] == [
        "a.txt",
        "a/deep/er/y.TXT",
        "a/packed.jsonl.gz",
        "a/packed.txt.gz",
        "a/z.txt",
        "b.txt",
        "c.jsonl",
    ]
    assert list(corpus.documents()) == ["a", "y", "q", "p", "z", "b", "c", "d"]
    left_out = [path.relative_to(tmp_path).as_posix() for path in corpus.left_out]
    assert left_out == ["a/image.png", "a/txt", "notes.md", "only.gz"]
    loaded = load_text(str(tmp_path), field="text")
    assert loaded.documents == tuple(corpus.documents())
    assert (loaded.name, loaded.left_out, loaded.sha256) == (str(tmp_path), corpus.left_out, corpus.sha256)
    assert loaded.text == "ayqpzbcd"


def test_folder_without_texts(tmp_path):
    (tmp_path / "notes.md").write_bytes(b"text")
    with pytest.raises(Error, match=r"no text among its 1 files: .* .txt, .jsonl, .txt.gz or .jsonl.gz"):
        open_corpus(tmp_path)


def test_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "away.txt").write_bytes(b"away")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a")
    try:
        (folder / "b.txt").symlink_to(tmp_path / "elsewhere" / "away.txt")
    except OSError as error:
        pytest.skip(f"this system makes no links: {error}")
    (folder / "broken.txt").symlink_to(folder / "nowhere.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "away").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    corpus = open_corpus(folder)
    assert list(corpus.documents()) == ["a", "away"]
    assert [path.name for path in corpus.left_out] == ["away", "broken.txt", "circle.txt", "self"]
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)  # asked for by name, it is followed
    assert list(open_corpus(tmp_path / "link").documents()) == ["a", "away"]


def test_what_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "b.txt").write_bytes(b"b\xff")
    with pytest.raises(Error, match=r"b.txt' is not UTF-8 at byte offset 1"):
        open_corpus(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched, pytest.raises(Error, match=r"folder .* cannot be read .*denied"):
        patched.setattr(os, "scandir", refuse)
        open_corpus(tmp_path)
    monkeypatch.setattr(text, "open", lambda path, mode: refuse(path), raising=False)
    with pytest.raises(Error, match=r"a.txt' cannot be read .*denied"):
        open_corpus(tmp_path / "a.txt")


# Hashes


def test_hash_of_one_document_and_of_several(tmp_path):
    one, two = "first é", "second"
    (tmp_path / "a.txt").write_text(one, encoding="utf-8")
    assert open_corpus(tmp_path).sha256 == open_corpus(tmp_path / "a.txt").sha256 == sha256(one)
    (tmp_path / "b.txt").write_text(two, encoding="utf-8")
    digests = bytes.fromhex(sha256(one)) + bytes.fromhex(sha256(two))
    assert open_corpus(tmp_path).sha256 == sha256(digests)


def test_hash_knows_where_documents_end(tmp_path):
    seen = set()
    for documents in (
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        ["abc", ""],
        ["", "abc"],
        ["c", "ab"],
        ["a", "b", "c"],
    ):
        (tmp_path / "some.jsonl").write_bytes(jsonl({"t": document} for document in documents))
        seen.add(open_corpus(tmp_path / "some.jsonl", field="t").sha256)
    assert len(seen) == 7


def test_a_text_that_changed_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"before")
    corpus = open_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"behind")
    for read in (corpus.pieces, corpus.documents):
        with pytest.raises(Error, match=r"a.txt' changed since it was opened"):
            list(read())


# Pieces

# What GPT-2's pattern treats in its own ways: contractions, spaces before things, runs of whitespace, digits,
# and characters that Python takes for whitespace where the pattern does not (U+001C) or the other way round.
NASTY = st.text(
    st.sampled_from(
        " \n\t\r\x1c\x1f\x85\xa0\u2028\u3000\u200b'sdmtlvreLA19é漢字²٣.,!-_🙂\U0001f1e6\u0301\ud7ff"
    ),
    max_size=60,
)


@given(NASTY | st.text(max_size=60), st.integers(1, 9), st.integers(1, 5))
@example("don't  stop\n\n  now 12 34", 1, 1)
@example("a \x1c b\x1c c", 1, 3)
@example("x\x1c\x1f y", 2, 1)
@example("!\x1c!\x1c!\x1c", 1, 1)
@example("a\u3000\u3000b\x85c\xa0 d\u2028", 1, 1)
@example("'s 's\n'll   ", 1, 2)
@example("", 1, 1)
def test_tokens_of_the_pieces_are_those_of_the_whole(tmp_path_factory, content, size, block_bytes):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(b"." + content.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text, "PIECE_CHARACTERS", size)
        patched.setattr(text, "BLOCK_BYTES", block_bytes)
        pieces = list(open_corpus(path).pieces())
    assert "".join(piece.text for piece in pieces) == "." + content
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece in pieces for i in GPT2.encode(piece.text)]
    assert ids == GPT2.encode("." + content)
    own = [i for piece in pieces for i in OWN.encode(piece.text)]
    assert own == OWN.encode("." + content)
    for left, right in pairwise(pieces):
        assert len(left.text) >= size
        assert not left.text[-1].isspace() and right.text[0].isspace()
        assert text.CUT.search(left.text + right.text[0], size - 1).end() == len(left.text)  # the first place


def test_pieces_of_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 4)
    documents = ["ab cd efgh ij", "", "short", "abcd e"]
    (tmp_path / "some.jsonl").write_bytes(jsonl({"t": document} for document in documents))
    assert list(open_corpus(tmp_path / "some.jsonl", field="t").pieces()) == [
        Piece("ab cd", False),
        Piece(" efgh", False),
        Piece(" ij", True),
        Piece("", True),
        Piece("short", True),
        Piece("abcd", False),
        Piece(" e", True),
    ]


@pytest.mark.parametrize("character", [" ", "a", "\x1c"])
def test_no_place_to_cut(tmp_path, monkeypatch, character):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(text, "LONGEST_PIECE", 100)
    (tmp_path / "a.txt").write_text("words " + character * 100, encoding="utf-8")
    assert len(list(open_corpus(tmp_path / "a.txt").documents())) == 1
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    with pytest.raises(Error, match=r"a.txt' has 10[0-9] characters without a place to cut"):
        list(open_corpus(tmp_path / "a.txt").pieces())


def test_memory_stays_flat(tmp_path):
    """60 MB on one line of text, compressed, in the memory of a few pieces."""
    with gzip.open(tmp_path / "large.txt.gz", "wb", compresslevel=1) as file:
        for i in range(60):
            file.write(f"the {i} quick brown foxes ".encode() * 40_000)
    program = """
import sys, tracemalloc
from tinyllm.data.corpus import open_corpus
tracemalloc.start()
corpus = open_corpus(sys.argv[1])
total = sum(len(piece.text) for piece in corpus.pieces())
assert total == corpus.num_characters == corpus.num_bytes > 58_000_000, total
print(len(corpus.sample(1)), tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "large.txt.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sampled, peak = map(int, done.stdout.split())
    assert sampled == 1
    assert peak < 16e6


# Samples


def numbered(tmp_path, count: int) -> str:
    """A file whose words, five characters each, are their own positions."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f" {i:04}" for i in range(count)), encoding="utf-8")
    return str(path)


def test_sample_is_spread_over_the_training_part(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 50)
    corpus = open_corpus(numbered(tmp_path, 5000))
    chosen = corpus.sample(2000)
    assert 2000 <= sum(map(len, chosen)) <= 2050
    starts = [int(piece.split()[0]) for piece in chosen]
    assert starts == sorted(set(starts))
    assert starts[0] == 0 and 4300 < starts[-1] < 4500  # nothing of the last tenth
    assert all(90 < b - a < 130 for a, b in pairwise(starts))
    assert all(int(piece.split()[-1]) < 2500 for piece in corpus.sample(2000, validation_fraction=0.5))


def test_sample_of_more_than_there_is_is_the_training_part(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 50)
    corpus = open_corpus(numbered(tmp_path, 1000))
    assert "".join(corpus.sample(10**9)) == next(corpus.documents())[:4500]


def test_sample_of_too_little(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words")
    with pytest.raises(Error, match="has 10 bytes, too few"):
        open_corpus(tmp_path / "a.txt").sample(5)
    with pytest.raises(Error, match="validation_fraction is 1"):
        open_corpus(tmp_path / "a.txt").sample(5, validation_fraction=1)


# Splits


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_split_loses_nothing(content, fraction):
    try:
        train, validation = train_validation_split(content, fraction)
    except Error:
        assert int(len(content) * (1 - fraction)) in (0, len(content))
    else:
        assert train and validation
        assert train + validation == content
        assert len(train) == int(len(content) * (1 - fraction))


def test_split_is_nine_to_one_unless_told_otherwise():
    assert train_validation_split("abcdefghij") == ("abcdefghi", "j")
    assert train_validation_split("abcd", validation_fraction=0.5) == ("ab", "cd")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_outside_0_1(fraction):
    with pytest.raises(Error, match="validation_fraction"):
        train_validation_split("some text", fraction)


@pytest.mark.parametrize("content", ["", "a"])
def test_split_of_too_little(content):
    with pytest.raises(Error, match=f"{len(content)} characters"):
        train_validation_split(content)


@given(st.lists(st.text(max_size=9), min_size=1), st.floats(0.01, 0.99))
@example(["ab", "", "cd"], 0.5)
@example(["", "abcd", ""], 0.5)
def test_split_of_documents_is_the_split_of_their_text(documents, fraction):
    joined = "".join(documents)
    try:
        expected = train_validation_split(joined, fraction)
    except Error:
        with pytest.raises(Error, match=f"{len(joined)} characters"):
            train_validation_split(documents, fraction)
        return
    train, validation = train_validation_split(iter(documents), fraction)
    assert ("".join(train), "".join(validation)) == expected
    # At most one document is cut in two, and then neither half is empty.
    if len(train) + len(validation) > len(documents):
        assert train[-1] and validation[0]
        train, validation = (*train[:-1], train[-1] + validation[0]), validation[1:]
    assert [*train, *validation] == documents


# Documents to ids


def test_documents_are_joined_by_end_of_text():
    end = GPT2.special_tokens[END_OF_TEXT]
    documents = ["one two", "", " three", "four"]
    ids = encode_documents(GPT2, documents)
    assert ids.dtype == np.uint32
    expected = GPT2.encode("one two"), [], GPT2.encode(" three"), GPT2.encode("four")
    assert ids.tolist() == [*expected[0], end, end, *expected[2], end, *expected[3]]
    assert ids.tolist() == GPT2.encode(END_OF_TEXT.join(documents), special="allow")
    assert encode_documents(GPT2, ["one two"]).tolist() == expected[0]
    assert encode_documents(GPT2, []).tolist() == []


def test_special_is_about_the_documents_not_the_joining():
    documents = ["one", f"two{END_OF_TEXT}three"]
    with pytest.raises(Error, match="contains the special token"):
        encode_documents(GPT2, documents)
    allowed, as_text = (encode_documents(GPT2, documents, special).tolist() for special in ("allow", "text"))
    assert allowed.count(GPT2.special_tokens[END_OF_TEXT]) == 2
    assert as_text.count(GPT2.special_tokens[END_OF_TEXT]) == 1
    assert GPT2.decode(as_text) == f"one{END_OF_TEXT}two{END_OF_TEXT}three"


def test_documents_need_an_end_of_text():
    characters = CharTokenizer("abc")
    assert encode_documents(characters, ["abc"]).tolist() == [0, 1, 2]
    with pytest.raises(Error, match=r"'char' has no <\|endoftext\|> .*with_special_tokens"):
        encode_documents(characters, ["a", "b"])
    extended = characters.with_special_tokens([END_OF_TEXT])
    assert encode_documents(extended, ["a", "b"]).tolist() == [0, 3, 1]
