"""Tables of text: quoting, tabs, line ends, and rows that do not fit the first line."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data.tables import read_table
from tinyllm.errors import Error


def table(folder, content, name="data.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_quoted_fields_may_contain_commas_quotes_and_line_ends(tmp_path):
    path = table(tmp_path, 'text,label\n"a, ""b""\nc",1\r\nplain,2\r\n\n')
    assert list(read_table(path)) == [{"text": 'a, "b"\nc', "label": "1"}, {"text": "plain", "label": "2"}]


def test_quotes_are_ordinary_characters_between_tabs(tmp_path):
    path = table(tmp_path, 'label\ttext\nham\t"Go, now\nspam\tcall "0800"\n', "data.tsv")
    assert [row["text"] for row in read_table(path)] == ['"Go, now', 'call "0800"']


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = table(tmp_path, "text,label\nü,1\n".encode("utf-8-sig"))
    assert list(read_table(path)) == [{"text": "ü", "label": "1"}]


def test_other_separators_of_lines_belong_to_a_text(tmp_path):
    path = table(tmp_path, "text,label\na\u2028b\x0cc,1\n")
    assert list(read_table(path)) == [{"text": "a\u2028b\x0cc", "label": "1"}]


# "\r" is left out: a file's line ends are converted to "\n" when it is read.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"))


@given(rows=st.lists(st.tuples(texts, texts), max_size=5))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tables") / "data.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    assert [(row["text"], row["label"]) for row in read_table(path)] == rows


def test_a_long_field_is_read_and_the_limit_of_the_module_is_unchanged(tmp_path):
    csv.field_size_limit(before := 2**17)
    assert len(next(read_table(table(tmp_path, f"text,label\n{'x' * 200_000},1\n")))["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("text,label\na,1\nb\n", "row 2 .* 1 fields .*commas.* 2 columns"),
        ("text,label\na,b,1\n", "row 1 .* 3 fields"),
        ("text,text\na,b\n", "'text' twice"),
        ("text,\na,b\n", "''"),
        ('text,label\n"a,1\n', "row 1 .*cannot be read"),
        ('text,label\na,1\n"b"c,1\n', "row 2 .*cannot be read"),
        (b"text,label\n\xff,1\n", "UTF-8"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, named):
    with pytest.raises(Error, match=named):
        list(read_table(table(tmp_path, content)))


def test_an_empty_file_has_no_rows(tmp_path):
    assert list(read_table(table(tmp_path, ""))) == list(read_table(table(tmp_path, "text,label\n"))) == []
