"""The works that ``bench train`` measures, and the variants: every way to do one of them.

A variant is one function in ``VARIANTS``. It builds model and optimizer and returns ``step(ids, targets)``,
one whole training step that returns its loss. At its top this module imports the standard library only, so
that a variant's process loads that variant's libraries and no others.

The peers are PyTorch's: eager, eager with its fused loss, compiled. JAX is not measured, because transformers
5 has no GPT-2 in JAX, and the result would depend on how we wrote one.
"""

import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A model and its batch: a step trains on ``batch`` × ``context`` tokens."""

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    vocab_size: int
    batch: int
    context: int
    arch: str = "gpt2"  # or llama
    dropout: float = 0.0
    repeat: int = 1  # times as many steps are measured, for a model whose step takes milliseconds

    def config(self) -> dict:
        """The arguments of ``GPT2Config`` or ``LlamaConfig``, whose names tinyllm and transformers share."""
        if self.arch == "gpt2":
            sizes = {name: getattr(self, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
            dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
            return {"vocab_size": self.vocab_size, **sizes, **dropouts}
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_embd * 8 // 3,  # as many weights in three matrices as 4 n_embd in two
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "max_position_embeddings": self.n_positions,
            "tie_word_embeddings": True,
        }


WORKS = {
    "gpt2-124m": Work(12, 768, 12, n_positions=1024, vocab_size=50257, batch=4, context=256),
    "gpt2-124m-1x1024": Work(12, 768, 12, n_positions=1024, vocab_size=50257, batch=1, context=1024),
    "llama-124m": Work(12, 768, 12, 1024, vocab_size=50257, batch=4, context=256, arch="llama"),
    "small": Work(6, 384, 6, n_positions=256, vocab_size=2048, batch=16, context=256),
    "first-run": Work(3, 256, 4, n_positions=128, vocab_size=1024, batch=32, context=128, repeat=3),
    "first-run-dropout": Work(3, 256, 4, 128, 1024, batch=32, context=128, dropout=0.1, repeat=3),
    "4x128-256": Work(4, 128, 4, n_positions=256, vocab_size=1024, batch=1, context=256, repeat=8),
    "4x128-1024": Work(4, 128, 4, n_positions=256, vocab_size=1024, batch=4, context=256, repeat=8),
    "4x128-4096": Work(4, 128, 4, n_positions=256, vocab_size=1024, batch=16, context=256, repeat=4),
    "2x64-512": Work(2, 64, 2, n_positions=64, vocab_size=256, batch=8, context=64, repeat=20),
    "tiny": Work(2, 32, 2, n_positions=16, vocab_size=64, batch=2, context=16),
}

# The recipe of every variant: float32, AdamW with decay on matrices only, clipping.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, (0.9, 0.999), 1e-8, 0.1, 1.0

# step(ids (B, T), targets (B, T)) -> loss, or None if the variant has none; both are int64 NumPy arrays
Step = Callable[..., float | None]


# ---- tinyllm ----


def tinyllm_step(work: Work, threads: int) -> Step:
    """A step as ``tinyllm train`` takes it: that of a small model is shared by a process for each core.

    The number of threads is set by ``measure`` in the environment.
    """
    from tinyllm.training.step import Alone, language_model_loss, training_step
    from tinyllm.training.workers import Workers, suitable_number

    model, steps = tinyllm_model(work), itertools.count()
    optimizer, number = tinyllm_optimizer(model), suitable_number(model, work.batch)
    replicas = Workers(number, model, optimizer, language_model_loss) if number > 1 else Alone()

    def step(ids, targets):
        how = dict(clip=MAX_GRAD_NORM, step=next(steps), replicas=replicas)
        return training_step(model, optimizer, (ids, targets), targets.size, **how).loss

    return step


def tinyllm_optimizer(model):
    from tinyllm.optim import AdamW

    optimizer = AdamW(model, LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    optimizer.reserve()  # as ``tinyllm train`` does
    return optimizer


def tinyllm_model(work: Work):
    """tinyllm's model with random weights, in training mode; the process keeps the memory it frees."""
    import numpy as np

    from tinyllm.backend.memory import keep_memory
    from tinyllm.models import ARCHITECTURES

    keep_memory()  # as ``tinyllm train`` does
    architecture = ARCHITECTURES[work.arch]
    config = architecture.config_class(**work.config())
    return architecture(config, rng=np.random.default_rng(0)).train()


def gemms_step(work: Work, threads: int) -> Step:
    """Only the matrix products of one tinyllm step: a lower bound on the time of the step.

    These are the products of every linear layer, of the head in its chunks, and of attention in its blocks,
    with the shapes, layouts, threads and weights of the step. Activations and gradients are random arrays
    that all layers share, because a step reuses the memory of a finished layer, too.
    """
    import numpy as np

    from tinyllm.nn import Linear

    model, rng = tinyllm_model(work), np.random.default_rng(1)
    B, T, C, H = work.batch, work.context, work.n_embd, work.n_head
    modules = [module for name, module in model.named_modules() if name != "lm_head"]
    linears = [module.weight.data for module in modules if isinstance(module, Linear)]  # (C_out, C_in) each
    widths = {size for w in linears for size in w.shape}
    rows = {size: rng.standard_normal((B * T, size), np.float32) for size in widths}
    # As in the step, (B, H, T, D) each: strided views of rows, except Llama's rotated q and k.
    g = v = rows[C].reshape(B, T, H, C // H).swapaxes(1, 2)
    if work.arch == "gpt2":
        q, k, v = rows[3 * C].reshape(B, T, 3, H, C // H).transpose(2, 0, 3, 1, 4)
    else:
        q = k = np.ascontiguousarray(v)

    def step(ids, targets):
        linear_products(linears, rows)
        head_products(rows[C], model.lm_head.weight.data)
        for _ in range(work.n_layer):
            attention_products(q, k, v, g)

    return step


def linear_products(weights: list, rows: dict) -> None:
    """y = x Wᵀ, dx = g W and dW = gᵀ x for every weight; ``rows`` holds x and g by their width."""
    from tinyllm.backend.threads import matmul

    for w in weights:
        matmul(rows[w.shape[1]], w.T)
    for w in reversed(weights):
        matmul(rows[w.shape[0]], w)
        matmul(rows[w.shape[0]].T, rows[w.shape[1]])


def head_products(x, w) -> None:
    """The products of ``linear_cross_entropy``: logits, dx and dW, one chunk of rows at a time."""
    import numpy as np

    from tinyllm.backend.threads import matmul, one_blas_thread, run_tasks
    from tinyllm.functional.losses import COLUMNS, rows_of_logits

    dx = np.empty_like(x)
    columns = [slice(first, first + COLUMNS) for first in range(0, len(w), COLUMNS)]
    most = rows_of_logits(len(w))
    for start in range(0, len(x), most):
        rows = slice(start, start + most)
        logits = matmul(x[rows], w.T)
        matmul(logits, w, out=dx[rows])
        with one_blas_thread():
            run_tasks(lambda some, logits=logits, rows=rows: logits[:, some].T @ x[rows], columns)


def attention_products(q, k, v, g) -> None:
    """The products of attention in each block: two forward, four backward, and the scores if recomputed."""
    import numpy as np

    from tinyllm.backend.threads import one_blas_thread, run_tasks, threads_for
    from tinyllm.functional.attention import QUERY_BLOCK, _head_groups, weights_are_kept

    B, H, T, _ = q.shape
    kept = np.zeros((B, H, min(T, QUERY_BLOCK), T), q.dtype) if weights_are_kept(B, H, T, T, q) else None
    groups = _head_groups(B, H, min(T, QUERY_BLOCK) * T, threads_for(B * H * T * T))

    def blocks(bh):
        """(queries, visible keys, visible values, output's gradient) of every block of a group of heads."""
        for start in range(0, T, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, T)
            yield q[bh][:, :, start:stop], k[bh][:, :, :stop], v[bh][:, :, :stop], g[bh][:, :, start:stop]

    def forward(bh):
        for queries, keys, values, _ in blocks(bh):
            p = queries @ keys.swapaxes(-1, -2)
            p @ values

    def backward(bh):
        for queries, keys, values, grad in blocks(bh):
            if kept is None:
                p = queries @ keys.swapaxes(-1, -2)
            else:
                p = kept[bh][:, :, : queries.shape[2], : keys.shape[2]]
            ds = grad @ values.swapaxes(-1, -2)
            p.swapaxes(-1, -2) @ grad
            ds @ keys
            ds.swapaxes(-1, -2) @ queries

    with one_blas_thread():
        run_tasks(forward, groups)
        run_tasks(backward, groups)


# ---- PyTorch ----


def torch_eager_step(work: Work, threads: int) -> Step:
    """Hugging Face's model in PyTorch eager with its fastest options: SDPA, fused AdamW, no KV cache."""
    model = hugging_face_model(work, threads)
    return torch_step(model, cross_entropy_of(model))


def torch_linear_ce_step(work: Work, threads: int) -> Step:
    """Eager with head and loss fused: ``torch.nn.functional.linear_cross_entropy`` in chunks of rows.

    A chunk has 512 rows; by default torch would use chunks of 8 rows for GPT-2's vocabulary.
    """
    import torch
    import torch.nn.functional as F

    model = hugging_face_model(work, threads)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)

    def compute_loss(ids, targets):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return F.linear_cross_entropy(hidden, model.lm_head.weight, targets.flatten(), options=options)

    return torch_step(model, compute_loss)


def torch_compile_step(work: Work, threads: int) -> Step:
    """The eager step with model and loss compiled into one graph; the first step compiles, so warm up."""
    import torch

    model = hugging_face_model(work, threads)
    return torch_step(model, torch.compile(cross_entropy_of(model), fullgraph=True))


def hugging_face_model(work: Work, threads: int):
    """``GPT2LMHeadModel`` or ``LlamaForCausalLM`` with its own random initialisation, in training mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model(work.arch, **work.config(), bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def cross_entropy_of(model):
    """A function (ids, targets) -> the cross-entropy of the model's logits."""
    import torch.nn.functional as F

    def compute_loss(ids, targets):
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return compute_loss


def torch_step(model, compute_loss) -> Step:
    """A step that takes NumPy arrays and returns a number."""
    import torch

    update = torch_train_step(model, compute_loss)
    return lambda ids, targets: update(torch.from_numpy(ids), torch.from_numpy(targets)).item()


def torch_train_step(model, compute_loss) -> Callable:
    """The training step of every PyTorch variant: its loss, backward, clipping, AdamW.

    The step maps (ids, targets) to the loss, all of them tensors on the model's device.
    """
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step(ids, targets):
        loss = compute_loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


VARIANTS = {
    "tinyllm": tinyllm_step,
    "gemms": gemms_step,
    "torch-eager": torch_eager_step,
    "torch-linear-ce": torch_linear_ce_step,
    "torch-compile": torch_compile_step,
}


def what_is_missing(variant: str) -> str | None:
    """A requirement of this variant that the machine does not meet, or None."""
    if not importlib.util.find_spec("resource"):
        return "Linux or macOS: other systems do not report memory and page faults"
    if not variant.startswith("torch"):
        return None
    for module in ("torch", "transformers"):
        if not importlib.util.find_spec(module):
            return f"{module}: pip install 'tinyllm-numpy[test]'"
    release = importlib.metadata.version("torch")
    if variant == "torch-linear-ce" and tuple(map(int, release.split(".")[:2])) < (2, 13):
        return f"torch 2.13 or newer, but {release} is installed: pip install 'torch>=2.13'"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if variant == "torch-compile" and not shutil.which(compiler):
        return f"a C++ compiler, but {compiler} was not found: install it, or set CXX to yours"
    return None
