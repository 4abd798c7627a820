"""Labelled texts: columns, classes, the stratified split, texts in two parts, and what is refused."""

import csv
import json

import pytest

from tinyllm.data.examples import read_rows
from tinyllm.data.labelled import open_labelled, text_of
from tinyllm.errors import Error


def write(path, rows):
    """Rows (text, label) as a table or as JSON lines, by the suffix."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        else:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
                [("text", "label"), *rows]
            )
    return path


def rows(**counts):
    """So many different texts of each label."""
    return [(f"{label} text {i}", label) for label, count in counts.items() for i in range(count)]


def of_part(found, part):
    part = getattr(found, part)
    return [(text, found.labels[target]) for text, target in zip(part.texts, part.targets, strict=True)]


def test_labels_of_one_value_have_the_same_order_in_every_process(tmp_path):
    ones = [format(1, f"0{width}") for width in range(1, 9)]  # a set's order differs between processes
    found = open_labelled(write(tmp_path / "data.csv", rows(**dict.fromkeys([*ones, "10", "2"], 10))))
    assert found.labels == (*reversed(ones), "2", "10")


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl"])
def test_a_single_file_is_split_and_every_part_has_its_share_of_each_class(tmp_path, name):
    found = open_labelled(write(tmp_path / name, rows(good=100, bad=50)))
    assert found.labels == ("bad", "good")
    sizes = {part: len(getattr(found, part).texts) for part in ("train", "valid", "test")}
    assert sizes == {"train": 120, "valid": 15, "test": 15}
    for part, size in sizes.items():
        assert getattr(found, part).targets.count(0) == size // 3
    together = [pair for part in sizes for pair in of_part(found, part)]
    assert sorted(together) == sorted(rows(good=100, bad=50))
    again, other = (open_labelled(tmp_path / name, seed) for seed in (0, 1))
    assert again == found and other.test.texts != found.test.texts
    assert other.examples.sha256 == found.examples.sha256


def test_given_parts_are_used_as_they_are(tmp_path):
    train, valid, test = rows(a=3, b=2), [("v", "a")], [("t", "b")]
    for name, some in (("train.csv", train), ("val.jsonl", valid), ("test.tsv", test)):
        write(tmp_path / "data" / name, some)
    found = open_labelled(tmp_path / "data")
    assert [of_part(found, part) for part in ("train", "valid", "test")] == [train, valid, test]


def test_labels_are_integers_in_order_or_strings(tmp_path):
    many = [(f"text {i}", i % 11) for i in range(44)]
    assert open_labelled(write(tmp_path / "a.jsonl", many)).labels == tuple(map(str, range(11)))
    assert open_labelled(write(tmp_path / "a.csv", many)).labels == tuple(map(str, range(11)))
    mixed = [(f"text {i}", ("x", 1, " x")[i % 3]) for i in range(44)]
    assert open_labelled(write(tmp_path / "b.jsonl", mixed)).labels == ("1", "x")


def test_columns_with_usual_names_are_found_and_others_named(tmp_path):
    path = tmp_path / "data.csv"
    lines = "".join(f"{i % 2},review {i},note {i}\n" for i in range(40))
    path.write_text("Sentiment, Review,notes\n" + lines)
    found = open_labelled(path)
    assert (found.text_column, found.label_column) == (" Review", "Sentiment")
    assert "text in ' Review', label in 'Sentiment'" in found.describe()[0]
    assert open_labelled(path, text_column="notes").train.texts[0].startswith("note ")
    path.write_text("stars,words\n" + "".join(f"{i % 2},text {i}\n" for i in range(40)))
    with pytest.raises(Error, match=r"row 1 .*stars, words.*--label-column"):
        open_labelled(path, text_column="words")
    with pytest.raises(Error, match=r"row 1 .*'starz'.*stars, words"):
        open_labelled(path, text_column="words", label_column="starz")
    assert open_labelled(path, text_column="words", label_column="stars").labels == ("0", "1")


def test_an_empty_name_of_a_column_is_not_replaced_by_a_usual_one(tmp_path):
    path = write(tmp_path / "a.csv", [(f"text {i}", i % 2) for i in range(40)])
    for options in (dict(text_column=""), dict(label_column="")):
        with pytest.raises(Error, match="no column ''"):
            open_labelled(path, **options)
    with pytest.raises(Error, match="no column ''"):
        text_of(read_rows(path)[0], "")


def test_a_text_stays_only_in_the_last_part_that_has_it(tmp_path):
    train = [("a", "x"), ("b", "y"), ("a", "x"), ("in valid", "x"), ("in test", "y"), ("c", "y")]
    valid = [("v", "x"), ("in valid", "x"), ("in both", "y")]
    test = [("in test", "y"), ("in both", "y"), ("t", "x"), ("t", "x")]
    for name, some in (("train", train), ("valid", valid), ("test", test)):
        write(tmp_path / "data" / f"{name}.csv", some)
    found = open_labelled(tmp_path / "data")
    assert found.train.texts == ["a", "b", "c"] and found.valid.texts == ["v", "in valid"]
    assert found.test.texts == [text for text, _ in test]  # a given test part is not changed
    assert found.removed == 4 and any(line.startswith("4 texts were removed") for line in found.describe())


def test_the_balance_is_described(tmp_path):
    lines = open_labelled(write(tmp_path / "data.csv", rows(good=75, bad=25))).describe()
    assert "80 training, 11 validation, 9 test texts" in lines[0]
    assert "class 'bad': 25.0% of training, 27.3% of validation, 22.2% of test" in lines


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "text,label\nonly,1\n", "too few rows"),
        ("a.csv", "body,label\n" + "x,1\n" * 9 + " ,1\n", "row 10 .*text ' ' in 'body'"),
        ("a.csv", "text,label\na,1\nb,\n", "row 2 .*label ''"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2 .*no column 'label'"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n' * 9,
            r"row \d+ .*text 3 in 'text'",
        ),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n' * 9, "row 1 .*label 1.5"),
        ("a.jsonl", '{"text": "a", "label": true}\n' * 9, "row 1 .*label True"),
        ("a.jsonl", '{"text": "a", "label": null}\n' * 9, "row 1 .*label None"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', "row 2 .*object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{\n', "row 2 .*not JSON"),
        ("a.xls", "text,label\n", r"a\.xls ends in \.xls.*\.csv or \.tsv"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(Error, match=named) as caught:
        open_labelled(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_one_class_only_is_refused(tmp_path):
    with pytest.raises(Error, match="only the label 'good'"):
        open_labelled(write(tmp_path / "data.csv", rows(good=50)))


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_label_that_no_training_row_has_is_refused(tmp_path, part):
    for name in ("train", "valid", "test"):
        write(tmp_path / "data" / f"{name}.csv", [(f"{name} {i}", "xy"[i % 2]) for i in range(4)])
    write(tmp_path / "data" / f"{part}.csv", [("fine", "x"), ("new", "z")])
    with pytest.raises(Error, match=rf"row 2 of .*{part}\.csv has the label 'z'.*x, y"):
        open_labelled(tmp_path / "data")


def test_training_texts_that_are_all_in_a_later_part_are_refused(tmp_path):
    for name in ("train", "valid"):
        write(tmp_path / "data" / f"{name}.csv", rows(a=2, b=2))
    with pytest.raises(Error, match="train texts"):
        open_labelled(tmp_path / "data")
