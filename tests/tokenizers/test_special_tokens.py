"""Special tokens: encoding, adding them to tokenizers of each kind, and resizing the model."""

import json

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, Tensor, functional, nn, optim
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT, FILE_NAME, check_fits, extend_vocabulary
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.tiktoken import TiktokenTokenizer

TEXT = "ab abc <a> é end|>\n日本"
BASES = {
    "gpt2": load_tokenizer("gpt2"),
    "bpe": BPETokenizer(train_bpe(TEXT * 2, 262)),
    "char": CharTokenizer.from_text(TEXT),
}
# Some share a beginning or an end, some contain another, one is not ASCII, one has regex metacharacters.
NAMES = ["<a>", "<a>b", "<a", "a>b <|end|>", "<|end|>", "日本|", "(a|b)*", "|>\n"]
EXTENDED = {kind: base.with_special_tokens(NAMES) for kind, base in BASES.items()}

# Pieces of characters in every base vocabulary that form, or almost form, a special token.
pieces = st.sampled_from([*"<a>b|é \n", *NAMES[:3], "a>b ", "|>"])
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.fixture(params=list(BASES))
def base(request):
    return BASES[request.param]


@pytest.fixture(params=list(EXTENDED))
def extended(request):
    return EXTENDED[request.param]


# New ids


def test_added_tokens_get_the_next_ids(base):
    before = dict(base.special_tokens)
    extended = base.with_special_tokens(["<|user|>", "<|bot|>"])
    assert type(extended) is type(base)
    assert extended.vocab_size == base.vocab_size + 2
    assert extended.special_tokens == before | {"<|user|>": base.vocab_size, "<|bot|>": base.vocab_size + 1}
    assert extended.added_tokens == ("<|user|>", "<|bot|>")
    for name, i in extended.special_tokens.items():
        assert extended.decode([i]) == name
    assert (base.special_tokens, base.added_tokens) == (before, ())  # the original is unchanged
    with pytest.raises(Error, match=f"ids.0. is {base.vocab_size}"):
        base.decode([base.vocab_size])


def test_special_tokens_before_extension():
    assert BASES["gpt2"].special_tokens == {END_OF_TEXT: 50256}
    assert BASES["bpe"].special_tokens == {END_OF_TEXT: 261}
    assert BASES["char"].special_tokens == {}


def test_extending_twice_equals_extending_once(base):
    twice = base.with_special_tokens(["<x>"]).with_special_tokens(["<y>", "<z>"])
    once = base.with_special_tokens(["<x>", "<y>", "<z>"])
    assert twice.to_json() == once.to_json()
    assert twice.special_tokens == once.special_tokens
    assert twice.encode("<y>a<x>", "allow") == once.encode("<y>a<x>", "allow")
    assert base.with_special_tokens([]).special_tokens == base.special_tokens


def test_ordinary_text_keeps_its_ids(base):
    extended = base.with_special_tokens(["<|user|>"])
    assert extended.encode(TEXT) == base.encode(TEXT)
    asked = extended.encode(f"ab<|user|>{TEXT}", "allow")
    assert asked == [*base.encode("ab"), base.vocab_size, *base.encode(TEXT)]


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_tiktoken_encoding_has_the_added_tokens(kind):
    base = BASES[kind]
    extended = base.with_special_tokens(["<|user|>"])
    assert isinstance(extended.encoding, tiktoken.Encoding)
    assert extended.encoding.n_vocab == extended.vocab_size
    text = f"ab<|user|>{TEXT}{END_OF_TEXT}"
    assert extended.encoding.encode(text, allowed_special="all") == extended.encode(text, "allow")


def test_any_tiktoken_encoding_can_be_extended():
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "mine", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<x>": 300, "<y>": 290}
    )
    mine = TiktokenTokenizer("mine", encoding)
    assert list(mine.special_tokens.items()) == [("<y>", 290), ("<x>", 300)]
    assert mine.with_special_tokens(["<z>"]).encode("<z><y>", "allow") == [301, 290]


# Text to ids and back


@given(text=texts)
@example(text="<a>b")
@example(text="<a<a>b<|end|>a>b <|end|>")
@example(text="")
def test_decoding_inverts_encoding(text):
    for extended in EXTENDED.values():
        for special in ("refuse", "allow", "text"):
            try:
                ids = extended.encode(text, special)
            except Error:
                assert special == "refuse" and any(name in text for name in extended.special_tokens)
                continue
            assert extended.decode(ids) == text
            array = extended.encode_array(text, special)
            assert array.dtype == np.uint32 and array.flags.writeable
            assert array.tolist() == ids
            assert all(type(i) is int for i in ids)


@given(text=st.text() | texts, kind=st.sampled_from(["gpt2", "bpe"]))
@example(text="<|endoftext|>日本|", kind="gpt2")
def test_decoding_inverts_encoding_of_any_text(text, kind):
    for special in ("allow", "text"):
        assert EXTENDED[kind].decode(EXTENDED[kind].encode(text, special)) == text


def cut(text, names):
    """(part, whether it is a special token) from left to right, matching the longest name each time."""
    parts, i, ordinary = [], 0, ""
    while i < len(text):
        fitting = [name for name in names if text.startswith(name, i)]
        if fitting:
            parts += [(ordinary, False), (max(fitting, key=len), True)]
            ordinary = ""
            i += len(parts[-1][0])
        else:
            ordinary += text[i]
            i += 1
    return [*parts, (ordinary, False)]


@given(text=texts)
@example(text="<a>b")
@example(text="<a>b <|end|>")
def test_allow_matches_the_longest_special_token(text):
    for kind, extended in EXTENDED.items():
        expected = []
        for part, is_special in cut(text, extended.special_tokens):
            expected += [extended.special_tokens[part]] if is_special else BASES[kind].encode(part, "text")
        assert extended.encode(text, "allow") == expected


@given(text=texts)
def test_text_mode_produces_no_special_tokens(text):
    for kind, extended in EXTENDED.items():
        assert extended.encode(text, "text") == BASES[kind].encode(text, "text")


def test_refuse_names_the_special_token(extended):
    with pytest.raises(Error, match=r"special token '<a>b': set special to 'allow' .*'text'"):
        extended.encode("ab <a>b")
    with pytest.raises(Error, match=r"special token '\(a\|b\)\*'"):
        extended.encode_array("(a|b)*", special="refuse")


def test_encode_array_rejects_bad_arguments(extended):
    for arguments, said in [((b"ab",), "bytes"), (("ab", "ignore"), "'ignore'"), (("a\ud800",), "surrogate")]:
        with pytest.raises(Error, match=said):
            extended.encode_array(*arguments)
    assert extended.encode_array("").shape == (0,)


def test_unseen_character_position_is_relative_to_the_whole_text():
    tokenizer = BASES["char"].with_special_tokens(["<Ω>"])
    with pytest.raises(Error, match=r"'Ω' \(U\+03A9, at position 5\) is not one of the tokenizer's 14 "):
        tokenizer.encode("<Ω>abΩ", "allow")
    with pytest.raises(Error, match=r"at position 1\)"):
        tokenizer.encode("<Ω>", "text")


def test_skipped_text_between_special_tokens_is_rejected():
    tokenizer = BPETokenizer([], r"\w+|\s+").with_special_tokens(["<x>"])
    assert tokenizer.decode(tokenizer.encode("ab<x> ab", "allow")) == "ab<x> ab"
    with pytest.raises(Error, match="skips a part of the text"):
        tokenizer.encode("ab<x>!", "allow")


# Names


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["<x>", ""], "special token '' is not a name"),
        ([3], "special token 3 is not a name"),
        (["<x>", "<y>", "<x>"], "special token '<x>' is already a token"),
        (["a"], "special token 'a' is already a token"),
        (["<\ud800>"], "surrogate"),
        ("<x>", "are '<x>': give a list of str"),
        (None, "are None: give a list of str"),
    ],
)
def test_invalid_names_are_rejected(base, names, said):
    with pytest.raises(Error, match=said) as raised:
        base.with_special_tokens(names)
    assert "\n" not in str(raised.value)


def test_existing_names_are_rejected():
    for kind in ("gpt2", "bpe"):
        with pytest.raises(Error, match=r"'<\|endoftext\|>' is already a token"):
            BASES[kind].with_special_tokens([END_OF_TEXT])
    with pytest.raises(Error, match=r"' the' is already a token"):
        BASES["gpt2"].with_special_tokens([" the"])
    with pytest.raises(Error, match=r"'<a' is already a token"):
        EXTENDED["char"].with_special_tokens(["<a"])


# Saving and loading


def test_save_and_load_keep_the_special_tokens(extended, tmp_path):
    extended.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(extended)
    assert loaded.to_json() == extended.to_json()
    assert (loaded.vocab_size, loaded.special_tokens) == (extended.vocab_size, extended.special_tokens)
    text = "".join(NAMES[:3]) + "ab é"
    assert loaded.encode(text, "allow") == extended.encode(text, "allow")
    assert loaded.decode(range(loaded.vocab_size)) == extended.decode(range(loaded.vocab_size))


def test_file_without_added_tokens_is_read(base, tmp_path):
    definition = base.to_json()
    assert definition.pop("added_tokens") == []
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    assert load_tokenizer(tmp_path).special_tokens == base.special_tokens


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (None, "are None"),
        ("<x>", "are '<x>'"),
        ([""], "not a name"),
        ([1], "special token 1"),
        (["<x>", "<x>"], "already"),
    ],
)
def test_load_error_names_the_file_and_the_problem(base, tmp_path, added, said):
    (tmp_path / FILE_NAME).write_text(json.dumps(base.to_json() | {"added_tokens": added}), encoding="utf-8")
    with pytest.raises(Error, match=said) as raised:
        load_tokenizer(tmp_path)
    assert repr(str(tmp_path / FILE_NAME)) in str(raised.value)


# The model


def small_gpt2(vocab_size, dtype=np.float64, **changes):
    sizes = dict(vocab_size=vocab_size, n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    dropouts = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2(GPT2Config(**sizes | dropouts | changes), rng=np.random.default_rng(3)).astype(dtype)
    if model.lm_head.bias is not None:
        model.lm_head.bias.data[...] = np.random.default_rng(4).standard_normal(vocab_size)
    return model


HEADS = [dict(), dict(tie_word_embeddings=False), dict(tie_word_embeddings=False, lm_head_bias=True)]


def head_input_and_logits(model, ids):
    seen = []
    with nn.observe(lambda o: seen.append(o.inputs[0]) if o.name == "lm_head" else None):
        logits = model(ids)
    return seen[0].data, logits.data


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("head", HEADS)
def test_resizing_keeps_the_rows_of_old_ids(head, dtype):
    """A BLAS may sum a larger matrix in another order, so the product is compared for the old rows only."""
    model = small_gpt2(13, dtype, **head)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    ids = np.random.default_rng(0).integers(13, size=(3, 8))
    x, logits = head_input_and_logits(model, ids)
    model.resize_token_embeddings(18, np.random.default_rng(5))

    for name, array in model.state_dict().items():
        grown = name in ("wte.weight", "lm_head.weight", "lm_head.bias")
        assert array.shape == ((18, *before[name].shape[1:]) if grown else before[name].shape)
        assert array.dtype == dtype
        assert np.array_equal(array[: len(before[name])], before[name])
    x_after, logits_after = head_input_and_logits(model, ids)
    assert np.array_equal(x_after, x)
    bias = None if model.lm_head.bias is None else model.lm_head.bias[:13]
    old_rows = functional.linear(Tensor(x_after), model.lm_head.weight[:13], bias)
    assert np.array_equal(old_rows.data, logits)
    assert logits_after.shape == (3, 8, 18)
    assert np.abs(logits_after[..., :13] - logits).max() <= 16 * 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("head", HEADS)
def test_new_rows_are_initialized_as_in_the_config(head):
    model = small_gpt2(13, **head)
    tied = model.lm_head.weight is model.wte.weight
    config = model.config
    rng = np.random.default_rng(5)
    model.resize_token_embeddings(2013, np.random.default_rng(5))
    samples = [0.3 * rng.standard_normal((2000, 16), dtype=np.float32) for _ in range(2)]
    assert np.array_equal(model.wte.weight.data[13:], samples[0])
    assert (model.lm_head.weight is model.wte.weight) == tied == config.tie_word_embeddings
    if not tied:
        assert np.array_equal(model.lm_head.weight.data[13:], samples[1])
    if model.lm_head.bias is not None:
        assert not model.lm_head.bias.data[13:].any()
    assert model.config == GPT2Config(**config.__dict__ | {"vocab_size": 2013})
    assert config.vocab_size == 13


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_extended_with_a_published_tokenizer(any_tokenizer, tied):
    config = LlamaConfig(
        vocab_size=any_tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    model = Llama(config, rng=0)
    extended = extend_vocabulary(model, any_tokenizer, ["<|user|>", "<|bot|>"], np.random.default_rng(0))
    assert model.config.vocab_size == extended.vocab_size == any_tokenizer.vocab_size + 2
    ids = extended.encode("<|user|>a<|bot|>", "allow")
    assert model([ids]).shape == (1, len(ids), extended.vocab_size)
    assert [ids[0], ids[-1]] == [any_tokenizer.vocab_size, any_tokenizer.vocab_size + 1]
    assert extended.decode(ids).replace(" ", "") == "<|user|>a<|bot|>"  # Llama 2 may add a space


def test_new_rows_have_the_dtype_of_the_old_rows():
    model = small_gpt2(13, np.float16, tie_word_embeddings=False, lm_head_bias=True)
    model.resize_token_embeddings(15, np.random.default_rng(0))
    assert {parameter.dtype for parameter in model.parameters()} == {np.dtype(np.float16)}


def test_same_size_changes_nothing_and_samples_nothing():
    model, rng = small_gpt2(13), np.random.default_rng(0)
    before = model.wte.weight.data.copy()
    model.resize_token_embeddings(np.int64(13), rng)
    assert np.array_equal(model.wte.weight.data, before)
    assert type(model.config.vocab_size) is int
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("vocab_size", [12, 0, -1, 20.0, True, "20", None])
def test_size_below_the_old_one_is_rejected(vocab_size):
    model = small_gpt2(13)
    with pytest.raises(Error, match=f"vocab_size {vocab_size!r} is too small for the model's 13 ids"):
        model.resize_token_embeddings(vocab_size, np.random.default_rng(0))
    assert model.wte.weight.shape == (13, 16)


@pytest.mark.parametrize("head", HEADS)
def test_training_step_updates_the_new_rows(head):
    model = small_gpt2(13, **head)
    ids = np.array([[0, 13, 2, 14]])
    model.loss(ids % 13, ids % 13).backward()
    model.resize_token_embeddings(15, np.random.default_rng(0))
    assert all(parameter.grad is None for parameter in model.parameters())
    before = {name: array.copy() for name, array in model.state_dict().items()}
    optimizer = optim.AdamW(model, lr=0.1, weight_decay=0.0)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert (after["wte.weight"][13] != before["wte.weight"][13]).all()
    if not model.config.tie_word_embeddings:
        assert (after["lm_head.weight"][13:] != before["lm_head.weight"][13:]).all()
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() < loss.item()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_extended_model_and_tokenizer_round_trip(kind, head, tmp_path):
    tokenizer = BASES[kind]
    model = small_gpt2(tokenizer.vocab_size, np.float32, **head)
    extended = extend_vocabulary(model, tokenizer, ["<|user|>", "<|bot|>"], np.random.default_rng(0))
    assert extended.to_json() == tokenizer.with_special_tokens(["<|user|>", "<|bot|>"]).to_json()
    assert model.config.vocab_size == extended.vocab_size
    ids = [extended.encode("<|user|>a<|bot|>", "allow")]
    logits = model(ids).data

    model.save_pretrained(tmp_path)
    extended.save(tmp_path)
    loaded, loaded_tokenizer = GPT2.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    check_fits(loaded_tokenizer, loaded)
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.wte.weight) == model.config.tie_word_embeddings
    assert loaded_tokenizer.encode("<|user|>a<|bot|>", "allow") == ids[0]
    assert np.array_equal(loaded(ids).data, logits)


@pytest.mark.parametrize(
    ("extra", "names", "said"),
    [
        (1, ["<x>"], "the tokenizer char has 14 ids, but the model has 15: use the tokenizer"),
        (0, ["<x>", "a"], "'a' is already a token"),
        (0, [""], "not a name"),
    ],
)
def test_error_leaves_the_model_unchanged(extra, names, said):
    tokenizer = BASES["char"]
    model = small_gpt2(tokenizer.vocab_size + extra)
    config, weight = model.config, model.wte.weight.data.copy()
    with pytest.raises(Error, match=said):
        extend_vocabulary(model, tokenizer, names, np.random.default_rng(0))
    assert model.config is config
    assert np.array_equal(model.wte.weight.data, weight)
