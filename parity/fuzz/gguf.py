"""Broken GGUF files: a small Llama, and both kinds of vocabulary.

They are written field by field, so that the offset of every number is known.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

from parity.fuzz.mutations import (
    DEPTH,
    Mutation,
    byte_mutations,
    file_mutations,
    fixed_edit,
    number_mutations,
)
from parity.fuzz.tokenizers import BYTE_LEVEL_TOKENS, BYTE_MERGES, PIECES, check_tokenizer
from parity.fuzz.weights import check_model
from tinyllm.models import load_model
from tinyllm.tokenizers import load_tokenizer

UINT32, FLOAT32, BOOL, TEXT, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10

LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

GGUF = "model.gguf"


class GGUFWriter:
    """Writes a GGUF file field by field into ``data``; ``places`` has every number's offset and width."""

    def __init__(self):
        self.data, self.places = bytearray(), {}

    def number(self, name: str, letter: str, value) -> None:
        packed = struct.pack("<" + letter, value)
        self.places[name] = len(self.data), len(packed)
        self.data += packed

    def text(self, name: str, value: str) -> None:
        encoded = value.encode("utf-8")
        self.number(f"the length of {name}", "Q", len(encoded))
        self.data += encoded

    def key(self, key: str, kind: int, value, element: int | None = None) -> None:
        self.text(key, key)
        self.number(f"the type of {key}", "I", kind)
        if kind == TEXT:
            self.text(f"{key}'s value", value)
        elif kind == ARRAY:
            self.number(f"the elements' type of {key}", "I", element)
            self.number(f"the elements of {key}", "Q", len(value))
            for i, item in enumerate(value):
                if element == TEXT:
                    self.text(f"{key}'s {min(i, 2)}", item)
                else:
                    self.number(f"{key}'s {min(i, 2)}", LETTERS[element], item)
        else:
            self.number(f"{key}'s value", LETTERS[kind], value)


def gguf(keys: list[tuple], tensors: list[tuple], shift: int = 0) -> GGUFWriter:
    """A file with these keys (name, type, value, element type) and tensors (name, shape, type, bytes).

    The offsets of all tensors but the first are wrong by ``shift`` bytes.
    """
    writer = GGUFWriter()
    writer.data += b"GGUF"
    writer.number("the version", "I", 3)
    writer.number("the number of tensors", "Q", len(tensors))
    writer.number("the number of keys", "Q", len(keys))
    for key in keys:
        writer.key(*key)
    offset = 0
    for name, shape, code, numbers in tensors:
        writer.text(name, name)
        writer.number(f"the dimensions of {name}", "I", len(shape))
        for i, n in enumerate(reversed(shape)):
            writer.number(f"dimension {i} of {name}", "Q", n)
        writer.number(f"the type of {name}", "I", code)
        writer.number(f"the offset of {name}", "Q", max(0, offset + (shift if offset else 0)))
        offset += len(numbers) + -len(numbers) % 32
    for *_, numbers in tensors:
        writer.data += bytes(-len(writer.data) % 32) + numbers
    return writer


def _gguf_tensors() -> list[tuple]:
    """A Llama with one layer, 32 channels, 64 in the MLP and 8 tokens, in F32 (0), F16 (1) and Q8_0 (8)."""
    shapes = {
        "token_embd": ((8, 32), 0),
        "blk.0.attn_norm": ((32,), 0),
        "blk.0.attn_q": ((32, 32), 8),
        "blk.0.attn_k": ((16, 32), 1),
        "blk.0.attn_v": ((16, 32), 1),
        "blk.0.attn_output": ((32, 32), 0),
        "blk.0.ffn_norm": ((32,), 0),
        "blk.0.ffn_gate": ((64, 32), 8),
        "blk.0.ffn_up": ((64, 32), 8),
        "blk.0.ffn_down": ((32, 64), 8),
        "output_norm": ((32,), 0),
    }
    bytes_per_number = {0: 4, 1: 2, 8: 34 / 32}
    return [
        (f"{name}.weight", shape, code, bytes(int(math.prod(shape) * bytes_per_number[code])))
        for name, (shape, code) in shapes.items()
    ]


MODEL_KEYS = [
    ("general.architecture", TEXT, "llama"),
    ("general.alignment", UINT32, 32),
    ("llama.vocab_size", UINT32, 8),
    ("llama.context_length", UINT32, 16),
    ("llama.embedding_length", UINT32, 32),
    ("llama.block_count", UINT32, 1),
    ("llama.feed_forward_length", UINT32, 64),
    ("llama.attention.head_count", UINT32, 2),
    ("llama.attention.head_count_kv", UINT32, 1),
    ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
    ("llama.rope.freq_base", FLOAT32, 500.0),
    ("llama.rope.dimension_count", UINT32, 16),
    ("llama.rope.scaling.type", TEXT, "linear"),
    ("llama.rope.scaling.factor", FLOAT32, 2.0),
]

SPM_KEYS = [
    ("tokenizer.ggml.model", TEXT, "llama"),
    ("tokenizer.ggml.tokens", ARRAY, PIECES, TEXT),
    ("tokenizer.ggml.scores", ARRAY, [-float(i) for i in range(len(PIECES))], FLOAT32),
    ("tokenizer.ggml.token_type", ARRAY, [2, 3, 3, *[6] * 256, *[1] * 5], 5),
    ("tokenizer.ggml.bos_token_id", UINT32, 1),
    ("tokenizer.ggml.eos_token_id", UINT32, 2),
    ("tokenizer.ggml.add_space_prefix", BOOL, True),
    ("tokenizer.chat_template", TEXT, "{{ messages }}"),
]

BYTE_LEVEL_KEYS = [
    ("tokenizer.ggml.model", TEXT, "gpt2"),
    ("tokenizer.ggml.pre", TEXT, "smollm"),
    ("tokenizer.ggml.tokens", ARRAY, BYTE_LEVEL_TOKENS, TEXT),
    ("tokenizer.ggml.token_type", ARRAY, [*[1] * 259, 3], 5),
    ("tokenizer.ggml.merges", ARRAY, BYTE_MERGES, TEXT),
    ("tokenizer.ggml.bos_token_id", UINT32, 259),
    ("tokenizer.ggml.eot_token_id", UINT32, 259),
]


VOCABULARIES = {"GGUF byte-level": BYTE_LEVEL_KEYS, "GGUF SentencePiece": SPM_KEYS}


def make_gguf_model(folder: Path, vocabulary: Sequence[tuple] = ()) -> None:
    (folder / GGUF).write_bytes(gguf([*MODEL_KEYS, *vocabulary], _gguf_tensors()).data)


def load_gguf_model(folder: Path) -> None:
    check_model(load_model(folder / GGUF))


def load_gguf_tokenizer(folder: Path) -> None:
    check_tokenizer(load_tokenizer(folder / GGUF))


def gguf_model_mutations(folder: Path) -> list[Mutation]:
    return _gguf_mutations(MODEL_KEYS, MODEL_KEYS) + _tensor_mutations()


def gguf_tokenizer_mutations(folder: Path, vocabulary: list[tuple]) -> list[Mutation]:
    return _gguf_mutations(MODEL_KEYS + vocabulary, vocabulary)


OTHER_VALUES = [
    (UINT32, 0),
    (UINT32, 2**32 - 1),
    (5, -1),
    (UINT64, 2**63),
    (FLOAT32, math.nan),
    (FLOAT32, math.inf),
    (FLOAT32, 0.0),
    (12, 1e-320),
    (BOOL, True),
    (TEXT, ""),
    (TEXT, "x\n\x1b[2J"),
    (ARRAY, [], UINT32),
    (ARRAY, [1, 2], UINT32),
    (ARRAY, [1.5], FLOAT32),
    (ARRAY, ["x", "x"], TEXT),
]


def _gguf_mutations(keys: list[tuple], changed: list[tuple]) -> list[Mutation]:
    """Mutations of a file with these keys, of which only those in ``changed`` get other values."""
    written = gguf(keys, _gguf_tensors())
    ends = [start + width for start, width in written.places.values()]
    mutations = [
        *number_mutations(GGUF, written.places),
        *byte_mutations(bytes(written.data), GGUF, ends),
        *file_mutations(GGUF),
    ]
    for key in changed:
        at = keys.index(key)
        for other in OTHER_VALUES:
            others = [*keys[:at], (key[0], *other), *keys[at + 1 :]]
            mutations.append(_whole_gguf(f"{key[0]} is {other[1]!r} of type {other[0]}", others))
        mutations.append(_whole_gguf(f"no {key[0]}", [*keys[:at], *keys[at + 1 :]]))
        mutations.append(_whole_gguf(f"{key[0]} repeated", [*keys, key], expect="refused"))
    return mutations


def _whole_gguf(name: str, keys: list[tuple], tensors=None, shift=0, **options) -> Mutation:
    data = bytes(gguf(keys, tensors or _gguf_tensors(), shift).data)
    return fixed_edit(GGUF, name, lambda old: data, **options)


def _tensor_mutations() -> list[Mutation]:
    tensors, mutations = _gguf_tensors(), []
    name, shape, _, numbers = tensors[2]
    for other in range(45):
        changed = [*tensors[:2], (name, shape, other, numbers), *tensors[3:]]
        mutations.append(_whole_gguf(f"{name} of type {other}", MODEL_KEYS, changed))
    mutations += [
        _whole_gguf(f"tensors shifted by {shift}", MODEL_KEYS, shift=shift, expect="refused")
        for shift in (-32, -1, 1, 16)
    ]
    mutations.append(_whole_gguf("a tensor repeated", MODEL_KEYS, [*tensors, tensors[0]], expect="refused"))
    # One key, "x", whose value is an array that contains one array that contains one array …
    nested = b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"x", ARRAY) + struct.pack("<IQ", ARRAY, 1) * DEPTH
    mutations.append(fixed_edit(GGUF, "deep arrays", lambda old: nested, expect="refused"))
    return mutations
