"""Every way to do one of the works on a GPU: with tinyllm, with PyTorch eager, with PyTorch compiled.

A variant puts the model on the device and returns it ``Prepared``: the work to be timed, and the numbers in
which all variants must agree. Every one takes the same weights from the same folder. The device may be the
CPU, too, where all of this is tested.

PyTorch's peers are the twins of this package (torch's own layer_norm, rms_norm, GELU and SDPA, one kernel
each, where transformers has several). They have no cache, so decoding is transformers' Llama in a plain
greedy loop, which waits for nothing. Compiled, that has a cache of fixed size and CUDA graphs.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from parity.bench.cuda.works import STEPS_COMPARED, Work, positions_compared, random_ids


class Prepared(NamedTuple):
    """A variant with its model on the device.

    ``answers()`` is a float32 array on the host, to be compared: of ``train`` the losses of the first steps,
    all on one batch, so that they fall; of ``forward`` the logits of some positions; of ``decode`` those
    after the prompt and after each of a few given tokens.
    ``once()`` does the work once, and may return before the device is done. ``device`` is the name of the
    GPU on which the weights were found to be, or "cpu".
    """

    answers: Callable[[], Any]
    once: Callable[[], object]
    device: str


# ---- tinyllm ----


def tinyllm_train(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """Parameters and optimiser in float32, whatever products are computed in."""
    import numpy as np

    from parity.bench.train_variants import tinyllm_train_step

    model = tinyllm_model(folder, "float32", device).train()
    step, (ids, targets) = tinyllm_train_step(model), random_ids(work, 2)

    def answers():
        steps = (step(ids, targets) for _ in range(STEPS_COMPARED))
        return np.array([loss.item() for loss in steps], np.float32)

    return Prepared(answers, lambda: step(ids, targets), where_tinyllm_is(model))


def tinyllm_forward(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """For bfloat16 the weights are stored in it."""
    import numpy as np

    from tinyllm import no_grad
    from tinyllm.backend.device import to_device

    model, (ids,) = tinyllm_model(folder, stored_name(precision), device), random_ids(work)

    def once():
        with no_grad():
            return model(ids).data

    def answers():
        return to_device(once()[:, positions_compared(work.context)], "cpu").astype(np.float32)

    return Prepared(answers, once, where_tinyllm_is(model))


def tinyllm_decode(work: Work, folder: str, precision: str, device: str) -> Prepared:
    """``generate``, greedy; every token comes to the host."""
    import numpy as np

    from tinyllm import generate, no_grad
    from tinyllm.backend.device import to_device

    model, (prompt, given) = tinyllm_model(folder, stored_name(precision), device), random_ids(work, 2)

    def once():
        return list(generate(model, prompt, work.new, temperature=0))

    def answers():
        cache = model.new_cache(work.batch, work.context + STEPS_COMPARED)
        read = [prompt, *(given[:, i : i + 1] for i in range(STEPS_COMPARED))]
        with no_grad():
            logits = [model(ids, last_only=True, cache=cache).data for ids in read]
        return np.stack([to_device(array, "cpu").astype(np.float32) for array in logits])

    return Prepared(answers, once, where_tinyllm_is(model))


def tinyllm_model(folder: str, dtype: str, device: str):
    """The model on the device, its weights stored in a dtype, in eval mode."""
    from tinyllm import load_model
    from tinyllm.backend.dtypes import dtype_of

    return load_model(folder, dtype_of(dtype)).to(device)


def where_tinyllm_is(model) -> str:
    """The device of its weights: a GPU's name, or "cpu"."""
    import numpy as np

    if isinstance(next(model.parameters()).data, np.ndarray):
        return "cpu"
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode("utf-8")


def tinyllm_product(precision: str, device: str, size: int) -> Callable[[], object]:
    """One product of square matrices, ``size`` rows each, as tinyllm's layers make it: x Wᵀ."""
    import numpy as np

    from tinyllm import Tensor
    from tinyllm import functional as F
    from tinyllm.backend.device import to_device
    from tinyllm.backend.dtypes import dtype_of

    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    a = Tensor(to_device(host.astype(dtype_of(stored_name(precision))), device))
    return in_precision(precision, lambda: F.linear(a, a))


def in_precision(precision: str, function: Callable) -> Callable:
    """``function`` with its products computed in ``precision``."""

    def call():
        from tinyllm import backend

        with backend.autocast(precision):
            return function()

    return call


# ---- PyTorch ----


def torch_train(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """Parameters in float32, fused AdamW; bfloat16 by autocast. Compiled: the model and its loss."""
    import numpy as np
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
    ids, targets = torch.from_numpy(random_ids(work, 2)).to(device)  # moved once: nothing waits for them

    def answers():
        steps = (step(ids, targets) for _ in range(STEPS_COMPARED))
        return np.array([loss.item() for loss in steps], np.float32)

    return Prepared(answers, lambda: step(ids, targets), where_torch_is(twin))


def torch_forward(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """For bfloat16 the weights are stored in it."""
    import torch

    set_torch_precision(precision)
    twin = torch_twin(folder, device, stored_dtype(precision)).eval()
    model = torch.compile(twin, backend=compiler, fullgraph=True) if compiler else twin
    (ids,) = torch.from_numpy(random_ids(work)).to(device)

    def once():
        with torch.no_grad(), torch.device(device):  # the twin's angles are made there, too
            return model(ids)

    def answers():
        return once()[:, positions_compared(work.context)].float().cpu().numpy()

    return Prepared(answers, once, where_torch_is(twin))


def torch_decode(work: Work, folder: str, precision: str, device: str, compiler: str | None) -> Prepared:
    """transformers' Llama, greedy; the tokens stay on the device. Compiled: the step of one token."""
    import torch
    import transformers

    set_torch_precision(precision)
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=stored_dtype(precision), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    room = work.context + max(work.new, STEPS_COMPARED)
    step, kept = model, None  # no cache given: they make one that grows
    if compiler:  # CUDA graphs, which only their own compiler makes: one token's kernels are short
        mode = "reduce-overhead" if compiler == "inductor" else None
        step = torch.compile(model, backend=compiler, mode=mode, fullgraph=True)
        kept = transformers.StaticCache(config=model.config, max_cache_len=room)
    prompt, given = torch.from_numpy(random_ids(work, 2)).to(device)

    def read_prompt():
        if kept is not None:
            kept.reset()
        out = model(prompt, past_key_values=kept, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def read_token(token, cache):
        return step(token, past_key_values=cache, use_cache=True).logits

    def once():
        with torch.no_grad():
            logits, cache = read_prompt()
            tokens = [logits.argmax(-1)]
            while len(tokens) < work.new:
                tokens.append(read_token(tokens[-1], cache).argmax(-1))
            return tokens

    def answers():
        with torch.no_grad():
            logits, cache = read_prompt()
            found = [logits.float().cpu()]
            for i in range(STEPS_COMPARED):
                found.append(read_token(given[:, i : i + 1], cache).float().cpu())
            return torch.stack(found).numpy()

    return Prepared(answers, once, where_torch_is(model))


def torch_twin(folder: str, device: str, dtype):
    """The PyTorch twin of the model in a folder, on the device; its random initialisation is left out."""
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
    embedding, _ = next(ours.named_parameters())  # both models begin with it
    if ours.config.tie_word_embeddings:
        twin.lm_head.weight = twin.get_parameter(embedding)
    return twin


def stored_dtype(precision: str):
    """What torch stores the weights in where it does not train them."""
    import torch

    return getattr(torch, stored_name(precision))


def set_torch_precision(precision: str) -> None:
    """Whether torch's float32 products are TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def where_torch_is(model) -> str:
    """The device of its weights: a GPU's name, or "cpu"."""
    import torch

    device = next(model.parameters()).device
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def torch_product(precision: str, device: str, size: int) -> Callable[[], object]:
    """One product of square matrices, ``size`` rows each, as PyTorch's layers make it: x Wᵀ."""
    import numpy as np
    import torch

    set_torch_precision(precision)
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    a = torch.from_numpy(host).to(device, stored_dtype(precision))
    return lambda: torch.nn.functional.linear(a, a)


# ---- All of them ----


def stored_name(precision: str) -> str:
    """The dtype in which weights are stored that are not trained."""
    return "bfloat16" if precision == "bfloat16" else "float32"


TINYLLM = {"train": tinyllm_train, "forward": tinyllm_forward, "decode": tinyllm_decode}

TORCH = {"train": torch_train, "forward": torch_forward, "decode": torch_decode}

VARIANTS = ("tinyllm", "torch-eager", "torch-compile")


def prepare(variant: str, precision: str, device: str, work: Work, folder: str, compiler: str) -> Prepared:
    """The variant with its model on the device; ``compiler`` is the backend of ``torch.compile``."""
    if variant == "tinyllm":
        prepared = TINYLLM[work.task](work, folder, precision, device)
        answers, once = (in_precision(precision, call) for call in (prepared.answers, prepared.once))
        return prepared._replace(answers=answers, once=once)
    chosen = compiler if variant == "torch-compile" else None
    return TORCH[work.task](work, folder, precision, device, chosen)


def product(variant: str, precision: str, device: str, size: int) -> Callable[[], object]:
    """One large matrix product by the variant's library."""
    return (tinyllm_product if variant == "tinyllm" else torch_product)(precision, device, size)
