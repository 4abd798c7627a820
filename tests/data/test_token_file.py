"""Token files: ids equal those encoded in memory, also after interruptions; and damaged files."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data import corpus as corpus_module
from tinyllm.data import token_file
from tinyllm.data.corpus import encode_documents, open_corpus
from tinyllm.data.token_file import INDEX, PART, PROGRESS, TOKENS, TokenFile, tokenize_corpus
from tinyllm.errors import Error
from tinyllm.files import lock
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tokenizers.char import CharTokenizer

GPT2 = load_tokenizer("gpt2")
BYTES = BPETokenizer([])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Use chunks of 100 characters and record every 3 chunks, instead of a million and 16."""
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(token_file, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(token_file, "CHUNKS_PER_FLUSH", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"t": d}) + "\n" for d in documents), encoding="utf-8", newline="")
    return open_corpus(path, field="t")


@pytest.fixture
def corpus(tmp_path):
    """Documents of 0 to 600 characters, some of which end exactly at the end of a chunk."""
    documents = [("word é漢 " * n)[: 7 * n] for n in (1, 0, 90, 0, 0, 3, 50, 14)] + ["ten chars." * 10]
    return write_jsonl(tmp_path / "corpus.jsonl", [*documents * 6, "", "the end"])


def expected(corpus, tokenizer=GPT2, special="refuse"):
    return encode_documents(tokenizer, corpus.documents(), special).tolist()


# The ids


@given(st.lists(st.text("ab \n'é漢", max_size=40), min_size=1, max_size=12), st.integers(1, 30))
def test_ids_equal_those_encoded_in_memory(tmp_path_factory, documents, size):
    folder = tmp_path_factory.mktemp("any")
    corpus = write_jsonl(folder / "some.jsonl", ["x", *documents])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus_module, "PIECE_CHARACTERS", size)
        patched.setattr(token_file, "PIECE_CHARACTERS", size)
        file = tokenize_corpus(corpus, GPT2, "refuse", folder / "tokens")
    assert file.tokens.tolist() == expected(corpus)
    ends = np.cumsum([0] + [count for count, _ in file.index["chunks"]])
    assert ends[-1] == file.index["count"] == len(file.tokens)
    for (_, num_bytes), begin, end in zip(file.index["chunks"], ends, ends[1:]):
        plain = [i for i in file.tokens[begin:end] if i != GPT2.special_tokens[END_OF_TEXT]]
        assert num_bytes == len(GPT2.decode_bytes(np.array(plain, dtype=int)))


def test_files_in_the_folder(tmp_path, corpus):
    file = tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "new" / "tokens")
    assert file.tokens.tolist() == expected(corpus)
    assert isinstance(file.tokens, np.memmap) and file.tokens.dtype == np.dtype("<u2")
    assert not file.tokens.flags.writeable
    assert {path.name for path in file.folder.iterdir()} - {token_file.LOCK} == {TOKENS, INDEX}
    index = json.loads((file.folder / INDEX).read_text(encoding="utf-8"))
    assert index == file.index
    assert (index["format"], index["dtype"], index["special"]) == (1, "<u2", "refuse")
    assert index["tokenizer"] == GPT2.to_json()
    assert index["corpus"] == {"name": corpus.name, "sha256": corpus.sha256, "bytes": corpus.num_bytes}
    assert sum(num_bytes for _, num_bytes in index["chunks"]) == corpus.num_bytes
    assert len(index["chunks"]) > 20


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_have_two_bytes_if_they_fit(tmp_path, vocab_size, dtype):
    characters = [chr(i) for i in range(32, 2**17) if not 0xD800 <= i < 0xE000][:vocab_size]
    tokenizer = CharTokenizer("".join(characters))
    (tmp_path / "a.txt").write_text(characters[0] + characters[-1], encoding="utf-8")
    file = tokenize_corpus(open_corpus(tmp_path / "a.txt"), tokenizer, "refuse", tmp_path / "tokens")
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.tokens.tolist() == [0, vocab_size - 1]


def test_special_tokens_in_the_text(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", ["a" * 200, f"one{END_OF_TEXT}two", "three"])
    with pytest.raises(Error, match="contains the special token"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "refuse")
    for special, count in (("allow", 3), ("text", 2)):
        file = tokenize_corpus(corpus, GPT2, special, tmp_path / special)
        assert file.tokens.tolist() == expected(corpus, special=special)
        assert file.tokens.tolist().count(GPT2.special_tokens[END_OF_TEXT]) == count


def test_marked_text_has_the_tokens_and_chunks_of_a_jsonl_file(tmp_path, corpus):
    documents = list(corpus.documents())
    (tmp_path / "marked.txt").write_bytes(END_OF_TEXT.join(documents).encode("utf-8"))
    lines = tokenize_corpus(corpus, GPT2, "allow", tmp_path / "lines")
    marked = tokenize_corpus(open_corpus(tmp_path / "marked.txt"), GPT2, "allow", tmp_path / "marked")
    assert marked.tokens.tolist() == lines.tokens.tolist()
    assert marked.index["chunks"] == lines.index["chunks"]
    parts = zip(marked.split(0.3), lines.split(0.3))
    assert all(np.array_equal(ours, theirs) for ours, theirs in parts)  # ids of both parts, and bytes


def test_bytes_of_special_tokens_are_missing_only_if_allowed(tmp_path):
    (tmp_path / "a.txt").write_text(f"one{END_OF_TEXT}two", encoding="utf-8")
    tokenize_corpus(open_corpus(tmp_path / "a.txt"), GPT2, "allow", tmp_path / "tokens")
    index = json.loads((tmp_path / "tokens" / INDEX).read_text(encoding="utf-8"))
    assert index["chunks"] == [[3, 6]] and index["corpus"]["bytes"] == 6 + len(END_OF_TEXT)
    for change in ({"special": "text"}, {"chunks": [[3, 60]]}):
        (tmp_path / "tokens" / INDEX).write_text(json.dumps(index | change), encoding="utf-8")
        with pytest.raises(Error, match="damaged"):
            TokenFile.open(tmp_path / "tokens")


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_order_does_not_depend_on_thread_timing(tmp_path, corpus, monkeypatch, threads):
    def slow_start(tokenizer, documents, special):
        time.sleep(0.002 * (len(calls) % 5))  # later chunks often finish first
        calls.append(threading.current_thread().name)
        return encode_documents(tokenizer, documents, special)

    calls = []
    monkeypatch.setattr(token_file, "encode_documents", slow_start)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t").tokens.tolist() == expected(corpus)
    assert len(set(calls)) == int(threads)


def test_complete_file_is_opened_not_rewritten(tmp_path, corpus, monkeypatch):
    tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    monkeypatch.delattr(token_file, "encode_documents")
    assert tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t").tokens.tolist() == expected(corpus)


def test_progress_counts_bytes(tmp_path, corpus, monkeypatch):
    class Bar:
        def __init__(self, total, initial, disable, **_):
            self.total, self.done, self.disable = total, initial, disable
            bars.append(self)

        def update(self, count):
            self.done += count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    bars = []
    monkeypatch.setattr("tqdm.tqdm", Bar)
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    monkeypatch.setattr(token_file, "_record", RECORD)
    tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t", progress=False)
    assert [bar.disable for bar in bars] == [None, True]  # None: only on a terminal
    assert 0 < bars[0].done < bars[1].done == bars[0].total == corpus.num_bytes


# Interruptions

RECORD = token_file._record


def interrupt_after(monkeypatch, records):
    def record(*arguments):
        done.append(RECORD(*arguments))
        if len(done) == records:
            raise KeyboardInterrupt

    done = []
    monkeypatch.setattr(token_file, "_record", record)


def test_resumes_after_ctrl_c_without_leftover_threads(tmp_path, corpus, monkeypatch):
    def counting(tokenizer, documents, special):
        encoded.append(documents)
        return encode_documents(tokenizer, documents, special)

    encoded = []
    interrupt_after(monkeypatch, 4)
    with pytest.raises(
        KeyboardInterrupt
    ) as stopped:  # keeps every frame of the call alive, as a debugger does
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    assert stopped and not [thread.name for thread in threading.enumerate() if "Executor" in thread.name]
    with pytest.raises(Error, match="not contain a complete token file"):
        TokenFile.open(tmp_path / "t")

    monkeypatch.setattr(token_file, "_record", RECORD)
    monkeypatch.setattr(token_file, "encode_documents", counting)
    file = tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    assert file.tokens.tolist() == expected(corpus)
    assert len(encoded) == len(file.index["chunks"]) - 4 * 3  # recorded chunks are not encoded again


KILLED = """
import os, signal, sys, tqdm
from pathlib import Path
from tinyllm.data import corpus as corpus_module
from tinyllm.data import token_file
from tinyllm.tokenizers import load_tokenizer

corpus_module.PIECE_CHARACTERS = token_file.PIECE_CHARACTERS = 100
token_file.CHUNKS_PER_FLUSH = 7
tqdm.tqdm.monitor_interval = 0  # its thread does not survive a fork
corpus, folder = corpus_module.open_corpus(sys.argv[1], field="t"), Path(sys.argv[2])
gpt2 = load_tokenizer("gpt2")
whole = token_file.tokenize_corpus(corpus, gpt2, "refuse", folder / "whole")

def killed_at(number):
    calls = []
    def dying(function):
        def call(*arguments):
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(function)
            return function(*arguments)
        return call
    for name in ("fsync", "replace", "remove"):
        setattr(os, name, dying(getattr(os, name)))
    token_file.tokenize_corpus(corpus, gpt2, "refuse", folder / str(number))
    os._exit(0)

for number in range(1000):
    if (child := os.fork()) == 0:
        killed_at(number)
    status = os.waitpid(child, 0)[1]
    again = token_file.tokenize_corpus(corpus, gpt2, "refuse", folder / str(number))
    for name in ("tokens.bin", "index.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), number
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(number, len(whole.index["chunks"]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test program forks")
def test_resumes_after_kill_at_every_disk_operation(tmp_path, corpus):
    """A process kills itself before its n-th fsync, rename or removal; another one resumes."""
    command = [sys.executable, "-c", KILLED, corpus.name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps, chunks = map(int, done.stdout.split())
    assert chunks > 20
    assert steps >= 2 * (chunks // 7 + 1) + 5


def test_the_index_is_written_when_its_ids_are_on_disk_and_only_it_if_that_is_all(
    tmp_path, corpus, monkeypatch
):
    def flushed(folder):
        synced.append((folder / TOKENS).exists())

    def interrupted(*_):
        assert synced == [True]  # the folder, after its file of ids got its name
        raise KeyboardInterrupt

    synced = []
    with monkeypatch.context() as patched:
        patched.setattr(token_file, "sync_folder", flushed)
        patched.setattr(token_file, "write_whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    monkeypatch.delattr(token_file, "encode_documents")  # not encoded again
    ids = tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t").tokens.tolist()
    assert ids == expected(corpus)


def test_resumes_from_a_progress_file_cut_anywhere(tmp_path, corpus, monkeypatch):
    """A crash may leave an incomplete last line, and ids that are not yet recorded."""
    folder = tmp_path / "t"
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, BYTES, "refuse", folder)
    monkeypatch.setattr(token_file, "_record", RECORD)
    part, progress = (folder / PART).read_bytes(), (folder / PROGRESS).read_bytes()
    first_line = progress.index(b"\n")
    for length in [0, 5, first_line, first_line + 1, *range(first_line + 10, len(progress) + 1, 17)]:
        (folder / PART).write_bytes(part + b"more")
        (folder / PROGRESS).write_bytes(progress[:length])
        assert tokenize_corpus(corpus, BYTES, "refuse", folder).tokens.tolist() == expected(corpus, BYTES)
        (folder / INDEX).unlink()
        (folder / TOKENS).unlink()


def test_resumes_after_repeated_interrupts(tmp_path, corpus, monkeypatch):
    for _ in range(3):
        interrupt_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(corpus, BYTES, "refuse", tmp_path / "t")
        progress = tmp_path / "t" / PROGRESS
        os.truncate(progress, progress.stat().st_size - 3)
    monkeypatch.setattr(token_file, "_record", RECORD)
    assert tokenize_corpus(corpus, BYTES, "refuse", tmp_path / "t").tokens.tolist() == expected(corpus, BYTES)


class FullDisk:
    """``open`` on a disk with ``left`` free bytes; a write that does not fit is truncated."""

    def __init__(self, left):
        self.left = left

    def open(self, path, mode):
        file = open(path, mode, buffering=0)  # noqa: SIM115
        disk = self

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[: disk.left])
                if len(data) > disk.left:
                    disk.left = 0
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.left -= len(data)

            flush, fileno, read = file.flush, file.fileno, file.read

        return File()


def test_full_disk_is_reported_and_resumed(tmp_path, corpus, monkeypatch):
    needed = 2 * len(expected(corpus, BYTES))
    said = set()
    for left in [0, 1, 300, *range(500, needed + 3000, 1999)]:
        folder = tmp_path / str(left)
        with monkeypatch.context() as patched:
            patched.setattr(token_file, "open", FullDisk(left).open, raising=False)
            try:
                tokenize_corpus(corpus, BYTES, "refuse", folder)
                continue  # there was enough space
            except Error as error:
                said.add(str(error))
                assert f"cannot be written ({os.strerror(errno.ENOSPC)}) after 0.0 of 0.0 MB" in str(error)
                assert not (folder / INDEX).exists()
        assert tokenize_corpus(corpus, BYTES, "refuse", folder).tokens.tolist() == expected(corpus, BYTES)
    assert len(said) > 5


def test_full_disk_error_states_the_space_needed(tmp_path):
    about = {"corpus": {"bytes": 40_000_000}, "dtype": "<u2"}
    chunks, unrecorded = [[2_000_000, 8_000_000]] * 2, [[1_000_000, 2_000_000]]
    for number in (errno.EDQUOT, errno.ENOSPC):
        full = OSError(number, "No space left on device")
        error = token_file._cannot_write(full, tmp_path, about, chunks, unrecorded)
        assert "after 16.0 of 40.0 MB of text: free about 13.3 MB more and run it again" in str(error)
    error = token_file._cannot_write(
        full, tmp_path, about, [], []
    )  # nothing encoded yet: at most one id per byte
    assert "free about 80.0 MB more" in str(error)
    error = token_file._cannot_write(OSError(errno.EIO, "Input/output error"), tmp_path, about, [], [])
    assert "(Input/output error) after 0.0 of 40.0 MB of text: fix this and run it again" in str(error)


def test_one_writer_at_a_time(tmp_path, corpus, monkeypatch):
    def remembered(*arguments):
        locks.append(lock(*arguments))
        return locks[-1]

    locks = []
    monkeypatch.setattr(token_file, "lock", remembered)
    (tmp_path / "t").mkdir()
    with FileLock(tmp_path / "t" / token_file.LOCK), pytest.raises(Error, match="another process is writing"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    assert tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t").tokens.tolist() == expected(corpus)
    assert [lock.is_locked for lock in locks] == [False]


def test_file_finished_by_another_process_is_opened(tmp_path, corpus, monkeypatch):
    finished = tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    seen = []

    def exists(path):  # at the first call, the other process has not finished
        seen.append(path)
        return len(seen) > 1

    monkeypatch.setattr(type(tmp_path), "exists", exists)
    monkeypatch.delattr(token_file, "_write")
    assert np.array_equal(tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t").tokens, finished.tokens)
    assert len(seen) == 2


# Mismatches and damage


@pytest.fixture(params=["complete", "interrupted"])
def begun(request, tmp_path, corpus, monkeypatch):
    """A folder with all or half of the corpus's tokens, encoded by BYTES with special="refuse"."""
    folder = tmp_path / "t"
    if request.param == "interrupted":
        interrupt_after(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(corpus, BYTES, "refuse", folder)
        monkeypatch.setattr(token_file, "_record", RECORD)
    else:
        tokenize_corpus(corpus, BYTES, "refuse", folder)
    return folder


def test_other_text_tokenizer_or_special_is_rejected(tmp_path, corpus, begun):
    changed = write_jsonl(tmp_path / "changed.jsonl", [*list(corpus.documents())[:-1], "the End"])
    other = BPETokenizer([(64, 65)])
    remedy = "delete that folder to tokenize again, or choose another folder"
    for arguments, said in [
        ((changed, BYTES, "refuse"), "tokens in .*t' are of another text than '.*changed.jsonl'"),
        ((corpus, other, "refuse"), "tokens in .*t' are of another tokenizer than 'bpe:258'"),
        ((corpus, BYTES, "text"), "tokens in .*t' were encoded with special='refuse', not 'text'"),
    ]:
        with pytest.raises(Error, match=f"{said}.*: {remedy}"):
            tokenize_corpus(*arguments, begun)
    # These errors changed nothing, and the name of a text does not matter.
    renamed = write_jsonl(tmp_path / "renamed.jsonl", corpus.documents())
    assert tokenize_corpus(renamed, BYTES, "refuse", begun).tokens.tolist() == expected(corpus, BYTES)


def test_open_checks_the_given_arguments_only(tmp_path, corpus):
    folder = tmp_path / "t"
    tokenize_corpus(corpus, GPT2, "refuse", folder)
    for arguments in [(), (corpus,), (None, GPT2), (corpus, GPT2, "refuse")]:
        assert len(TokenFile.open(folder, *arguments).tokens) == len(expected(corpus))
    changed = write_jsonl(tmp_path / "changed.jsonl", ["changed"])
    for arguments in [(changed,), (None, BYTES), (None, None, "allow")]:
        with pytest.raises(Error, match="delete that folder"):
            TokenFile.open(folder, *arguments)


def test_the_order_in_which_a_tokenizer_is_described_does_not_matter(monkeypatch):
    sha256, described = token_file.tokenizer_sha256(BYTES), list(BYTES.to_json().items())
    monkeypatch.setattr(BPETokenizer, "to_json", lambda _: dict(reversed(described)))
    assert token_file.tokenizer_sha256(BYTES) == sha256


def test_text_changed_while_tokenizing_is_detected(tmp_path, corpus, monkeypatch):
    documents = list(corpus.documents())
    write_jsonl(tmp_path / "corpus.jsonl", [*documents[:-1], "the End"])  # after the corpus was opened
    with pytest.raises(Error, match="changed while it was in use"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    with pytest.raises(Error, match="not contain a complete token file"):
        TokenFile.open(tmp_path / "t")
    with pytest.raises(Error, match=r"are of another text .*delete that folder"):
        tokenize_corpus(open_corpus(corpus.name, field="t"), GPT2, "refuse", tmp_path / "t")


def test_documents_without_an_end_of_text_token_fail_early(tmp_path, corpus):
    tokenizer = CharTokenizer.from_text("".join(corpus.documents()))
    with pytest.raises(Error, match=r"'char' has no <\|endoftext\|>"):
        tokenize_corpus(corpus, tokenizer, "refuse", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    two = write_jsonl(tmp_path / "two.jsonl", list(corpus.documents())[:2])
    with pytest.raises(Error, match=r"'char' has no <\|endoftext\|>"):
        tokenize_corpus(two, tokenizer, "refuse", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    extended = tokenizer.with_special_tokens([END_OF_TEXT])
    ids = tokenize_corpus(corpus, extended, "refuse", tmp_path / "t").tokens.tolist()
    assert ids == expected(corpus, extended)


def test_special_token_with_a_space_is_rejected(tmp_path, corpus):
    tokenizer = BYTES.with_special_tokens(["<|two words|>"])
    with pytest.raises(Error, match=r"special token '<\|two words\|>' contains a space"):
        tokenize_corpus(corpus, tokenizer, "allow", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_other_folders_are_rejected(tmp_path, corpus):
    for content, said in [
        ("[]", "no token file of format 1"),
        ("{}", "no token file of format 1"),
        ('{"format": 2}', "no token file of format 1"),
        ("{", "cannot be read"),
    ]:
        folder = tmp_path / "t"
        folder.mkdir(exist_ok=True)
        (folder / INDEX).write_text(content, encoding="utf-8")
        (folder / TOKENS).write_bytes(b"")
        with pytest.raises(Error, match=f"{said}.*delete"):
            tokenize_corpus(corpus, GPT2, "refuse", folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Error, match=r"cannot be written .*choose another folder"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "file")
    with pytest.raises(Error, match="not contain a complete token file"):
        TokenFile.open(tmp_path / "nowhere")


def test_damaged_files_are_rejected(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "t"
    file = tokenize_corpus(corpus, GPT2, "refuse", folder)
    size = 2 * len(file.tokens)
    del file  # Windows cannot write to a mapped file
    for content in (b"", (folder / TOKENS).read_bytes()[:-1], (folder / TOKENS).read_bytes() + b"12"):
        (folder / TOKENS).write_bytes(content)
        with pytest.raises(Error, match=f"has {len(content):,} bytes, not the {size:,} of its index"):
            TokenFile.open(folder)

    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "u")
    part, progress = tmp_path / "u" / PART, tmp_path / "u" / PROGRESS
    os.truncate(part, 10)
    with pytest.raises(Error, match=r"tokens.part' has fewer tokens .*delete the folder"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "u")
    progress.write_bytes(progress.read_bytes() + b"\0\0\0\n")
    with pytest.raises(Error, match=r"tokens.progress' is damaged .*delete the folder"):
        tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "u")


def test_inconsistent_index_is_rejected(tmp_path, corpus):
    folder = tmp_path / "t"
    index = tokenize_corpus(corpus, BYTES, "refuse", folder).index
    for change in [
        {"dtype": "O"},
        {"dtype": ["<u2"]},
        {"corpus": 3},
        {"corpus": {"sha256": corpus.sha256}},
        {"tokenizer_sha256": None},
        {"special": 1},
        {"count": index["count"] + 1},
        {"count": float("nan")},
        {"chunks": [[index["count"] - 1, index["corpus"]["bytes"]]]},
        {"chunks": None},
        {"chunks": []},
        {"chunks": [[1, 2, 3]]},
        {"chunks": [[-1, 0], *index["chunks"]]},
        {"chunks": [["1", 2]]},
        {"chunks": [[index["count"], True]]},
        {"chunks": [[index["count"], index["corpus"]["bytes"] + 1]]},
    ]:
        (folder / INDEX).write_text(json.dumps(index | change), encoding="utf-8")
        with pytest.raises(Error, match="delete") as caught:
            TokenFile.open(folder)
        assert str(folder) in str(caught.value)
    no_ids = index | {"count": 0, "chunks": [[0, index["corpus"]["bytes"]]]}
    (folder / INDEX).write_text(json.dumps(no_ids), encoding="utf-8")
    (folder / TOKENS).write_bytes(b"")
    with pytest.raises(Error, match=r"the index of .* is damaged"):
        TokenFile.open(folder)
    (folder / INDEX).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(Error, match=r"cannot be read .*delete the folder"):
        TokenFile.open(folder)


def test_id_out_of_range_is_rejected(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(token_file, "CHECKED_AT_ONCE", 100)
    folder = tmp_path / "t"
    assert len(tokenize_corpus(corpus, BYTES, "refuse", folder).tokens) > 1000
    data = (folder / TOKENS).read_bytes()
    for place in (0, 50, len(data) - 2):
        (folder / TOKENS).write_bytes(data[:place] + b"\x01\x01" + data[place + 2 :])  # 257
        with pytest.raises(Error, match=r"tokens.bin' is damaged .it contains id 257, .* 257 ids.: delete"):
            TokenFile.open(folder, corpus, BYTES)
    (folder / TOKENS).write_bytes(data)
    assert TokenFile.open(folder, corpus, BYTES).tokens.tobytes() == data


def test_malformed_progress_is_rejected(tmp_path, corpus, monkeypatch):
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, BYTES, "refuse", tmp_path / "t")
    progress = tmp_path / "t" / PROGRESS
    about, chunk, *_ = progress.read_bytes().split(b"\n")
    for line in (
        b"[1.5, 2]",
        b"[1]",
        b"[-1, 1]",
        b"[true, 1]",
        b"{}",
        b"null",
        b"[1, 1000000000]",
        b"[" * 10**5,
    ):
        progress.write_bytes(about + b"\n" + chunk + b"\n" + line + b"\n")
        with pytest.raises(Error, match=r"tokens.progress' is damaged .*delete the folder"):
            tokenize_corpus(corpus, BYTES, "refuse", tmp_path / "t")
    progress.write_bytes(about.replace(b'"special"', b'"other"') + b"\n")
    with pytest.raises(Error, match="is damaged: delete the folder"):
        tokenize_corpus(corpus, BYTES, "refuse", tmp_path / "t")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no named pipes")
@pytest.mark.parametrize("name", [INDEX, TOKENS, PART, PROGRESS])
def test_pipe_is_rejected(tmp_path, corpus, name):
    folder = tmp_path / "t"
    if name in (INDEX, TOKENS):
        tokenize_corpus(corpus, BYTES, "refuse", folder)
        (folder / name).unlink()
    else:
        folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.raises(Error) as caught:
        tokenize_corpus(corpus, BYTES, "refuse", folder)
    assert str(folder) in str(caught.value)


# Splits


def test_split_is_at_the_end_of_a_chunk(tmp_path, corpus):
    file = tokenize_corpus(corpus, GPT2, "refuse", tmp_path / "t")
    content = "".join(corpus.documents()).encode("utf-8")
    for fraction in (0.02, 0.1, 0.35, 0.5, 0.9, 0.999):
        train, validation, num_bytes = file.split(fraction)
        assert np.shares_memory(train, file.tokens) and np.shares_memory(validation, file.tokens)
        assert np.array_equal(np.concatenate([train, validation]), file.tokens)
        plain = validation[validation != GPT2.special_tokens[END_OF_TEXT]]
        assert GPT2.decode_bytes(plain.astype(int)) == content[len(content) - num_bytes :]
        # The last chunk of the training part contains the byte at the given fraction.
        ends = np.cumsum([num_bytes for _, num_bytes in file.index["chunks"]])
        before = [end for end in ends if end < len(content) - num_bytes]
        assert max(before, default=0) < (1 - fraction) * len(content) <= len(content) - num_bytes
        for piece in corpus.sample(300, fraction) if fraction < 0.9 else []:
            assert piece.encode("utf-8") in content[: len(content) - num_bytes]


def test_split_between_two_chunks(tmp_path):
    train, validation, num_bytes = TokenFile(tmp_path, np.arange(5), {"chunks": [[2, 8], [3, 8]]}).split(0.5)
    assert (train.tolist(), validation.tolist(), num_bytes) == ([0, 1], [2, 3, 4], 8)


def test_split_of_too_little(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 45, encoding="utf-8")
    file = tokenize_corpus(open_corpus(tmp_path / "a.txt"), GPT2, "refuse", tmp_path / "t")
    assert [num_bytes for _, num_bytes in file.index["chunks"]] == [104, 100, 21]
    assert file.split(0.5)[2] == 21
    with pytest.raises(Error, match=r"it has 3.* after the first 0.95 of the text"):
        file.split(0.05)
    for fraction in (0, 1, float("nan")):
        with pytest.raises(Error, match="validation_fraction is"):
            file.split(fraction)
    # A text that ends with its chunk has no empty chunk after it, to which a split could cut.
    whole = write_jsonl(tmp_path / "whole.jsonl", ["ten chars." * 10])
    file = tokenize_corpus(whole, GPT2, "refuse", tmp_path / "u")
    assert file.index["chunks"] == [[len(file.tokens), 100]]
    with pytest.raises(Error, match="it has 1"):
        file.split(0.5)


# Memory

PEAK = """
import sys
from tinyllm.data import corpus as corpus_module
from tinyllm.data import token_file
from tinyllm.backend.memory import peak_memory
from tinyllm.tokenizers import load_tokenizer

corpus_module.PIECE_CHARACTERS = token_file.PIECE_CHARACTERS = 2**18
corpus = corpus_module.open_corpus(sys.argv[1])
file = token_file.tokenize_corpus(corpus, load_tokenizer("gpt2"), "refuse", sys.argv[2])
print(peak_memory(), len(file.tokens))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how much memory a process had")
def test_memory_use_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for megabytes in (4, 24):
        with open(tmp_path / f"{megabytes}.txt", "w", encoding="utf-8") as file:
            for i in range(megabytes):
                file.write(f"the quick {i} brown fox " * 45_000)
        command = [
            sys.executable,
            "-c",
            PEAK,
            str(tmp_path / f"{megabytes}.txt"),
            str(tmp_path / f"{megabytes}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, tokens = map(int, done.stdout.split())
        assert tokens > megabytes * 200_000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 5e6  # the text alone grows by 20 MB, its ids by 9 MB
