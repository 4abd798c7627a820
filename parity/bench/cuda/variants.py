"""The variants on a GPU: every work in tinyllm, in PyTorch eager, and in compiled PyTorch.

A variant loads the model onto the device and returns it ``Prepared``: the work to be timed, and the numbers
in which all variants must agree. All variants load the same weights. The device may also be the CPU, where
all of this is tested.

PyTorch's peers are the twins of this package, which use torch's own layer_norm, rms_norm, GELU and SDPA: one
kernel each, where transformers launches several. The twins have no KV cache, so decoding uses the Llama of
transformers in a plain greedy loop that never waits for the GPU. The compiled loop has a cache of fixed size
and CUDA graphs.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from parity.bench.cuda.works import STEPS_COMPARED, Work, positions_compared, random_ids


class Prepared(NamedTuple):
    """A variant with its model on the device.

    ``answers()`` returns the float32 array, on the host, that is compared: for ``train`` the losses of the
    first steps, all on one batch, so that they decrease; for ``forward`` the logits of some positions; for
    ``decode`` the logits after the prompt and after each of a few given tokens.
    ``once()`` does the work once and may return before the device is done. ``device`` is the name of the GPU
    that holds the weights, or "cpu".
    """

    answers: Callable[[], Any]
    once: Callable[[], object]
    device: str


def training(step: Callable[[], Any], device: str) -> Prepared:
    """A variant of ``train``, whose ``step()`` returns the loss as a Tensor or a torch tensor."""
    import numpy as np

    return Prepared(
        lambda: np.array([step().item() for _ in range(STEPS_COMPARED)], np.float32), step, device
    )


# ---- tinyllm ----


def tinyllm_train(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """Training with tinyllm; parameters and optimizer state are float32 in every precision."""
    from parity.bench.train_variants import MAX_GRAD_NORM, tinyllm_optimizer
    from tinyllm.optim import clip_grad_norm

    model = tinyllm_model(folder, "float32", device).train()
    optimizer, (ids, targets) = tinyllm_optimizer(model), random_ids(work, 2)

    def step():
        loss = model.loss(ids, targets)
        loss.backward()
        clip_grad_norm(optimizer.parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return training(step, tinyllm_device(model))


def tinyllm_forward(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """The forward pass of tinyllm; in bfloat16 the weights are stored as bfloat16."""
    import numpy as np

    from tinyllm import no_grad
    from tinyllm.backend.device import to_device

    model, (ids,) = tinyllm_model(folder, stored_name(precision), device), random_ids(work)

    def once():
        with no_grad():
            return model(ids).data

    def answers():
        return to_device(once()[:, positions_compared(work.context)], "cpu").astype(np.float32)

    return Prepared(answers, once, tinyllm_device(model))


def tinyllm_decode(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """Greedy decoding with ``tinyllm.generate``, which copies every token to the host."""
    import numpy as np

    from tinyllm import generate, no_grad
    from tinyllm.backend.device import to_device

    model, (prompt, given) = tinyllm_model(folder, stored_name(precision), device), random_ids(work, 2)

    def once():
        return list(generate(model, prompt, work.new, temperature=0))

    def answers():
        cache = model.new_cache(work.batch, work.context + STEPS_COMPARED)
        parts = [prompt, *(given[:, i : i + 1] for i in range(STEPS_COMPARED))]
        with no_grad():
            logits = [model(ids, last_only=True, cache=cache).data for ids in parts]
        return np.stack([to_device(array, "cpu").astype(np.float32) for array in logits])

    return Prepared(answers, once, tinyllm_device(model))


def tinyllm_model(folder: str, dtype: str, device: str):
    """The model on the device with weights stored in ``dtype``, in eval mode."""
    from tinyllm import load_model
    from tinyllm.backend.dtypes import dtype_of

    return load_model(folder, dtype_of(dtype)).to(device)


def tinyllm_device(model) -> str:
    """The device of a tinyllm model's weights: a GPU's name, or "cpu"."""
    import numpy as np

    if isinstance(next(model.parameters()).data, np.ndarray):
        return "cpu"
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode("utf-8")


def tinyllm_product(precision: str, device: str, size: int) -> Callable[[], object]:
    """One product x Wᵀ of square matrices with ``size`` rows, as tinyllm's layers compute it."""
    import numpy as np

    from tinyllm import Tensor
    from tinyllm import functional as F
    from tinyllm.backend.device import to_device
    from tinyllm.backend.dtypes import dtype_of

    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    a = Tensor(to_device(host.astype(dtype_of(stored_name(precision))), device))
    return in_precision(precision, lambda: F.linear(a, a))


def in_precision(precision: str, function: Callable) -> Callable:
    """``function`` with matrix products in ``precision``."""

    def call():
        from tinyllm import backend

        with backend.autocast(precision):
            return function()

    return call


# ---- PyTorch ----


def torch_train(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """Training with PyTorch: float32 parameters, fused AdamW, autocast for bfloat16, compiled loss."""
    import torch

    from parity.bench.train_variants import torch_train_step

    set_torch_precision(precision)
    twin = torch_twin(folder, device, torch.float32).train()
    loss = torch.compile(twin.loss, backend=compiler, fullgraph=True) if compiler else twin.loss

    def compute_loss(ids, targets):
        half = precision == "bfloat16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            return loss(ids, targets)

    step = torch_train_step(twin, compute_loss)
    ids, targets = torch.from_numpy(random_ids(work, 2)).to(device)  # once, so that no step waits for it
    return training(lambda: step(ids, targets), torch_device(twin))


def torch_forward(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """The forward pass of PyTorch; in bfloat16 the weights are stored as bfloat16."""
    import torch

    set_torch_precision(precision)
    twin = torch_twin(folder, device, stored_dtype(precision)).eval()
    model = torch.compile(twin, backend=compiler, fullgraph=True) if compiler else twin
    (ids,) = torch.from_numpy(random_ids(work)).to(device)

    def once():
        with torch.no_grad(), torch.device(device):  # the twin computes its RoPE angles there, too
            return model(ids)

    def answers():
        return once()[:, positions_compared(work.context)].float().cpu().numpy()

    return Prepared(answers, once, torch_device(twin))


def torch_decode(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """Greedy decoding with transformers; tokens stay on the device, and single-token steps are compiled."""
    import torch
    import transformers

    set_torch_precision(precision)
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=stored_dtype(precision), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    capacity = work.context + max(work.new, STEPS_COMPARED)
    step, static = model, None  # without a cache argument, transformers creates one that grows
    if compiler:  # one token's kernels are short, so CUDA graphs help; only inductor has them
        mode = "reduce-overhead" if compiler == "inductor" else None
        step = torch.compile(model, backend=compiler, mode=mode, fullgraph=True)
        static = transformers.StaticCache(config=model.config, max_cache_len=capacity)
    prompt, given = torch.from_numpy(random_ids(work, 2)).to(device)

    def prefill():
        if static is not None:
            static.reset()
        out = model(prompt, past_key_values=static, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def decode_step(token, cache):
        return step(token, past_key_values=cache, use_cache=True).logits

    def once():
        with torch.no_grad():
            logits, cache = prefill()
            tokens = [logits.argmax(-1)]
            while len(tokens) < work.new:
                tokens.append(decode_step(tokens[-1], cache).argmax(-1))
            return tokens

    def answers():
        with torch.no_grad():
            logits, cache = prefill()
            found = [logits.float().cpu()]
            for i in range(STEPS_COMPARED):
                found.append(decode_step(given[:, i : i + 1], cache).float().cpu())
            return torch.stack(found).numpy()

    return Prepared(answers, once, torch_device(model))


def torch_twin(folder: str, device: str, dtype):
    """The PyTorch twin of the model in a folder, built on the device without random initialization."""
    import torch

    from parity.twins.bridge import TWINS
    from tinyllm import load_model

    ours = load_model(folder)
    with torch.device("meta"):
        twin = TWINS[type(ours)](ours.config)
    for name, parameter in ours.named_parameters():
        path, _, last = name.rpartition(".")
        tensor = torch.from_numpy(parameter.data).to(device, dtype, copy=True)
        setattr(twin.get_submodule(path), last, torch.nn.Parameter(tensor))
    embedding, _ = next(ours.named_parameters())  # the first parameter of both models
    if ours.config.tie_word_embeddings:
        twin.lm_head.weight = twin.get_parameter(embedding)
    return twin


def stored_dtype(precision: str):
    """The torch dtype of weights that are not trained."""
    import torch

    return getattr(torch, stored_name(precision))


def set_torch_precision(precision: str) -> None:
    """Set whether torch computes float32 products in TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def torch_device(model) -> str:
    """The device of a torch model's weights: a GPU's name, or "cpu"."""
    import torch

    device = next(model.parameters()).device
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def torch_product(precision: str, device: str, size: int) -> Callable[[], object]:
    """One product x Wᵀ of square matrices with ``size`` rows, as PyTorch's layers compute it."""
    import numpy as np
    import torch

    set_torch_precision(precision)
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    a = torch.from_numpy(host).to(device, stored_dtype(precision))
    return lambda: torch.nn.functional.linear(a, a)


# ---- All variants ----


def stored_name(precision: str) -> str:
    """The name of the dtype of weights that are not trained."""
    return "bfloat16" if precision == "bfloat16" else "float32"


TINYLLM = {"train": tinyllm_train, "forward": tinyllm_forward, "decode": tinyllm_decode}

TORCH = {"train": torch_train, "forward": torch_forward, "decode": torch_decode}

VARIANTS = ("tinyllm", "torch-eager", "torch-compile")


def prepare(variant: str, precision: str, device: str, work: Work, folder: str, compiler: str) -> Prepared:
    """Load a variant's model onto the device; ``compiler`` is the backend of ``torch.compile``."""
    if variant == "tinyllm":
        prepared = TINYLLM[work.task](work, folder, precision, device)
        answers, once = (in_precision(precision, call) for call in (prepared.answers, prepared.once))
        return prepared._replace(answers=answers, once=once)
    chosen = compiler if variant == "torch-compile" else None
    return TORCH[work.task](work, folder, precision, device, chosen)


def product(variant: str, precision: str, device: str, size: int) -> Callable[[], object]:
    """One large matrix product in the variant's library."""
    return (tinyllm_product if variant == "tinyllm" else torch_product)(precision, device, size)
