"""Reading untrusted files: paths that are not files, and invalid JSON that Python's parser accepts."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import files
from tinyllm.data.corpus import open_corpus
from tinyllm.errors import Error
from tinyllm.files import check_is_file, check_is_writable, parse_json, read_file, read_json, read_text
from tinyllm.weights.gguf_format import read_header

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes with names and no /dev/zero")


def message_of(call, *args):
    with pytest.raises(Error) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("read", [read_file, read_text, read_json])
def test_reading_anything_but_a_file_is_refused(tmp_path, read):
    assert str(tmp_path) in message_of(read, tmp_path)
    assert "No such file" in message_of(read, tmp_path / "none.json")
    with pytest.raises(OSError):
        check_is_file(tmp_path)


@posix
def test_reading_a_pipe_or_device_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    messages = []
    for name in ("pipe", "link"):
        reader = threading.Thread(
            target=lambda name=name: messages.append(message_of(read_file, tmp_path / name))
        )
        reader.daemon = True
        reader.start()
        reader.join(20)
        assert messages and str(tmp_path / name) in messages.pop() and not reader.is_alive()


ENDLESS = Path("/proc/self/pagemap")  # a regular file of size 0, from which gigabytes can be read


@pytest.mark.skipif(not ENDLESS.exists(), reason="only Linux has /proc")
def test_files_of_the_kernel_are_as_empty_as_their_size_says(tmp_path):
    (tmp_path / "config.json").symlink_to(ENDLESS)
    assert read_file(tmp_path / "config.json") == b""
    assert "is not JSON" in message_of(read_json, tmp_path / "config.json")
    (tmp_path / "text.txt").symlink_to(ENDLESS)
    (tmp_path / "more.txt").write_text("words")
    assert list(open_corpus(tmp_path).documents()) == ["words", ""]
    (tmp_path / "model.gguf").symlink_to(ENDLESS)
    assert "is not a complete GGUF file" in message_of(read_header, tmp_path / "model.gguf")


@posix
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text.jsonl"])
def test_a_pipe_that_replaced_a_file_after_the_check_is_refused(tmp_path, monkeypatch, name):
    """Neither waits for a writer, which open() would do."""
    (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    check = files.check_is_file

    def swap(path):
        status = check(path)
        os.replace(tmp_path / "pipe", tmp_path / name)
        monkeypatch.setattr(files, "check_is_file", check)
        return status

    monkeypatch.setattr(files, "check_is_file", swap)
    lowest = [os.dup(0)]
    os.close(lowest[0])
    with pytest.raises(OSError, match="regular file"):
        files.open_regular(tmp_path / name)
    lowest.append(os.dup(0))
    os.close(lowest[1])
    assert lowest[0] == lowest[1]  # it is not left open


def test_a_file_too_large_for_memory_is_refused(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)  # sparse: it takes no space
    assert "more than 536,870,912 bytes" in message_of(read_json, tmp_path / "config.json")
    assert read_file(tmp_path / "config.json", 3) == bytes(3)


JUST_WRITTEN = {"files.py", "weights/pull.py"}  # these may open a file by name


def test_every_reader_opens_files_with_open_regular():
    package, unsafe = Path(files.__file__).parent, re.compile(r'(?<![\w.])open\([^)]*"r?b"\)|\.open\("r')
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in JUST_WRITTEN:
            assert unsafe.findall(path.read_text(encoding="utf-8")) == [], path


@posix
def test_a_lock_that_is_a_link_to_a_file_leaves_the_file_alone(tmp_path):
    """Before 3.20.1 filelock emptied it."""
    (tmp_path / "diary").write_text("precious")
    (tmp_path / "lock").symlink_to("diary")
    with pytest.raises(OSError):
        files.lock(tmp_path / "lock", "busy")
    assert (tmp_path / "diary").read_text() == "precious"


@posix
def test_symbolic_links_are_followed(tmp_path):
    """As in the hub's cache: snapshots/REVISION/config.json is a link to ../../blobs/HASH."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b'{"a": 1}')
    (tmp_path / "config.json").symlink_to("blobs/abc")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_two_programs_that_write_a_file_at_once_do_not_mix_their_bytes(tmp_path):
    path = tmp_path / "file"
    with files.replacing(path) as first:
        first.write_bytes(b"1" * 9)
        with files.replacing(path) as second:
            second.write_bytes(b"2" * 4)
        assert path.read_bytes() == b"2" * 4
    assert path.read_bytes() == b"1" * 9 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path, stop):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(stop), files.replacing(path) as new:
        new.write_text("ne")
        raise stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@posix
def test_a_file_that_cannot_be_replaced_is_known_before(tmp_path, monkeypatch):
    """Replacing a file needs permission to make one in its folder; a device is written directly."""
    asked = []
    monkeypatch.setattr(os, "access", lambda *arguments: asked.append(arguments))
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        assert f"no file can be made in {tmp_path}" in message_of(check_is_writable, tmp_path / name)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
    check_is_writable(Path(os.devnull))


def test_time_of_a_repeated_key_is_linear():
    data = b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b',"199999":1}'
    started = time.process_time()
    with pytest.raises(ValueError, match="'199999' occurs twice"):
        parse_json(data)
    assert time.process_time() - started < 5  # 0.2; half an hour if every key were counted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": NaN}', "NaN is not"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1e999]", "1e999 is too large"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "'b' occurs twice"),
        (rb'{"a": "x\ud800"}', "surrogates not allowed"),
        (rb'{"\uDFFF": 1}', "surrogates not allowed"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b"\xff", "utf-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"", "Expecting value"),
    ],
)
def test_invalid_json_is_refused(tmp_path, text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_json(text)
    (tmp_path / "x.json").write_bytes(text)
    message = message_of(read_json, tmp_path / "x.json")
    assert str(tmp_path / "x.json") in message and problem in message and "copy it again" in message


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(values, st.booleans())
@example("\U0001f44d", True)  # two escaped halves
@example({"a": 1e308}, False)
@example(10**400, False)
def test_json_round_trip(value, escaped):
    assert parse_json(json.dumps(value, ensure_ascii=escaped).encode("utf-8")) == value


@given(st.binary(max_size=30))
@example(b"-1e400")
def test_arbitrary_bytes_are_json_or_raise_value_error(data):
    try:
        value = parse_json(data)
    except ValueError:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")  # and can be written again


def test_read_text_normalizes_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\rc\n".encode())
    assert read_text(tmp_path / "a.txt") == "é\nb\nc\n"
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert "a.txt is not text in UTF-8" in message_of(read_text, tmp_path / "a.txt")
