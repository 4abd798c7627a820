"""Layers of a model that were replaced: heads, wrappers without a weight, positions, biases of the scores.

Whatever is replaced is used by logits, loss, gradients, a cache and ``generate``, and is never lost on disk.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from support.models import (
    EVERYTHING,
    GEMMA2,
    GEMMA3,
    NO_DROPOUT,
    SMALL,
    SMALL_LLAMA,
    Wrapped,
    assert_close,
    batch,
    random_model,
)

import tinyllm
from tinyllm import Error, GPT2Config, LlamaConfig, Tensor, generate, load_model, nn, no_grad
from tinyllm import functional as F
from tinyllm.functional import composed
from tinyllm.inference.perplexity import evaluate_text
from tinyllm.models.gpt2 import Conv1D
from tinyllm.models.packed import Packed
from tinyllm.weights.safetensors import Weights

CONFIGS = {
    "gpt2": GPT2Config(**SMALL, **NO_DROPOUT),
    "gpt2 untied": GPT2Config(**SMALL, **NO_DROPOUT, tie_word_embeddings=False, lm_head_bias=True),
    "llama": EVERYTHING,
    "llama tied": LlamaConfig(**SMALL_LLAMA, tie_word_embeddings=True),
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_models = pytest.mark.parametrize(
    "config", [CONFIGS["gpt2"], EVERYTHING, GEMMA3], ids=["gpt2", "llama", "gemma3"]
)


def text(model, prompts, tokens=5, **options):
    steps = generate(model, prompts, tokens, rng=np.random.default_rng(0), **options)
    return np.array(list(steps)).tolist()


# ----------------------------------------------------------------------------------- the head


class Zeros(nn.Module):
    def __init__(self, classes):
        self.classes = classes

    def forward(self, h):
        return Tensor(np.zeros((*h.shape[:-1], self.classes))) + h.sum(axis=-1, keepdims=True) * 0


class Louder(nn.Linear):
    def forward(self, h):
        return super().forward(h) * 3


class Called(nn.Linear):
    def __call__(self, h):
        return super().__call__(h) * 3


class Adapted(nn.Module):
    def __init__(self, layer, rng):
        self.layer = layer
        self.down = nn.Linear(12, 2, bias=False, rng=rng, std=0.5).astype(np.float64)
        self.up = nn.Linear(2, 13, bias=False, rng=rng, std=0.5).astype(np.float64)

    def forward(self, h):
        return self.layer(h) + self.up(self.down(h))


def patched(head):
    plain = head.forward
    head.forward = lambda h: plain(h) * 2
    return head


RNG = np.random.default_rng(1)


def linear(c_out, bias=True):
    return lambda layer: nn.Linear(12, c_out, bias, rng=RNG, std=0.5).astype(np.float64)


def check_loss(model, ids, targets) -> float:
    """Compare the model's loss and its gradients with the cross-entropy of its logits; return the loss."""
    loss = model.loss(ids, targets)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = composed.cross_entropy(model(ids), targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            np.testing.assert_allclose(gradients[name], parameter.grad, rtol=0, atol=1e-12, err_msg=name)
    return loss.item()


HEADS = {
    "zeros": lambda head: Zeros(13),
    "5 classes": linear(5),
    "20 classes": linear(20, bias=False),
    "a subclass": lambda head: Louder(12, 13, rng=RNG, std=0.5).astype(np.float64),
    "called otherwise": lambda head: Called(12, 13, rng=RNG, std=0.5).astype(np.float64),
    "Conv1D": lambda head: Conv1D(12, 13, rng=RNG, std=0.5).astype(np.float64),
    "wrapped": Wrapped,
    "adapted": lambda head: Adapted(head, RNG),
    "patched": patched,
}


@every_model
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_replaced_head_is_used_by_logits_loss_and_generate(config, head):
    model = random_model(config)
    model.lm_head = head(model.lm_head)
    ids, targets = batch(config, (2, 8))
    with no_grad():
        logits = model.lm_head(model.hidden_states(ids))
        logits = F.softcap(logits, model.logit_softcap) if model.logit_softcap else logits
    targets = np.where(targets >= logits.shape[-1], 1, targets)
    assert np.array_equal(model(ids).data, logits.data)

    check_loss(model, ids, targets)
    prompt = [[1, 2], [3]]
    first = model([[1, 2]]).data[0, -1].argmax(), model([[3]]).data[0, -1].argmax()
    assert text(model, prompt, 1, temperature=0)[0] == list(first)


def test_head_of_zeros_has_a_loss_of_log_classes():
    model = random_model(CONFIGS["gpt2"])
    model.lm_head = Zeros(13)
    ids, targets = batch(model.config, (2, 8))
    assert model.loss(ids, targets).item() == pytest.approx(math.log(13), rel=1e-12)


@every_model
def test_loss_calls_every_head_but_a_plain_linear(config):
    """Only for a plain Linear can the loss avoid computing the full logits."""
    model, seen = random_model(config), []
    ids, targets = batch(config, (2, 8))
    with nn.observe(lambda o: seen.append(o.name)):
        model.loss(ids, targets)
        assert "lm_head" not in seen and seen[-1] == ""
        model.lm_head = Louder(12, 13, rng=RNG).astype(np.float64)
        model.loss(ids, targets)
    assert seen[-2:] == ["lm_head", ""]


@every_model
@pytest.mark.parametrize("where", ["class", "object"])
def test_loss_uses_an_overridden_forward(config, where):
    model = random_model(config)
    plain = type(model)

    class Capped(plain):  # the logits of Gemma 2, arXiv 2408.00118
        def forward(self, ids, **options):
            return (super().forward(ids, **options) / 2).tanh() * 2

    if where == "class":
        model.__class__ = Capped
    else:
        model.forward = lambda ids, **options: (plain.forward(model, ids, **options) / 2).tanh() * 2
    ids, targets = batch(config, (2, 8))
    expected = composed.cross_entropy(model(ids), targets).item()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-12)
    assert np.abs(model(ids).data).max() <= 2
    options = {"num_targets": 7, "weights": np.random.default_rng(0).random(targets.shape)}
    apart = Packed([[0, 0, 0, 1, 1, 1, 1, 1]] * 2, model)
    expected = composed.cross_entropy(model(ids, cache=apart), targets, **options).item()
    assert model.loss(ids, targets, **options, cache=apart).item() == pytest.approx(expected, rel=1e-12)


@every_model
@pytest.mark.parametrize("where", ["class", "object"])
def test_loss_uses_overridden_head_logits(config, where):
    model = random_model(config)
    plain = type(model)

    class Scaled(plain):  # the logits of Cohere's models
        def head_logits(self, h):
            return super().head_logits(h) * 0.25

    if where == "class":
        model.__class__ = Scaled
    else:
        model.head_logits = lambda h: plain.head_logits(model, h) * 0.25
    ids, targets = batch(config, (2, 8))
    loss = check_loss(model, ids, targets)
    assert model.head_loss(model.hidden_states(ids), targets).item() == loss


@every_model
@pytest.mark.parametrize("head", [None, Wrapped])
def test_weights_multiply_the_loss_of_each_target(config, head):
    """Weights of 0 and 1 select targets. In general: torch's reduction="none", weighted and summed."""
    model = random_model(config)
    if head:
        model.lm_head = head(model.lm_head)
    ids, targets = batch(config, (2, 8))
    kept = np.random.default_rng(0).random(targets.shape) < 0.6
    kept[0, 0] = True
    expected = model.loss(ids, np.where(kept, targets, -100)).item()
    assert model.loss(ids, targets, weights=kept.astype(float)).item() == pytest.approx(expected, rel=1e-12)
    weights = np.random.default_rng(1).random(targets.shape)
    logits, each = torch.from_numpy(model(ids).data).flatten(0, 1), torch.from_numpy(targets).flatten()
    losses = torch.nn.functional.cross_entropy(logits, each, reduction="none").numpy()
    total = (losses * weights.ravel()).sum()
    assert model.loss(ids, targets, 7, weights).item() == pytest.approx(total / 7, rel=1e-12)


# -------------------------------------------------------------- wrapped layers, without a weight


def leaves(model):
    return [name for name, module in model.named_modules() if not list(module.children())]


def check_all_uses(model, expected, config):
    """Compare the outputs, gradients and files of a wrapped model with ``expected``, the unwrapped one."""
    ids, targets = batch(config, (2, 8))
    model.astype(np.float32).to("cpu").astype(np.float64)
    expected.astype(np.float32).astype(np.float64)
    assert np.array_equal(model(ids).data, expected(ids).data)
    loss, other = model.loss(ids, targets), expected.loss(ids, targets)
    assert loss.item() == pytest.approx(other.item(), rel=1e-13)
    loss.backward()
    other.backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(p.grad, q.grad, "a gradient", 1e-12)
    with no_grad():
        cache = model.new_cache(2)
        assert cache.keys[0].dtype == np.float64
        steps = [model(ids[:, t : t + 1], cache=cache).data for t in range(8)]
        assert_close(np.concatenate(steps, axis=1), expected(ids).data, "with a cache", 1e-13)
    prompts = [[1, 2, 3], [4]]
    assert text(model, prompts) == text(expected, prompts) == text(model, prompts, use_cache=False)


@every_model
def test_any_layer_can_be_wrapped_by_a_module_without_a_weight(config):
    for name in leaves(random_model(config)):
        model = random_model(config)
        assert nn.replace(model, name, lambda name, layer: Wrapped(layer)) == [name]
        check_all_uses(model, random_model(config), config)


@every_model
def test_all_layers_and_blocks_can_be_wrapped_together(config):
    model = random_model(config)
    names = leaves(model)
    nn.replace(model, "*?", lambda name, layer: Wrapped(layer) if name in names else layer)
    check_all_uses(model, random_model(config), config)
    model = random_model(config)
    nn.replace(model, "[hl]*.[01]", lambda name, layer: Wrapped(layer))
    check_all_uses(model, random_model(config), config)


@both_models
def test_wrapped_model_can_be_evaluated(config):
    model, expected = random_model(config), random_model(config)
    nn.replace(model, "*_[ap]*", lambda name, layer: Wrapped(layer))  # c_attn, c_proj, q_proj …
    ids = np.random.default_rng(0).integers(0, 13, 30)
    assert evaluate_text(model, ids).nats == pytest.approx(evaluate_text(expected, ids).nats, rel=1e-13)


@both_models
def test_blocks_can_be_removed_and_added(config):
    model = random_model(config)
    blocks = getattr(model, model.blocks)
    ids, _ = batch(config, (1, 8))
    cache = model.new_cache(1)
    for change in (lambda: blocks.append(blocks[0]), lambda: blocks.clear()):
        change()
        with no_grad():
            new = model.new_cache(1)
            steps = [model(ids[:, t : t + 1], cache=new).data for t in range(8)]
            assert_close(np.concatenate(steps, axis=1), model(ids).data, "with a cache", 1e-13)
            with pytest.raises(Error, match=f"2 layers.* {len(blocks)}:"):
                model(ids, cache=cache)


# ------------------------------------------------------------------------------------ positions


class ALiBi(nn.Module):
    """Press et al., arXiv 2108.12409: a penalty proportional to distance, with a slope per head."""

    def __init__(self, heads):
        self.slopes = 2.0 ** (-8 / heads * np.arange(1, heads + 1))[:, None, None]  # (H, 1, 1)

    def forward(self, distances):  # (T, S)
        return -self.slopes * distances


class Kerple(ALiBi):
    """Chi et al., arXiv 2205.09921: unlike ALiBi, wrong if all distances are wrong by the same number."""

    def forward(self, distances):  # (T, S)
        return -self.slopes * np.log1p(np.abs(distances))


class Steps(nn.Module):
    def forward(self, distances):  # (T, S), whole numbers
        return -distances


class Nothing(nn.Module):
    def forward(self, positions):
        return 0.0


def with_alibi(config, bias=ALiBi):
    model = random_model(config)
    blocks = getattr(model, model.blocks)
    for block in blocks:
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        attention.score_bias = bias(3 if hasattr(block, "attn") else 6)
    if hasattr(model, "wpe"):
        model.wpe = Nothing()
    return model


@pytest.mark.parametrize("bias", [ALiBi, Kerple])
@both_models
def test_score_bias_is_equal_with_a_cache(config, bias):
    model = with_alibi(config, bias)
    ids, _ = batch(config, (3, 8))
    with no_grad():
        whole = model(ids).data
        assert np.abs(whole - random_model(config)(ids).data).max() > 1e-3
        for chunks in ([1] * 8, [3, 1, 4], [5, 3]):
            cache, parts = model.new_cache(3), []
            for part in np.split(ids, np.cumsum(chunks)[:-1], axis=1):
                parts.append(model(part, cache=cache).data)
            assert_close(np.concatenate(parts, axis=1), whole, f"in {chunks}", 1e-10)
        cache = model.new_cache(3, 8)
        for i, length in enumerate((5, 7, 2)):
            model(ids[i : i + 1, :length], cache=cache[i : i + 1])
        last = model(ids[:, 7:], cache=cache).data[:, 0]
        for row, length, result in zip(ids, (5, 7, 2), last):
            alone = model(np.append(row[:length], row[7])[None]).data[0, -1]
            assert_close(result, alone, f"a row after {length} tokens", 1e-10)
    prompts = [[1, 2, 3], [4]]
    for tokens in (5, 12):  # the second is longer than the context
        slid = text(model, prompts, tokens, slide=True, use_cache=tokens == 5)
        assert slid == text(model, prompts, tokens, slide=True, use_cache=False)


@both_models
def test_alibi_equals_attention_with_the_bias_as_mask(config):
    model, expected = with_alibi(config), random_model(config)
    if hasattr(expected, "wpe"):
        expected.wpe = Nothing()
    ids, targets = batch(config, (2, 8))
    heads = 3 if isinstance(config, GPT2Config) else 6
    distances = np.arange(8)[:, None] - np.arange(8)
    bias = ALiBi(heads)(distances)
    assert bias.shape == (heads, 8, 8) and (bias[:, 7, 7] == 0).all() and (bias[:, 7, 0] < 0).all()

    def biased(q, k, v, mask, dropout_p, **options):
        assert mask is None
        return composed.scaled_dot_product_attention(q, k, v, bias, **options)

    model.loss(ids, targets).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", biased)
        expected.loss(ids, targets).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(p.grad, q.grad, name, 1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_score_bias_is_converted_and_may_be_a_tensor(dtype):
    class AsTensor(ALiBi):
        def forward(self, distances):
            return Tensor(super().forward(distances))

    model = with_alibi(EVERYTHING).astype(dtype)
    ids, targets = batch(EVERYTHING, (2, 8))
    expected = model(ids).data
    for layer in model.layers:
        layer.self_attn.score_bias = AsTensor(6)
    assert expected.dtype == model.loss(ids, targets).dtype == dtype
    assert np.array_equal(model(ids).data, expected)
    for layer in model.layers:
        layer.self_attn.score_bias = Steps()
    assert model(ids).dtype == dtype and not np.array_equal(model(ids).data, expected)


@both_models
def test_score_bias_can_be_trained(config):
    """Its gradient equals a difference quotient, and it is used by a cache and with padding."""

    class Learned(nn.Module):
        def __init__(self, heads):
            self.slopes = Tensor(np.linspace(0.1, 1, heads)[:, None, None], requires_grad=True)

        def forward(self, distances):
            return self.slopes * distances.astype(float)

    model = with_alibi(config)
    attention = model.h[1].attn if hasattr(model, "h") else model.layers[1].self_attn
    attention.score_bias = Learned(3 if hasattr(model, "h") else 6)
    slopes = attention.score_bias.slopes
    ids, targets = batch(config, (2, 8))
    assert "score_bias.slopes" in [name.partition("attn.")[2] for name, _ in model.named_parameters()]
    model.loss(ids, targets).backward()
    for head in range(len(slopes.data)):
        losses = []
        for step in (1e-6, -2e-6):
            slopes.data[head] += step
            losses.append(model.loss(ids, targets).item())
        slopes.data[head] += 1e-6
        assert slopes.grad[head].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
    prompts = [[1, 2, 3], [4]]
    assert text(model, prompts) == text(model, prompts, use_cache=False)


def test_position_embedding_can_be_any_module():
    class Waves(nn.Module):
        def forward(self, positions):  # (T,) or (B, T)
            return Tensor(np.sin(np.asarray(positions)[..., None] / 10.0 ** np.arange(12)))

    model, same, table = (random_model(CONFIGS["gpt2"]) for _ in range(3))
    model.wpe, same.wpe = Waves(), Wrapped(Waves())
    table.wpe.weight.replace(Waves()(np.arange(8)).data)
    ids, _ = batch(model.config, (2, 8))
    assert_close(model(ids).data, table(ids).data, "logits", 1e-13)
    check_all_uses(same, model, model.config)


# -------------------------------------------------------------------------------------- on disk


def tensors_in(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@every_model
def test_replaced_head_is_saved_and_loaded(config, tmp_path):
    model = random_model(config)
    bias = model.lm_head.bias is not None
    model.lm_head = nn.Linear(12, 13, bias, rng=RNG, std=0.5).astype(np.float64)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, np.float64)
    assert not again.config.tie_word_embeddings
    ids, _ = batch(config, (2, 8))
    assert np.array_equal(again(ids).data, model(ids).data)


@both_models
def test_head_tied_after_construction_is_saved_as_tied(config, tmp_path):
    model = random_model(config)
    model.lm_head.weight = getattr(model, model.token_embedding).weight
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, np.float64)
    assert again.config.tie_word_embeddings
    ids, _ = batch(config, (2, 8))
    assert np.array_equal(again(ids).data, model(ids).data)


KEPT = {  # replaced layer -> error of a plain model that loads the folder
    "lm_head": (linear(13), r"Unexpected \(1\): lm_head.bias"),
    "lm_head 5": (linear(5), r"lm_head.weight is \(5, 12\)"),
    "lm_head wrapped": (lambda layer: Adapted(layer, RNG), r"lm_head\.down\.weight.*lm_head\.up\.weight"),
    "h.1.attn.c_attn": (Wrapped, r"Missing .*h\.1\.attn\.c_attn\.weight.*Unexpected .*c_attn\.layer\.weight"),
    "h.*.mlp": (Wrapped, r"h\.0\.mlp\.layer\.c_fc\.weight"),
    "wte": (Wrapped, r"wte\.layer\.weight"),
    "wpe": (lambda layer: Nothing(), r"Missing \(1\): wpe\.weight"),
    "h.0.mlp.c_fc": (linear(48), r"c_fc\.weight is \(48, 12\)"),
    "h.0.attn": (linear(12), r"h\.0\.attn\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
def test_replaced_layers_are_saved_under_their_own_names(what, tmp_path):
    make, message = KEPT[what]

    def rebuilt(seed):
        model = random_model(CONFIGS["gpt2"])
        nn.replace(model, what.partition(" ")[0], lambda name, layer: make(layer))
        for parameter in model.parameters():
            parameter.replace(np.random.default_rng(seed).standard_normal(parameter.shape))
        return model

    model, other = rebuilt(0), rebuilt(1)
    if what == "h.0.attn":  # saved only
        model.save_pretrained(tmp_path)
    else:
        ids, _ = batch(model.config, (2, 8))
        assert not np.array_equal(other(ids).data, model(ids).data)
        model.save_pretrained(tmp_path)
        other.load_state_dict(tensors_in(tmp_path))
        assert np.array_equal(other(ids).data, model(ids).data)
    other.load_state_dict(tensors_in(tmp_path))
    for name, array in model.state_dict().items():
        assert np.array_equal(array, other.state_dict()[name]), name
    with pytest.raises(Error, match=message):
        load_model(tmp_path)


SILENT = {  # replacements that would silently load as the original layer
    "lm_head": lambda layer: Louder(12, 13, bias=False, rng=RNG).astype(np.float64),
    "h.1.attn.c_proj": linear(12),  # stored as (out, in)
    "h.0.mlp.dropout": Wrapped,
    "ln_f": lambda layer: type("AnotherNorm", (nn.LayerNorm,), {})(12).astype(np.float64),
}


@pytest.mark.parametrize("what", SILENT)
def test_replaced_layers_indistinguishable_in_a_folder_are_refused(what, tmp_path):
    model = random_model(CONFIGS["gpt2"])
    nn.replace(model, what, lambda name, layer: SILENT[what](layer))
    with pytest.raises(Error, match=what):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_layer_replaced_by_a_function_is_refused(tmp_path):
    model = random_model(CONFIGS["gpt2"])
    model.drop = lambda x: x * 2
    with pytest.raises(Error, match="replaced layers drop have"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["a block more", "a block less"])
@every_model
def test_model_with_another_number_of_blocks_is_saved_and_loaded(config, change, tmp_path):
    model = random_model(config)
    blocks = getattr(model, model.blocks)
    if change == "a block more":
        blocks.extend(getattr(random_model(config), model.blocks)[:1])
    else:
        del blocks[1]
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, np.float64)
    assert len(getattr(again, again.blocks)) == len(blocks) == getattr(again.config, again.depth)
    ids, _ = batch(config, (2, 8))
    assert np.array_equal(again(ids).data, model(ids).data)
    assert text(again, [[1, 2]]) == text(model, [[1, 2]]) == text(model, [[1, 2]], use_cache=False)


@every_model
def test_model_without_blocks_or_with_a_shared_block_is_not_saved_as_another(config, tmp_path):
    model = random_model(config)
    blocks = getattr(model, model.blocks)
    blocks.append(blocks[0])
    model.save_pretrained(tmp_path / "shared")
    with pytest.raises(Error, match=rf"{model.blocks}\.2"):
        load_model(tmp_path / "shared")
    blocks.clear()
    with pytest.raises(Error, match=f"{model.depth} must be .* not 0"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("what", KEPT)
def test_folder_with_replaced_layers_is_refused_by_transformers(what, tmp_path):
    model = random_model(CONFIGS["gpt2"])
    nn.replace(model, what.partition(" ")[0], lambda name, layer: KEPT[what][0](layer))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tinyllm-gpt2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saving_a_score_bias_is_refused(tmp_path):
    with pytest.raises(Error, match=r"layers\.0\.self_attn\.score_bias, layers\.1\.self_attn\.score_bias"):
        with_alibi(EVERYTHING).save_pretrained(tmp_path)


class Answers(nn.Module):
    def __init__(self, answer):
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    "answer", [lambda d: d < 3, lambda d: d * 1j, lambda d: None], ids=["bool", "complex", "none"]
)
def test_score_bias_must_return_numbers(answer):
    model = random_model(CONFIGS["gpt2"])
    model.h[0].attn.score_bias = Answers(answer)
    with pytest.raises(Error, match="score_bias returned"):
        model(np.array([[1, 2]]))
    model.h[0].attn.score_bias = answer  # a function would not be saved with the model
    with pytest.raises(Error, match="score_bias is a function"):
        model(np.array([[1, 2]]))


class Shift(nn.Module):
    """In the place of attention: the position before, without a cache."""

    def forward(self, x, *_):
        return tinyllm.concatenate([x[:, :1] * 0.0, x[:, :-1]], axis=1)


@pytest.mark.parametrize(("config", "name"), [("gpt2", "h.*.attn"), ("llama", "layers.*.self_attn")])
def test_a_model_whose_layers_ignore_the_cache_generates_the_same_text(config, name):
    model = random_model(CONFIGS[config])
    nn.replace(model, name, lambda *_: Shift())
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4], [5, 6]]):
        expected = text(model, prompts, use_cache=False)
        cache = model.new_cache(len(prompts), 8)
        assert text(model, prompts) == text(model, prompts, cache=cache) == expected
        assert text(model, prompts, cache=cache) == expected
    assert text(model, [[1, 2, 1, 2]], 4, speculate="prompt") == text(
        model, [[1, 2, 1, 2]], 4, use_cache=False
    )


@pytest.mark.parametrize(
    ("replaced", "found"), [("kv", r"\(6, 4\) and \(6, 4\)"), ("v", r"\(2, 4\) and \(6, 4\)")]
)
def test_keys_or_values_of_another_shape_are_refused_by_the_cache_only(replaced, found):
    model = random_model(EVERYTHING)
    for layer in model.layers:
        for name in replaced:
            setattr(layer.self_attn, f"{name}_proj", linear(24)(layer.self_attn.q_proj))
    with pytest.raises(Error, match=rf"\(2, 4\).*{found}.*use_cache=False"):
        text(model, [[1, 2]])
    if replaced == "kv":
        assert len(text(model, [[1, 2]], use_cache=False)) == 5


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda h: Tensor(h.data[:, 0]), r"\(1, 12\)"),
        (lambda h: Tensor(h.data[..., 0]), r"\(1, 1\)"),
        (lambda h: h.data, "ndarray"),
        (lambda h: Tensor(np.arange(14.0) + np.zeros((*h.shape[:2], 1))), "class 13.* below 13"),
    ],
)
def test_generate_refuses_unsuitable_heads(answer, message):
    model = random_model(CONFIGS["gpt2"])
    model.lm_head = Answers(answer)
    with pytest.raises(Error, match=message):
        text(model, [[1, 2]], temperature=0)


def test_adapter_around_a_tied_head_preserves_the_tie(tmp_path):
    """The tied weight is stored once, the config has the tie, and the rebuilt model loads it."""
    config = CONFIGS["gpt2"]
    model = random_model(config)
    model.lm_head = Adapted(model.lm_head, np.random.default_rng(0)).astype(np.float64)
    model.save_pretrained(tmp_path / "model")
    again = type(model)(config, rng=np.random.default_rng(5)).astype(np.float64)
    again.lm_head = Adapted(again.lm_head, np.random.default_rng(1)).astype(np.float64)
    again.load_state_dict(Weights(tmp_path / "model"))
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(again(ids).data, model(ids).data)
    assert again.lm_head.layer.weight is again.wte.weight
