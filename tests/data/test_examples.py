"""Examples: files, folders and known names, and their division into three parts."""

import codecs
import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data import named
from tinyllm.data.examples import Row, divide, open_examples, read_rows
from tinyllm.data.named import DATA_SETS, PublishedFile
from tinyllm.errors import Error


def numbered(count):
    return [{"text": str(n)} for n in range(count)]


def texts(part):
    return [int(row.values["text"]) for row in part]


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------- files


def test_a_list_and_lines_are_the_same_rows(tmp_path):
    values = numbered(3)
    whole = write(tmp_path / "a.json", values)
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n\n".join(json.dumps(each) for each in values), encoding="utf-8")
    swapped = tmp_path / "c.json"  # the content decides, not the suffix
    swapped.write_bytes(lines.read_bytes())
    marked = [tmp_path / "d.json", tmp_path / "e.jsonl"]  # with a byte order mark
    for path, plain in zip(marked, (whole, lines)):
        path.write_bytes(codecs.BOM_UTF8 + b"\n" + plain.read_bytes())
    for path in (whole, lines, swapped, *marked):
        assert [row.values for row in read_rows(path)] == values
        assert read_rows(path)[2].where == f"row 3 of {path}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"a": 1}, {"a": 1, "a": 2}]', "a.json is not JSON .*twice"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "row 2 of .*a.jsonl is not JSON"),
        ("a.json", '[{"a": 1}, 3]', "row 2 of .*a.json is 3, not an object"),
        ("a.txt", "x", r"ends in \.txt: give a file that ends in"),
        ("a.jsonl", '{"a": "\\ud800"}', "row 1 of .* is not JSON"),
    ],
)
def test_a_damaged_file_names_the_row(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(Error, match=said):
        read_rows(tmp_path / name)


# ----------------------------------------------------------------------------------------- division


@given(st.integers(0, 200), st.integers(0, 5), st.integers(1, 3), st.sampled_from([0, 10]))
def test_every_row_is_in_one_part_and_in_order(count, seed, labels, test):
    rows = [Row({"text": str(n), "label": n % labels}, "") for n in range(count)]
    parts = divide(rows, seed, lambda row: row.values["label"], test)
    assert sorted(n for part in parts for n in texts(part)) == list(range(count))
    for part in parts:
        assert texts(part) == sorted(texts(part))
    for label in range(labels):
        sizes = [sum(row.values["label"] == label for row in part) for part in parts]
        n = sum(sizes)
        assert (sizes[0], sizes[2]) == (n * (95 - test) // 100, n * test // 100)


def test_the_split_depends_on_the_seed_and_has_the_books_sizes(tmp_path):
    for seed in (-1, 2**128):
        with pytest.raises(Error, match=f"split_seed is {seed}"):
            divide([], seed)
    path = write(tmp_path / "data.json", numbered(1100))
    found = open_examples(path)
    assert [len(part) for part in (found.train, found.valid, found.test)] == [935, 55, 110]
    assert found.describe() == (
        f"{path}: 935 training, 55 validation and 110 test examples (split with seed 0)"
    )
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert texts(open_examples(path).valid) == texts(found.valid)
    assert texts(open_examples(path, seed=1).valid) != texts(found.valid)


def test_a_folder_has_its_own_parts(tmp_path):
    write(tmp_path / "train.json", numbered(40))
    found = open_examples(tmp_path)
    assert (len(found.train), len(found.valid), found.test) == (38, 2, [])
    assert found.split == "split with seed 0"
    write(tmp_path / "dev.JSON", numbered(3))
    given = open_examples(tmp_path)
    assert (len(given.train), len(given.valid), given.split) == (40, 3, "as given")
    assert given.describe().endswith("(as given); 3 of the latter two are training examples too")
    write(tmp_path / "dev.JSON", numbered(4))
    changed = open_examples(tmp_path)
    write(tmp_path / "test.jsonl", {"text": "1"})
    tested = open_examples(tmp_path)
    assert len(tested.test) == 1
    assert len({each.sha256 for each in (found, given, changed, tested)}) == 4
    write(tmp_path / "validation.json", numbered(3))
    with pytest.raises(Error, match=r"dev\.JSON and validation\.json: keep one"):
        open_examples(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"data.json": "[]"}, "data.json has no rows"),
        ({"data.json": '[{"a": 1}]'}, "too few rows"),
        ({"folder/valid.json": '[{"a": 1}]'}, "no training part"),
        ({}, "there is no data .*one of instruction-data"),
    ],
)
def test_bad_data_is_refused(tmp_path, files, said):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    wanted = tmp_path / next(iter(files), "nothing").partition("/")[0]
    with pytest.raises(Error, match=said):
        open_examples(wanted)


# ------------------------------------------------------------------------------------------ by name


def test_a_known_name_is_a_pinned_file_in_TINYLLM_DATA(tmp_path, monkeypatch):
    content = json.dumps(numbered(20)).encode()
    known = PublishedFile("some/numbers.json", "https://example.org/x", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(DATA_SETS, "numbers", known)
    monkeypatch.setenv("TINYLLM_DATA", str(tmp_path))
    (tmp_path / "numbers.json").write_bytes(content)
    assert open_examples("numbers").name == "numbers"
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "numbers.json").write_bytes(content)
    assert known.find("numbers") == tmp_path / "some" / "numbers.json"
    (tmp_path / "some" / "numbers.json").write_bytes(gzip.compress(content))
    with pytest.raises(Error, match="is not the expected file"):
        open_examples("numbers")
    monkeypatch.chdir((tmp_path / "own").mkdir() or tmp_path / "own")
    write((tmp_path / "own" / "numbers").mkdir() or tmp_path / "own" / "numbers" / "train.json", numbered(4))
    assert len(open_examples("numbers").train) == 3  # a folder of that name comes first


def test_a_download_is_pinned_and_its_failure_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("TINYLLM_DATA", raising=False)
    asked = []

    def retrieve(url, known_hash, name, cache):
        asked.append((url, known_hash, name))
        raise ValueError("SHA-256 differs")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(Error, match=r"instruction-data could not be downloaded.*TINYLLM_DATA.*differs"):
        open_examples("instruction-data")
    ((url, known_hash, name),) = asked
    assert url.startswith(named.BOOK) and url.endswith("/instruction-data.json")
    assert (known_hash, name) == ("sha256:" + DATA_SETS["instruction-data"].sha256, "instruction-data.json")
