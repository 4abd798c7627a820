"""Mutations: the ways to break a file.

A mutation turns a valid folder into one that may be broken. The fixed mutations are enumerated: every key of
a JSON file with every kind of value, every length with numbers that overflow, the file truncated at every
boundary between two parts, and pipes, links and folders instead of the file. The random mutations flip bits,
insert random bytes, and move or repeat parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

Rng = np.random.Generator

DEPTH = 100_000  # of nested lists: far beyond the recursion limit

# Replacements for a JSON value: description -> JSON text
VALUES = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "one": "1",
    "negative": "-1",
    "a large size": "1000003",
    "2**31": str(2**31),
    "2**63 - 1": str(2**63 - 1),
    "2**64": str(2**64),
    "5,000 digits": "9" * 5000,
    "a fraction": "1.5",
    "a tiny number": "1e-320",
    "1e308": "1e308",
    "1e999": "1e999",
    "-1e999": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "empty text": '""',
    "text": '"x"',
    "a number as text": '"1"',
    "half a character": r'"\ud800"',
    "control characters": r'"\u001b[2J\n\u0000"',
    "a path upwards": '"../x"',
    "an absolute path": '"/etc/hostname"',
    "long text": '"' + "a" * 20_000 + '"',
    "empty list": "[]",
    "empty object": "{}",
    "a list of one number": "[1]",
    "a list of texts": '["x", "y"]',
    "a list of lists": "[[], [[]]]",
    "an object": '{"x": 1}',
    "an object in an object": '{"x": {"y": null}}',
    "deep lists": "[" * DEPTH + "]" * DEPTH,
    "deep objects": '{"x":' * DEPTH + "1" + "}" * DEPTH,
}

# Replacements for a binary number: 0, 1, the largest signed and unsigned ones, and numbers that overflow when
# they are added to, doubled, or multiplied by four.
NUMBERS = (0, 1, 2, 5, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Mutation:
    """``apply(folder, rng)`` changes a valid folder; ``expect`` is "refused" or "loaded" if that is known."""

    name: str
    apply: Callable[[Path, Rng], None]
    random: bool = False  # whether ``apply`` uses its generator
    expect: str | None = None


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(file: str, name: str, change: Callable[[bytes, Rng], bytes], **options) -> Mutation:
    """A mutation of one file's bytes."""

    def apply(folder: Path, rng: Rng) -> None:
        path = folder / file
        path.write_bytes(change(path.read_bytes(), rng))

    return Mutation(f"{file}: {name}", apply, **options)


def fixed_edit(file: str, name: str, change: Callable[[bytes], bytes], **options) -> Mutation:
    return edit(file, name, lambda data, rng: change(data), **options)


def replace(data: bytes, start: int, stop: int, by: bytes) -> bytes:
    return data[:start] + by + data[stop:]


# ---------------------------------------------------------------------------- any file


def byte_mutations(data: bytes, file: str, places: Iterable[int] = ()) -> list[Mutation]:
    """Mutations of a file with these bytes; ``places`` are the offsets at which its parts end."""
    cuts = sorted({place + by for place in (0, len(data), *places) for by in (-1, 0, 1)})
    mutations = [
        fixed_edit(file, f"truncated after {n} of {len(data)} bytes", lambda data, n=n: data[:n])
        for n in cuts
        if 0 <= n < len(data)
    ]
    for name, more in (("a byte", b"\x00"), ("a line", b"\n"), ("text", b"x"), ("a megabyte", bytes(10**6))):
        mutations.append(fixed_edit(file, f"{name} appended", lambda data, more=more: data + more))
    for name, first in (
        ("invalid UTF-8", b"\xff\xfe"),
        ("a byte order mark", b"\xef\xbb\xbf"),
        ("\\0", b"\x00"),
    ):
        mutations.append(fixed_edit(file, f"{name} prepended", lambda data, first=first: first + data))
    mutations.append(fixed_edit(file, "twice", lambda data: data + data))
    mutations.append(fixed_edit(file, "only zeros", lambda data: bytes(len(data))))
    changes = {
        "bits flipped": _flip_bits,
        "random bytes in a slice": _randomize,
        "a slice removed": _remove,
        "a slice repeated": _repeat,
        "a slice inserted elsewhere": _insert,
        "truncated": lambda data, rng: data[: rng.integers(len(data))],
        "one byte": _one_byte,
        "a number": _number_somewhere,
        "random bytes": lambda data, rng: rng.bytes(len(data)),
        "random bytes appended": lambda data, rng: data + rng.bytes(rng.integers(1, 100)),
        "invalid UTF-8": lambda data, rng: _insert_bytes(data, rng, b"\xc3\x28"),
    }
    return mutations + [edit(file, name, change, random=True) for name, change in changes.items()]


def _slice(data: bytes, rng: Rng) -> tuple[int, int]:
    """(start, stop) of a random slice, usually a short one."""
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 8)))


def _flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 5)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _randomize(data: bytes, rng: Rng) -> bytes:
    start, stop = _slice(data, rng)
    return replace(data, start, stop, rng.bytes(stop - start))


def _remove(data: bytes, rng: Rng) -> bytes:
    return replace(data, *_slice(data, rng), b"")


def _repeat(data: bytes, rng: Rng) -> bytes:
    start, stop = _slice(data, rng)
    return replace(data, stop, stop, data[start:stop])


def _insert(data: bytes, rng: Rng) -> bytes:
    start, stop = _slice(data, rng)
    return _insert_bytes(data, rng, data[start:stop])


def _insert_bytes(data: bytes, rng: Rng, more: bytes) -> bytes:
    place = int(rng.integers(len(data) + 1))
    return replace(data, place, place, more)


def _one_byte(data: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(len(data)))
    return replace(data, place, place + 1, rng.bytes(1))


def _number_somewhere(data: bytes, rng: Rng) -> bytes:
    width = int(rng.choice([1, 2, 4, 8]))
    number = int(NUMBERS[rng.integers(len(NUMBERS))]) % 2 ** (8 * width)
    place = int(rng.integers(max(1, len(data) - width)))
    return replace(data, place, place + width, number.to_bytes(width, "little"))


def number_mutations(file: str, places: dict[str, tuple[int, int]]) -> list[Mutation]:
    """Replace every number of a binary file (name -> offset, width) by each of ``NUMBERS``."""
    mutations = []
    for name, (start, width) in places.items():
        for number in sorted({number % 2 ** (8 * width) for number in NUMBERS}):
            by = number.to_bytes(width, "little")
            change = partial(replace, start=start, stop=start + width, by=by)
            mutations.append(fixed_edit(file, f"{name} is {number}", change))
    return mutations


# ---------------------------------------------------------------------------- missing and special files


def file_mutations(file: str) -> list[Mutation]:
    """The file is missing, or its name is that of a folder, pipe, link or device."""
    kinds = {"missing": lambda path: None, "a folder": Path.mkdir}
    if os.name == "posix":  # Windows has no named pipes, and reserves links for administrators
        kinds |= {
            "a pipe": os.mkfifo,
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to nothing": lambda path: path.symlink_to("nothing"),
            "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
        }

    def apply(folder: Path, rng: Rng, make: Callable[[Path], None]) -> None:
        (folder / file).unlink()
        make(folder / file)

    mutations = [Mutation(f"{file}: {name}", partial(apply, make=make)) for name, make in kinds.items()]
    if os.name == "posix":
        # As in Hugging Face's cache, where every file of a model is a link to ../../blobs.
        move = Mutation(
            f"{file}: a link to ../blobs", lambda folder, rng: _to_blobs(folder / file), expect="loaded"
        )
        mutations.append(move)
    return mutations


def _to_blobs(path: Path) -> None:
    blobs = path.parent.with_name("blobs")
    blobs.mkdir()
    path.replace(blobs / path.name)
    path.symlink_to(Path("..", "blobs", path.name))


# ---------------------------------------------------------------------------- JSON

HERE, FIRST = "<<here>>", "<<first>>"  # placeholders for raw JSON; none of our files contains them


def json_mutations(file: str, document, put: Callable[[bytes, str], bytes] | None = None) -> list[Mutation]:
    """Mutations of a JSON document in a file: every value of every kind; keys missing, renamed and repeated.

    ``put(data, text)`` returns the file's bytes with another text of the document (default: the file is the
    document).
    """
    put = put or (lambda data, text: text.encode("utf-8", "surrogatepass"))
    places = {"the document": json.dumps(HERE)}  # name of the value -> the text with HERE in its place
    texts = {"two documents": json.dumps(document) * 2, "unclosed brackets": "[" * DEPTH}
    for path in _paths(document):
        name = "/".join(map(str, path))
        places[name] = json.dumps(_changed(document, path, HERE))
        texts |= {f"{name}: {what}": text for what, text in _keys_changed(document, path)}
    mutations = [
        # Each text is built when it is needed: together they take hundreds of megabytes.
        fixed_edit(file, f"{name} is {kind}", partial(_with_value, put=put, text=text, value=value))
        for name, text in places.items()
        for kind, value in VALUES.items()
    ]
    mutations += [
        fixed_edit(file, name, lambda data, text=text: put(data, text)) for name, text in texts.items()
    ]
    exchange = edit(
        file, "two values exchanged", lambda data, rng: put(data, _exchanged(document, rng)), random=True
    )
    return [*mutations, exchange]


def _with_value(data: bytes, put: Callable[[bytes, str], bytes], text: str, value: str) -> bytes:
    return put(data, text.replace(json.dumps(HERE), value))


def _paths(value, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values; in a long list or object only those of the first, second and last one."""
    if isinstance(value, dict):
        inside = list(value)
    elif isinstance(value, list):
        inside = list(range(len(value)))
    else:
        return
    for key in inside if len(inside) <= 40 else [*inside[:2], inside[-1]]:
        yield (*path, key)
        yield from _paths(value[key], (*path, key))


def _at(document, path: tuple):
    for key in path:
        document = document[key]
    return document


def _changed(document, path: tuple, value):
    copy = json.loads(json.dumps(document))
    _at(copy, path[:-1])[path[-1]] = value
    return copy


def _keys_changed(document, path: tuple) -> Iterator[tuple[str, str]]:
    parent, key = _at(document, path[:-1]), path[-1]
    if isinstance(parent, dict):
        without = {name: value for name, value in parent.items() if name != key}
        yield "missing", json.dumps(_replaced(document, path[:-1], without))
        yield (
            "under another name",
            json.dumps(_replaced(document, path[:-1], without | {f"{key}x": parent[key]})),
        )
        twice = json.dumps(_replaced(document, path[:-1], {FIRST: 1, **parent}))
        for what, first in (("repeated", json.dumps(parent[key])), ("repeated as a text", '"x"')):
            yield what, twice.replace(f"{json.dumps(FIRST)}: 1", f"{json.dumps(key)}: {first}", 1)
    else:
        yield "removed", json.dumps(_replaced(document, path[:-1], parent[:key] + parent[key + 1 :]))
        yield "repeated", json.dumps(_replaced(document, path[:-1], [*parent, parent[key]]))


def _replaced(document, path: tuple, value):
    return _changed(document, path, value) if path else value


def _exchanged(document, rng: Rng) -> str:
    paths = list(_paths(document))
    one, other = (paths[i] for i in rng.integers(len(paths), size=2))
    if one[: len(other)] == other or other[: len(one)] == one:  # one contains the other
        return json.dumps(_changed(document, one, None))
    return json.dumps(_changed(_changed(document, one, _at(document, other)), other, _at(document, one)))


# ---------------------------------------------------------------------------- lines


# Empty, a space, invalid UTF-8, too few and too many words, other kinds of JSON, invalid ranks, a Unicode
# line separator, and a long line.
LINES = (
    *(b"", b" ", b"\x00", b"\xff\xff", b"x", b"x y z", b"{}", b"[]", b"[1, -1]", b"[1e999, 0]", b"0 0"),
    *(b"IQ== -1", b"IQ== 99999999999999999999", b"\xe2\x80\xa8", b"A" * 100_000),
)


def line_mutations(data: bytes, file: str) -> list[Mutation]:
    """Mutations of a text file: lines replaced, removed, repeated and exchanged."""
    count = data.count(b"\n")
    mutations = []
    for number in sorted({0, 1, count // 2, count - 1}):
        for line in LINES:
            change = partial(_with_line, number=number, lines=[line])
            mutations.append(fixed_edit(file, f"line {number} is {line[:20]!r}", change))
        change = partial(_with_line, number=number, lines=[])
        mutations.append(fixed_edit(file, f"line {number} removed", change))
    mutations.append(fixed_edit(file, "CRLF line endings", lambda data: data.replace(b"\n", b"\r\n")))
    mutations.append(fixed_edit(file, "no line endings", lambda data: data.replace(b"\n", b" ")))
    mutations.append(edit(file, "two lines exchanged", _exchange_lines, random=True))
    mutations.append(edit(file, "a line repeated", _repeat_line, random=True))
    return mutations


def _with_line(data: bytes, number: int, lines: list[bytes]) -> bytes:
    old = data.split(b"\n")
    return b"\n".join([*old[:number], *lines, *old[number + 1 :]])


def _exchange_lines(data: bytes, rng: Rng) -> bytes:
    lines = data.split(b"\n")
    one, other = (int(i) for i in rng.integers(len(lines), size=2))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


def _repeat_line(data: bytes, rng: Rng) -> bytes:
    lines = data.split(b"\n")
    one, other = (int(i) for i in rng.integers(len(lines), size=2))
    return b"\n".join([*lines[:one], lines[other], *lines[one:]])


# ---------------------------------------------------------------------------- all of a file


def mutations_of_json(folder: Path, file: str) -> list[Mutation]:
    """All mutations of a file that is one JSON document."""
    document, data = read_json(folder / file), (folder / file).read_bytes()
    return [*json_mutations(file, document), *byte_mutations(data, file), *file_mutations(file)]


def mutations_of_lines(folder: Path, file: str, places: Iterable[int] = ()) -> list[Mutation]:
    """All mutations of a text file."""
    data = (folder / file).read_bytes()
    return [*line_mutations(data, file), *byte_mutations(data, file, places), *file_mutations(file)]


def mutations_of_bytes(folder: Path, file: str, places: Iterable[int] = ()) -> list[Mutation]:
    """All mutations of a file of any kind."""
    return [*byte_mutations((folder / file).read_bytes(), file, places), *file_mutations(file)]
