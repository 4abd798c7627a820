"""Documents from known names, files and folders, and malformed ones of each kind."""

import gzip
import hashlib
import http.server
import json
import os
import re
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data import documents as documents_module
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import (
    Text,
    load_text,
    open_corpus,
    train_validation_split,
)
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer


def sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()


def jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode("utf-8")


# Known names, and single files


def test_python_docs_is_always_available():
    from pydoc_data.topics import topics

    docs = load_text("python-docs")
    assert docs.name == "python-docs"
    assert docs.sha256 == hashlib.sha256(docs.text.encode("utf-8")).hexdigest()
    assert 300_000 < len(docs.text) < 1_000_000
    assert docs.text.startswith(topics[min(topics)])
    assert all(topic in docs.text for topic in topics.values())
    assert load_text("python-docs") == docs


def test_the_verdict_gives_the_known_counts(verdict):
    assert verdict.name == "the-verdict"
    assert verdict.sha256 == documents_module.VERDICT_SHA256
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
    """Replace the pinned text by a small one, and use an empty cache folder."""
    content = b"I HAD always thought Jack Gisburn rather a cheap genius\r\n"
    monkeypatch.setattr(documents_module, "VERDICT_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(documents_module, "VERDICT_URL", "http://127.0.0.1:1/the-verdict.txt")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("TINYLLM_DATA", raising=False)
    return content


@pytest.fixture
def server(monkeypatch):
    """A web server for one file, ``server.content``; ``server.requests`` counts the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.requests = 0
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_the_verdict_is_downloaded_once_and_cached(small_verdict, server, monkeypatch):
    server.content = small_verdict
    monkeypatch.setattr(
        documents_module, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt"
    )
    first = load_text("the-verdict")
    assert first.text.encode("utf-8") == small_verdict
    assert load_text("the-verdict") == first
    assert server.requests == 1


def test_the_verdict_with_another_hash_is_rejected(small_verdict, server, monkeypatch):
    server.content = small_verdict.replace(b"cheap", b"great")
    monkeypatch.setattr(
        documents_module, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/the-verdict.txt"
    )
    with pytest.raises(Error, match="could not be downloaded"):
        load_text("the-verdict")


def test_the_verdict_without_network_states_the_remedy(small_verdict):
    with pytest.raises(Error, match=r"put http://127.0.0.1:1/the-verdict.txt .* TINYLLM_DATA") as raised:
        load_text("the-verdict")
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("(no network connection to 127.0.0.1:1)")


def test_the_runs_in_a_folder_are_no_part_of_its_text(tmp_path):
    folder = tmp_path / "runs" / "one" / "wandb"
    folder.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "samples.txt", "wandb/log.txt"):
        (folder.parent / name).write_text("{}", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "runs" / "b.txt").write_text("b", encoding="utf-8")
    corpus = open_corpus(tmp_path)
    assert [path.name for path in corpus.files] == ["a.txt", "b.txt"]
    assert folder.parent / "samples.txt" in corpus.left_out


def test_the_verdict_is_read_from_tinyllm_data_first(small_verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_DATA", str(tmp_path))
    with pytest.raises(Error, match="could not be downloaded"):  # not in the folder: tries the network
        load_text("the-verdict")
    (tmp_path / "the-verdict.txt").write_bytes(small_verdict)
    assert load_text("the-verdict").text.encode("utf-8") == small_verdict
    (tmp_path / "the-verdict.txt").write_bytes(small_verdict + b"more")
    with pytest.raises(Error, match=r"the-verdict.txt' is not the expected file"):
        load_text("the-verdict")


@given(content=st.text().filter(lambda text: text.strip()))
def test_file_is_read_byte_for_byte(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content.encode("utf-8"))
    loaded = load_text(path)
    assert loaded == Text(str(path), (content,), hashlib.sha256(content.encode("utf-8")).hexdigest())


def test_file_keeps_its_newlines_and_spaces(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"  one\r\ntwo\rthree\n ")
    assert load_text(str(path)).text == "  one\r\ntwo\rthree\n "


def test_known_name_takes_precedence_unless_given_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python-docs").write_text("mine")
    assert load_text("python-docs").text != "mine"
    assert load_text("./python-docs").text == "mine"
    assert load_text(Path("python-docs")).text == "mine"


def test_bad_files_are_rejected(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    (tmp_path / "cut").write_bytes("abc é".encode()[:-1])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b" \n\t\r\n")
    for name, said in [
        ("missing", "no text .*missing.*python-docs, python-docstrings"),
        ("latin", r"latin.* not UTF-8 at byte offset 3 \(0xe9\)"),
        ("cut", r"cut.* not UTF-8 at byte offset 4 \(0xc3\)"),
        ("empty", "empty"),
        ("blank", "whitespace"),
        ("zero\0byte", "cannot be read"),
        ("n" * 5000, "cannot be read|no text"),  # depends on the system
    ]:
        with pytest.raises(Error, match=said):
            load_text(tmp_path / name)
    with pytest.raises(Error, match="no text ''"):
        load_text("")
    for name in (None, 3):
        with pytest.raises(Error, match=f"the text is {name}"):
            load_text(name)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7])
def test_utf8_errors_do_not_depend_on_the_blocks(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", block_bytes)
    content = "aé漢🙂\r\n" * 3
    (tmp_path / "good").write_bytes(content.encode())
    assert load_text(tmp_path / "good").text == content
    for number, byte in enumerate(content.encode()):
        if byte >= 0xC0:  # the first byte of a character; replace the second by an a
            damaged = bytearray(content.encode())
            damaged[number + 1] = ord("a")
            (tmp_path / "bad").write_bytes(damaged)
            with pytest.raises(Error, match=rf"not UTF-8 at byte offset {number} \({byte:#04x}\)"):
                open_corpus(tmp_path / "bad")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_rejected(tmp_path):
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
        (b'{"text": "one", "text": "two"}', "line 2 .* is not JSON .*the key 'text' occurs twice"),
        (b"[" * 100_000, "line 2 .* is not JSON"),
        (b"9" * 5000, "line 2 .* is not JSON"),
        (b'["text"]', "line 2 .* is a JSON list"),
        (b'"text"', "line 2 .* is a JSON str"),
        (b"null", "line 2 .* is a JSON NoneType"),
        (b'{"body": "a", "Text": "b"}', r"line 2 .* no field 'text', only \['body', 'Text'\]"),
        (b"{}", r"line 2 .* no field 'text', only \[\]"),
        (b'{"text": ["a"]}', "field 'text' in line 2 .* is a list"),
        (b'{"text": null}', "field 'text' in line 2 .* is a NoneType"),
        (b'{"text": "\\ud83d"}', r"field 'text' in line 2 .* lone surrogate .*'\\ud83d'"),
        (b'{"text": "\xe9"}', r"line 2 .* not UTF-8 at byte offset 10 of the line \(0xe9\)"),
    ],
)
def test_bad_lines_are_rejected(tmp_path, line, said):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(Error, match=said) as raised:
        open_corpus(tmp_path / "some.jsonl", field="text")
    assert "\n" not in str(raised.value)


def test_blank_jsonl_is_rejected(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": " "}\n{"text": ""}\n')
    with pytest.raises(Error, match="empty or only whitespace"):
        open_corpus(tmp_path / "some.jsonl", field="text")


def test_field_is_required_for_jsonl_only(tmp_path):
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "good"}\n')
    (tmp_path / "some.txt").write_bytes(b"good")
    with pytest.raises(Error, match=r"some.jsonl' contains JSON objects: .* field"):
        open_corpus(tmp_path / "some.jsonl")
    with pytest.raises(Error, match=r"some.jsonl' contains JSON objects: .* field"):
        open_corpus(tmp_path)
    for name in (tmp_path / "some.txt", "python-docs"):
        with pytest.raises(Error, match=r"has no .jsonl file: omit the field 'text'"):
            open_corpus(name, field="text")
    assert list(open_corpus(tmp_path, field="text").documents()) == ["good", "good"]


def test_gzip_gives_the_same_text(tmp_path):
    lines = jsonl({"text": f"document {i}"} for i in range(100))
    for name, content, field in [
        ("a.txt", "caf\u00e9\r\n".encode() * 1000, None),
        ("b.jsonl", lines, "text"),
    ]:
        (tmp_path / name).write_bytes(content)
        half = len(content) // 2  # gzip files may be concatenated
        compressed = gzip.compress(content[:half]) + gzip.compress(content[half:])
        (tmp_path / (name + ".GZ")).write_bytes(compressed)
        plain, packed = (open_corpus(tmp_path / n, field) for n in (name, name + ".GZ"))
        assert list(plain.documents()) == list(packed.documents())
        assert (plain.num_bytes, plain.sha256) == (packed.num_bytes, packed.sha256)


def test_damaged_gzip_is_rejected(tmp_path):
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
        whole[:10] + b"\xff" * 20,  # a block of no type
        whole + b"more",
    ):
        (tmp_path / "some.txt.gz").write_bytes(content)
        with pytest.raises(Error, match=r"some.txt.gz' is damaged or truncated \(") as raised:
            open_corpus(tmp_path / "some.txt.gz")
        assert "\n" not in str(raised.value)


def test_a_line_too_long_to_parse_in_memory_is_rejected(tmp_path, monkeypatch):
    assert documents_module.LONGEST_LINE == 67_108_864
    longest = 2**20
    monkeypatch.setattr(documents_module, "LONGEST_LINE", longest)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", 1) as file:
        file.write(b'{"text": "good"}\n{"text": "')
        for _ in range(50):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(Error, match=f"line 2 of .*bomb.jsonl.gz' has more than {longest:,} bytes"):
            open_corpus(tmp_path / "bomb.jsonl.gz", field="text")
        assert tracemalloc.get_traced_memory()[1] < 4 * longest
    finally:
        tracemalloc.stop()
    line = b'{"text": "%s"}\n' % (b"a" * 1000)
    (tmp_path / "fits.jsonl").write_bytes(line * 2)
    monkeypatch.setattr(documents_module, "LONGEST_LINE", len(line))
    assert open_corpus(tmp_path / "fits.jsonl", field="text").num_documents == 2
    monkeypatch.setattr(documents_module, "LONGEST_LINE", len(line) - 1)
    with pytest.raises(Error, match="line 1 "):
        open_corpus(tmp_path / "fits.jsonl", field="text")


# Folders


def test_folder_is_read_in_the_order_of_paths(tmp_path):
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


def test_folder_without_text_files_lists_the_suffixes_it_has(tmp_path):
    with pytest.raises(Error, match=r"no .txt or .jsonl file; it holds no files"):
        open_corpus(tmp_path)
    for name in ("notes.md", "more.MD", "code.py", "LICENSE"):
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(
        Error, match=r"no .txt or .jsonl file; it holds 2 .md.* 1 .py.*: give a pattern"
    ) as said:
        open_corpus(tmp_path)
    assert "1 without a suffix" in str(said.value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.py", ["A.PY", "src/b.py", "src/deep/c.py"]),
        ("**/*.py", ["A.PY", "src/b.py", "src/deep/c.py"]),
        ("src/*.py", ["src/b.py"]),
        ("*.[pm]?", ["A.PY", "notes.md", "src/b.py", "src/deep/c.py"]),
        ("read*", ["README"]),
        ("*.txt", ["d.txt"]),
        ("*.py.gz", ["src/packed.py.gz"]),
    ],
)
def test_pattern_selects_the_files_of_a_folder(tmp_path, pattern, expected):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("A.PY", "notes.md", "README", "d.txt", "src/b.py", "src/deep/c.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "src" / "packed.py.gz").write_bytes(gzip.compress(b"src/packed.py.gz"))
    corpus = open_corpus(tmp_path, pattern=pattern)
    assert [path.relative_to(tmp_path).as_posix() for path in corpus.files] == expected
    assert len(corpus.left_out) == 7 - len(expected)
    assert load_text(tmp_path, pattern=pattern).documents == tuple(expected)


def test_pattern_selects_the_files_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("a")
    assert load_text(".", pattern="**/*.py").documents == ("a",)
    Path("Docs").mkdir()
    Path("Docs", "a.md").write_text("b")
    assert load_text("Docs", pattern="docs/*.MD").documents == ("b",)


def test_pattern_that_matches_no_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    with pytest.raises(Error, match=r"no file that matches '\*.py'; it holds 1 .txt"):
        open_corpus(tmp_path, pattern="*.py")
    for pattern in ("", ".", 3, ["*.txt"]):
        with pytest.raises(Error, match=re.escape(f"pattern {pattern!r}")):
            open_corpus(tmp_path, pattern=pattern)


def test_pattern_is_rejected_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "python-docs").mkdir()
    for name in ("a.txt", "python-docs"):
        with pytest.raises(Error, match=r"is not a folder: omit the pattern '\*.txt'"):
            open_corpus(name, pattern="*.txt")


def test_jsonl_files_selected_by_a_pattern_are_read_as_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n')
    (tmp_path / "b.md").write_bytes(b"two")
    assert load_text(tmp_path, field="text", pattern="*").documents == ("one", "two")


def test_links_to_files_are_followed_but_not_links_to_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "away.txt").write_bytes(b"away")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a")
    try:
        (folder / "b.txt").symlink_to(tmp_path / "elsewhere" / "away.txt")
    except OSError as error:
        pytest.skip(f"this system cannot create links: {error}")
    (folder / "broken.txt").symlink_to(folder / "nowhere.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "away").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    corpus = open_corpus(folder)
    assert list(corpus.documents()) == ["a", "away"]
    assert [path.name for path in corpus.left_out] == ["away", "broken.txt", "circle.txt", "self"]
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)  # a link given as the path is followed
    assert list(open_corpus(tmp_path / "link").documents()) == ["a", "away"]


def test_unreadable_files_and_folders_are_reported(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "b.txt").write_bytes(b"b\xff")
    with pytest.raises(Error, match=r"b.txt' is not UTF-8 at byte offset 1"):
        open_corpus(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched, pytest.raises(Error, match=r"folder .* cannot be read .*denied"):
        patched.setattr(os, "scandir", refuse)
        open_corpus(tmp_path)
    monkeypatch.setattr(documents_module, "open_regular", refuse)
    with pytest.raises(Error, match=r"a.txt' cannot be read .*denied"):
        open_corpus(tmp_path / "a.txt")
