"""Validators: their results, and the value and position in their errors."""

from dataclasses import dataclass, fields

import numpy as np
import pytest

from tinyllm.checks import (
    as_generator,
    check_at_least,
    check_fields,
    check_fraction,
    check_ids,
    check_names_and_shapes,
    is_integer,
    is_integer_field,
)
from tinyllm.errors import Error


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
def test_check_ids_returns_int64(ids):
    checked = check_ids(ids, vocab_size=10)
    assert checked.dtype == np.int64
    assert np.array_equal(checked, np.asarray(ids))


def test_check_ids_returns_a_copy():
    ids = np.array([1, 2])
    check_ids(ids, 10)[0] = 5
    assert ids[0] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
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
def test_check_ids_names_value_position_and_range(ids, message):
    with pytest.raises(Error, match=message):
        check_ids(ids, vocab_size=10)


def test_check_ids_uses_the_given_name():
    with pytest.raises(Error, match=r"^targets\[0\] is -100"):
        check_ids([-100], 10, name="targets")


@pytest.mark.parametrize("value", [0, -1, 2**70, np.int8(3), np.uint64(2**63)])
def test_integers_are_accepted(value):
    assert is_integer(value)
    assert check_at_least(value, -1, "n") == value and type(check_at_least(value, -1, "n")) is int


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float32(2), "2", None, [2], np.array([2])])
def test_non_integers_are_refused(value):
    assert not is_integer(value)
    with pytest.raises(Error, match=r"^steps is "):
        check_at_least(value, 0, "steps")


def test_integer_below_the_minimum_is_refused():
    with pytest.raises(Error, match=r"^steps is 0: .* at least 1"):
        check_at_least(0, 1, "steps")


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), np.uint8(7)])
def test_integer_seed_gives_its_generator(seed):
    assert as_generator(seed).random() == np.random.default_rng(int(seed)).random()


def test_generator_and_none_are_returned_unchanged():
    rng = np.random.default_rng(0)
    assert as_generator(rng) is rng and as_generator(None) is None


@pytest.mark.parametrize(
    ("rng", "message"),
    [
        (-1, "rng is -1:"),
        (True, "rng is True:"),
        (1.5, r"rng is 1\.5:"),
        ("x", "rng is 'x':"),
        (np.random, "rng is a module:"),
        (np.random.RandomState(0), "rng is a RandomState:"),
        ([0], "rng is a list:"),
    ],
)
def test_invalid_rng_is_refused(rng, message):
    with pytest.raises(Error, match=message):
        as_generator(rng)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_check_fraction_refuses_values_outside_0_to_1(fraction):
    check_fraction(0.1)
    with pytest.raises(Error, match=f"validation_fraction is {fraction}"):
        check_fraction(fraction)


@dataclass
class Config:
    n_layer: "int" = 2
    width: "int | None" = None
    eps: "float" = 1e-5
    tied: "bool" = True
    kind: "str" = "a"
    rope: "dict" = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 1.0}, "n_layer must be .*, not 1.0"),
        ({"n_layer": True}, "n_layer must be .*, not True"),
        ({"n_layer": None}, "n_layer must be .*, not None"),
        ({"n_layer": 2**10 + 1}, "n_layer must be at most 1,024, not 1025"),
        ({"n_layer": 2**10, "width": 2**15}, "1,024 layers of width 32,768 are too large: .* n_layer, width"),
        ({"n_layer": 1, "width": 2**20}, "1 layers of width 1,048,576 are too large"),
        ({"width": 2**20 + 1}, "width must be at most 1,048,576, not 1048577"),
        ({"width": "wide"}, "width must be .*, not 'wide'"),
        ({"eps": float("inf")}, "eps must be at most .*, not inf"),
        ({"eps": float("nan")}, "eps must be at most .*, not nan"),
        ({"eps": False}, "eps must be a float, not False"),
        ({"tied": 1}, "tied must be a bool, not 1"),
        ({"kind": 3}, "kind must be a str, not 3"),
        ({"rope": [1]}, r"rope must be a dict, not \[1\]"),
    ],
)
def test_check_fields_names_the_field_and_its_value(changes, message):
    check_fields(Config(rope={}), layers=("n_layer",), widths=("width",))
    with pytest.raises(Error, match=message):
        check_fields(Config(**{"rope": {}} | changes), layers=("n_layer",), widths=("width",))


@dataclass
class OwnConfig:  # in a file that does not import annotations from __future__
    n_layer: int = 2
    width: int | None = None
    eps: float = 1e-5
    rates: float | int = 0.0
    rope: dict | None = None
    kinds: list[str] | None = None
    fast: bool | None = True


def test_check_fields_takes_types_that_are_not_strings_and_types_that_it_does_not_know():
    check_fields(OwnConfig(rope={}, kinds=["a"]), layers=("n_layer",), widths=("width",))
    assert [is_integer_field(field) for field in fields(OwnConfig)] == [True, True, *[False] * 5]
    for changes in ({"n_layer": 2.0}, {"n_layer": True}, {"width": 2**20 + 1}, {"eps": False}, {"eps": "a"}):
        with pytest.raises(Error, match=f"{next(iter(changes))} must be"):
            check_fields(OwnConfig(**changes), layers=("n_layer",), widths=("width",))


def test_sizes_of_the_largest_published_model_are_accepted():
    check_fields(Config(rope={}, n_layer=126, width=53_248), layers=("n_layer",), widths=("width",))


def test_check_names_and_shapes_lists_every_problem_in_one_error():
    expected = {f"h.{i}": (i + 1, 4) for i in range(40)}
    assert check_names_and_shapes(expected, dict(reversed(expected.items())), "folder") is None

    found = {**expected, "h.2": (4, 3), "h.3": (4,), "x": (1,), "y": ()}
    missing = [f"h.{i}" for i in range(10, 30)]
    for name in missing:
        del found[name]
    with pytest.raises(Error) as raised:
        check_names_and_shapes(expected, found, "my/folder")
    text = str(raised.value)
    assert text.startswith("my/folder ")
    assert f"Missing (20): {', '.join(missing)}; " in text
    assert "Unexpected (2): x, y; " in text
    assert "Wrong shape (2): h.2 is (4, 3), not (3, 4), h.3 is (4,), not (4, 4))" in text

    with pytest.raises(Error) as raised:
        check_names_and_shapes({"a": (1,)}, {}, "s")
    text = str(raised.value)
    assert "(Missing (1): a)" in text and "Unexpected" not in text and "Wrong" not in text
