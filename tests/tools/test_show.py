"""Tokens and probabilities for a terminal: the output is parsed and compared."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Tensor, load_tokenizer, nn
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import probabilities
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tools.show import (
    BACKGROUNDS,
    BAR_CELLS,
    show_probabilities,
    show_tokens,
    watch_probabilities,
)

BYTES = BPETokenizer([])  # one token per byte
CHARS = CharTokenizer("abcd")
EURO = "€".encode()


def shown(text, colour=False, tokenizer=BYTES):
    return show_tokens(tokenizer, tokenizer.encode(text), colour)


# Tokens


def test_gpt2_tokens_without_colour():
    tokenizer = load_tokenizer("gpt2")
    assert shown("Every effort moves you", tokenizer=tokenizer) == (
        "Every| effort| moves| you\n6109 3626 6100 345\n4 tokens, 22 bytes, 5.50 bytes per token"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a b", "a| |b"),
        ("a|\\n", "a|\\||\\\\|n"),  # a | or \ in the text is escaped
        ("a\n\nb", "a|\\n\n|\\n\n|b"),
        ("\t\r\x1b\x00", "\\t|\\r|\\x1b|\\x00"),
        ("€", "\\xe2|\\x82|\\xac"),
    ],
)
def test_escapes_without_colour(text, expected):
    first = shown(text).rsplit("\n", 2)[0]
    assert first == expected


def test_unprintable_characters_are_escaped():
    text = "é\u00a0\u200b\u202e日😀\U000e0001"
    tokenizer = CharTokenizer(text)
    assert shown(text, tokenizer=tokenizer).split("\n")[0] == "é|\\u00a0|\\u200b|\\u202e|日|😀|\\U000e0001"


def test_a_token_with_an_incomplete_character():
    tokenizer = BPETokenizer([BYTES.encode(" " + "€")[:2]])
    assert shown(" €", tokenizer=tokenizer).split("\n")[0] == " \\xe2|\\x82|\\xac"
    piece = shown(" €", colour=True, tokenizer=tokenizer).split("\n")[0]
    assert visible(piece) == [(" ", 0, False), ("\\xe2", 0, True), ("\\x82", 1, True), ("\\xac", 2, True)]


@given(text=st.text() | st.text("ab|\\n\n\t x€"))
@example(text="|\\|\\\\|\n\\n")
@example(text="\\xe2€")
def test_output_without_colour_determines_the_text(text):
    first = shown(text).rsplit("\n", 2)[0]
    escapes = {"\\n\n": b"\n", "\\t": b"\t", "\\r": b"\r", "\\|": b"|", "\\\\": b"\\"}
    pieces = []
    for piece in re.findall(r"((?:\\n\n|\\x[0-9a-f]{2}|\\.|[^|\\])+)(?:\||\Z)", first):
        if piece in escapes:
            pieces.append(escapes[piece])
        elif piece.startswith("\\x"):
            pieces.append(bytes.fromhex(piece[2:]))
        else:
            pieces.append(piece.encode())
    assert pieces == [bytes([byte]) for byte in text.encode()]


def visible(line):
    """(text, number of the background, reversed) of every coloured part; the rest of the line is empty."""
    part = re.compile(r"\x1b\[(7;)?38;5;16;48;5;(\d+)m([^\x1b\n]+)\x1b\[0m")
    assert not part.sub("", line).strip(" ")
    return [
        (text, BACKGROUNDS.index(int(n)), reverse is not None)
        for reverse, n, text in (match.groups() for match in part.finditer(line))
    ]


def test_tokens_and_ids_share_a_background():
    lines = shown("a b\n\n€", colour=True).split("\n")
    assert visible(lines[0]) == [("a", 0, False), (" ", 1, False), ("b", 2, False), ("⏎", 3, True)]
    assert visible(lines[1]) == [("⏎", 0, True)]
    assert visible(lines[2]) == [("\\xe2", 1, True), ("\\x82", 2, True), ("\\xac", 3, True)]
    ids = BYTES.encode("a b\n\n€")
    assert visible(lines[3]) == [(str(i), n % 4, False) for n, i in enumerate(ids)]
    assert lines[4] == "8 tokens, 8 bytes, 1.00 bytes per token"
    assert len(lines) == 5


def test_newlines_inside_a_token_break_the_line():
    tokenizer = BPETokenizer(
        [BYTES.encode("\n\n"), BYTES.encode("a\n"), (257, BYTES.encode("b")[0])], "[^x]+"
    )
    lines = shown("\n\na\nb", colour=True, tokenizer=tokenizer).split("\n")
    assert [visible(line) for line in lines[:3]] == [
        [("⏎", 0, True)],
        [("⏎", 0, True)],
        [("a", 1, False), ("⏎", 1, True)],
    ]
    assert visible(lines[3]) == [("b", 1, False)]


@given(text=st.text() | st.text("ab|\\n\n\t x€\x1b"))
@example(text="\x1b[31m\x9b31m")
def test_no_text_reaches_the_terminal_as_an_escape_sequence(text):
    for line in shown(text, colour=True).split("\n")[:-1]:
        visible(line)
    assert all(character.isprintable() or character == "\n" for character in shown(text))


def test_adjacent_tokens_have_different_backgrounds():
    parts = visible(shown("abababab", colour=True).split("\n")[0])
    assert all(one[1] != other[1] for one, other in pairwise(parts))
    assert len(set(BACKGROUNDS)) == len(BACKGROUNDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 tokens, 0 bytes"),
        ("a", "1 token, 1 byte, 1.00 bytes per token"),
        ("€" * 1000, "1,000 tokens, 3,000 bytes, 3.00 bytes per token"),
    ],
)
def test_counts_of_tokens_and_bytes(text, said):
    tokenizer = CharTokenizer("a€")
    for colour in (False, True):
        assert shown(text, colour, tokenizer).split("\n")[-1] == said


def test_ids_may_be_an_array_and_are_checked():
    ids = CHARS.encode("abca")
    for colour in (False, True):
        assert show_tokens(CHARS, np.array(ids, np.uint32), colour) == show_tokens(CHARS, ids, colour)
        with pytest.raises(Error, match=r"ids\[1\] is 4\b.* 0 to 3"):
            show_tokens(CHARS, [0, 4], colour)


def test_a_special_token_is_one_token():
    tokenizer = CHARS.with_special_tokens(["<|x|>"])
    out = show_tokens(tokenizer, tokenizer.encode("a<|x|>", "allow"), colour=False)
    assert out == "a|<\\|x\\|>\n0 4\n2 tokens, 6 bytes, 3.00 bytes per token"


# Probabilities


def test_bars_are_proportional():
    p = np.array([0.25, 0.5, 0.125, 0.125])
    assert show_probabilities(CHARS, p, chosen=2).split("\n") == [
        f"   50.00%  {'█' * 16:32}  'b'",
        f"   25.00%  {'█' * 8:32}  'a'",
        f">  12.50%  {'█' * 4:32}  'c'",
        f"   12.50%  {'█' * 4:32}  'd'",
    ]
    ascii_bars = show_probabilities(CHARS, p, chosen=2, blocks=False)
    assert ascii_bars == show_probabilities(CHARS, p, chosen=2).replace("█", "#")
    assert ascii_bars.isascii()


def test_a_chosen_token_outside_the_top_has_its_rank():
    p = np.array([0.25, 0.5, 0.125, 0.125])
    lines = show_probabilities(CHARS, p, chosen=3, top=2).split("\n")
    assert [line[0] for line in lines] == [" ", " ", ">"]
    assert lines[2].endswith("'d'  (rank 4)")
    assert show_probabilities(CHARS, p, chosen=1, top=2).split("\n")[0].startswith(">")


def test_tokens_of_equal_probability_are_in_order_of_id():
    two = 2 - np.arange(BYTES.vocab_size) % 2
    lines = show_probabilities(BYTES, two / two.sum(), chosen=0, top=40).split("\n")
    assert [line.split()[-1] for line in lines] == [repr(chr(33 + i)) for i in range(0, 80, 2)]


def test_tokens_of_probability_zero_are_omitted():
    one_hot = np.array([0.0, 0.0, 1.0, 0.0])
    assert show_probabilities(CHARS, one_hot, chosen=2) == f"> 100.00%  {'█' * 32}  'c'"
    lines = show_probabilities(CHARS, one_hot, chosen=0).split("\n")  # a finished row repeats its stop id
    assert lines[1] == f">   0.00%  {' ' * 32}  'a'  (rank 2)"


def test_rare_tokens_are_not_shown_as_zero():
    p = np.array([1 - 1e-6, 1e-6, 0, 0])
    lines = show_probabilities(CHARS, p, chosen=1).split("\n")
    assert [line[2:9] for line in lines] == ["100.00%", " <0.01%"]
    p = np.array([0.99995, 0.00005, 0, 0])
    assert show_probabilities(CHARS, p, chosen=1).split("\n")[1][2:9] == "  0.01%"


@given(p=st.floats(0, 1))
@example(p=1.0)
@example(p=0.5 / 256)
@example(p=1 - 0.5 / 256)
def test_a_bar_is_as_long_as_the_probability(p):
    shapes = " ▏▎▍▌▋▊▉█"
    for line in show_probabilities(CHARS, np.array([p, 1 - p, 0, 0]), chosen=0).split("\n"):
        percent, bar = float(line[2:8].replace("<", "")), line[11 : 11 + BAR_CELLS]
        eighths = sum(shapes.index(cell) for cell in bar)
        assert abs(eighths / (8 * BAR_CELLS) - percent / 100) <= 0.5 / (8 * BAR_CELLS) + 0.0001
        assert bar == "".join(sorted(bar, key=shapes.index, reverse=True))  # full, then one part, then empty


def test_tokens_are_shown_as_reprs():
    tokenizer = BPETokenizer([])
    p = np.zeros(257)
    for text, name in [("\n", r"'\n'"), ("'", '"\'"'), (" ", "' '"), ("\x1b", r"'\x1b'")]:
        p[:] = 0
        p[tokenizer.encode(text)] = 1
        assert show_probabilities(tokenizer, p, tokenizer.encode(text)[0]).endswith("  " + name)
    half = tokenizer.encode("€")[0]
    p[:] = 0
    p[half] = 1
    assert show_probabilities(tokenizer, p, half).endswith(r"  b'\xe2'")


@pytest.mark.parametrize(
    ("p", "chosen", "top", "said"),
    [
        ([0.5, 0.5], 0, 5, r"shape \(2,\): give one for each of the tokenizer's 4 ids"),
        ([[0.25] * 4], 0, 5, r"shape \(1, 4\)"),
        ([3.0, -1.0, 0.0, -1.0], 0, 5, "from -1 to 3 and sum to 1: compute them from logits"),
        ([0.5, 0.4, 0.0, 0.0], 0, 5, "sum to 0.9"),
        ([np.nan, 1.0, 0.0, 0.0], 0, 5, "sum to nan"),
        ([0.25] * 4, 4, 5, r"chosen\[0\] is 4\b.* 0 to 3"),
        ([0.25] * 4, 1.0, 5, "not an integer"),
        ([0.25] * 4, 0, 0, "top is 0"),
        ([0.25] * 4, 0, 2.0, "top is 2.0"),
    ],
)
def test_invalid_probabilities_are_refused(p, chosen, top, said):
    with pytest.raises(Error, match=said) as raised:
        show_probabilities(CHARS, np.array(p), chosen, top)
    assert "\n" not in str(raised.value)


# Recording generate()


def small_gpt2():
    sizes = dict(vocab_size=4, n_positions=3, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)
    return GPT2(GPT2Config(**sizes, embd_pdrop=0.5), rng=np.random.default_rng(0))


@pytest.mark.parametrize("prompts", [[[0, 1], [2, 3]], [[2], [0, 1, 3]]])
@pytest.mark.parametrize("options", [(1.0, None, None), (0.7, 3, 0.9), (0, None, None)])
def test_every_step_shows_the_probabilities_it_was_sampled_from(options, prompts):
    """Also past the context of 3 tokens, without dropout, and without changing the tokens."""
    model = small_gpt2()
    generated = list(generate(model, prompts, 5, *options, rng=np.random.default_rng(1)))
    texts = [list(prompt) for prompt in prompts]
    expected = []
    model.eval()
    for tokens in generated:
        p = [probabilities(model([text[-3:]]).data[:, -1], *options)[0] for text in texts]
        rows = [show_probabilities(CHARS, *each, top=2, blocks=False) + "\n" for each in zip(p, tokens)]
        expected.append("".join(rows))
        for text, token in zip(texts, tokens):
            text.append(token)
    model.train()
    steps = generate(model, prompts, 5, *options, rng=np.random.default_rng(1))
    assert list(watch_probabilities(CHARS, steps, *options, top=2, blocks=False)) == expected
    assert all(out.count(">") == 2 and out.endswith("\n") for out in expected)


def test_between_steps_the_caller_is_not_observed():
    """Its own observer still works there, and its gradients are recorded."""
    model, x = small_gpt2(), Tensor(np.array([3.0]), requires_grad=True)
    seen = []
    with nn.observe(lambda observation: seen.append(observation.module)):
        for _ in watch_probabilities(CHARS, generate(model, [[0]], 3)):
            model.ln_f(Tensor(np.zeros((1, 8), np.float32)))
            (x * x).sum().backward()
    assert seen == [model.ln_f] * 3
    assert x.grad.tolist() == [18.0]


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(Error, match=r"shape \(4,\): give one for each of the tokenizer's 2 ids"):
        next(watch_probabilities(CharTokenizer("ab"), generate(small_gpt2(), [[0]], 1)))
