"""LoRA adapters in the layout of the package ``peft``: a config, and the weights that were trained.

``adapter_config.json`` has the rank, α, the names of the layers and that of the base model;
``adapter_model.safetensors`` has A (r, in) and B (out, r) of every LoRA layer, and whole layers that were
trained with them (``modules_to_save``). A key is "base_model.model." and the parameter's name in the class of
``transformers``: ``base_model.model.transformer.h.0.attn.c_attn.lora_A.weight``. A and B are stored as here
even if W is stored as (in, out), as GPT-2's are (``fan_in_fan_out``).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyllm.backend.device import to_device, to_device_of
from tinyllm.checks import check_range
from tinyllm.errors import Error
from tinyllm.files import replacing, write_whole
from tinyllm.nn import Linear, Module, adapter_modules, add_lora, loaded, lora_layers
from tinyllm.nn.surgery import first_match, matches
from tinyllm.tensor import Tensor
from tinyllm.weights.adapter_config import read_adapter_config
from tinyllm.weights.safetensors import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Weights,
    is_adapter,
    write_safetensors,
)

PREFIX = "base_model.model."
HEADS = ("lm_head", "score")  # have no prefix such as "transformer." in ``transformers``

# ------------------------------------------------------------------------------------------- saving


def save_adapter(
    model: Module, folder: str | Path, base: str | Path | None, task_type: str = "CAUSAL_LM",
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write the LoRA layers of a model, and the layers trained whole with them, as ``peft`` does.

    ``base`` names the base model for ``load_model``; a path is written as an absolute one. ``task_type`` is
    PEFT's: "SEQ_CLS" for a classifier. Raises ``Error`` if there are no LoRA layers, if another parameter is
    trained (it would be lost), or if the folder has an adapter or a model and ``overwrite`` is False.
    """
    folder, layers, parts = Path(folder), lora_layers(model), adapter_modules(model)
    if not layers:
        raise Error("the model has no LoRA layers to save: call nn.add_lora, or save_pretrained")
    inside = {id(parameter) for module in parts.values() for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            loaded(parameter, name)
        elif parameter.requires_grad:
            raise Error(f"{name} is trained, but is not in the adapter: name its layer in modules_to_save")
    if not overwrite and (is_adapter(folder) or any(folder.glob("*model*.safetensors"))):
        raise Error(f"{folder} already contains a model: choose another folder or pass overwrite=True")
    if base is not None and os.path.exists(base):
        base = os.path.abspath(base)
    config = _config_of(model) | {"base_model_name_or_path": base and str(base), "task_type": task_type}
    tensors = {
        PREFIX + _published(model, f"{name}.{inner}"): array
        for name, module in parts.items()
        for inner, array in module.state_dict().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG).unlink(missing_ok=True)  # never the config of another adapter
        with replacing(folder / ADAPTER_WEIGHTS) as new:
            write_safetensors(new, tensors)
        write_whole(folder / ADAPTER_CONFIG, json.dumps(config, indent=2).encode() + b"\n")
    except OSError as error:
        raise Error(f"cannot write to {folder} ({error}): check the path and disk space") from error


def _config_of(model: Module) -> dict:
    """The adapter_config.json of a model, without its base and task."""
    layers = {_published(model, name): layer for name, layer in lora_layers(model).items()}
    if len({(layer.dropout.p, layer.use_rslora) for layer in layers.values()}) > 1:
        raise Error("the LoRA layers differ in dropout or use_rslora, which PEFT's config cannot express")
    first = next(iter(layers.values()))
    ranks, alphas = ({name: getattr(x, key) for name, x in layers.items()} for key in ("rank", "alpha"))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    parts = (".lora_A", ".lora_B", ".base_layer")
    whole = [name for name in adapter_modules(model) if not name.endswith(parts)]
    # Short names, if they match no other layer
    names, short = [*layers], sorted({name.rpartition(".")[2] for name in layers})
    free = [name for name in _plain_layers(model) if name not in whole]
    if {_published(model, name) for name in free if matches(short, name)} == layers.keys():
        names = short
    row = np.empty((1, 2))
    flipped = (layer.base_layer.layout("weight", row).shape == (2, 1) for layer in layers.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": names,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "use_rslora": first.use_rslora,
        "modules_to_save": [_published(model, name) for name in whole] or None,
        "fan_in_fan_out": any(flipped),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _published(model: Module, name: str) -> str:
    """A name in the class of ``transformers``."""
    return name if name.partition(".")[0] in HEADS else getattr(model, "prefix", "") + name


def _plain_layers(model: Module) -> dict[str, Module]:
    """The model's modules by name as they were before LoRA layers were put around some of them."""
    layers = lora_layers(model)
    return {
        name: layers[name].base_layer if name in layers else module
        for name, module in model.named_modules()
        if name and name.rpartition(".")[0] not in layers
    }


def _once(plain: Mapping[str, Module]) -> dict[str, Module]:
    """The layers by name, one in two places only by the first, under which it is saved."""
    first = {id(layer): name for name, layer in reversed(plain.items())}
    return {name: layer for name, layer in plain.items() if first[id(layer)] == name}


# ------------------------------------------------------------------------------------------ loading


def load_adapter(model: Module, folder: str | Path) -> None:
    """Put the adapter in a folder on a model, its base, which is then frozen but for the adapter.

    If the model has LoRA layers already, as one that resumes training has, they must be the adapter's, and
    only the numbers are loaded. If the file's embedding has more rows than the model's, the vocabulary is
    extended. A tied head stays tied if the file has one matrix for both, and is untied otherwise, as in PEFT.

    Raises ``Error``, and changes nothing, if the adapter belongs to another base model.
    """
    folder = Path(folder)
    config, weights, plain = read_adapter_config(folder), _open_weights(folder), _plain_layers(model)
    keys = {key.removeprefix(PREFIX).removeprefix(getattr(model, "prefix", "")): key for key in weights}
    if len(keys) < len(weights):
        raise Error(f"{folder / ADAPTER_WEIGHTS} has two arrays for one parameter: copy it again")
    wanted = _lora_of(model, plain, config)
    shapes = {name: weights.shapes[key] for name, key in keys.items()}
    rows = _rows(model, shapes)
    _check_fits(model, plain, config, wanted, shapes, rows, folder)
    layers = lora_layers(model)
    found = {name: (layer.rank, layer.alpha, layer.use_rslora) for name, layer in layers.items()}
    if layers and found != {name: (*values, config["use_rslora"]) for name, values in wanted.items()}:
        raise Error(
            f"the adapter in {folder} has other LoRA layers, ranks or alphas than the model has already"
        )
    if rows is not None:
        model.resize_token_embeddings(rows, rng=0)  # the file has all rows, also the new ones
    _untie(plain, keys, weights, one_is_enough=config["ensure_weight_tying"])
    if not layers:
        ranks, alphas = ({f"^{re.escape(name)}": v[i] for name, v in wanted.items()} for i in (0, 1))
        owners = {name.rpartition(".")[0] for name in keys}
        whole = {name for name in owners if not name.endswith((".lora_A", ".lora_B", ".base_layer"))}
        add_lora(
            model, targets="|".join(map(re.escape, wanted)), dropout=config["lora_dropout"],
            use_rslora=config["use_rslora"], rank_pattern=ranks, alpha_pattern=alphas, modules_to_save=whole,
            rng=None,
        )  # fmt: skip
    modules = dict(model.named_modules())
    for name, key in keys.items():
        owner, _, local = name.rpartition(".")
        parameter, array = getattr(modules[owner], local), modules[owner].layout(local, weights[key])
        check_range(name, array, parameter.dtype)
        array = array.astype(parameter.dtype, order="C", copy=True)
        parameter.replace(to_device_of(array, parameter.data))


def _open_weights(folder: Path) -> Weights:
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise Error(
            f"{folder} has no {ADAPTER_WEIGHTS}: copy it again (a .bin file is a pickle, which can run code: "
            "if you trust its author, load and save it with peft)"
        )
    return Weights(folder / ADAPTER_WEIGHTS)


def _lora_of(model: Module, plain: Mapping[str, Module], config: dict) -> dict[str, tuple[int, float]]:
    """The rank and α of every layer that PEFT would adapt, by name."""
    only, found = config["layers_to_transform"], {}
    for name in plain:
        theirs, targets = _published(model, name), config["target_modules"]
        block = re.match(r".*?\.[^.]*\.(\d+)\.", theirs)
        exact = not isinstance(targets, str) and theirs in targets  # then in any block
        if (
            matches(targets, theirs)
            and not any(f".{whole}." in f".{theirs}." for whole in config["modules_to_save"] or ())
            and not matches(config["exclude_modules"] or [], theirs)
            and (exact or only in (None, []) or (block and int(block[1]) in [*np.atleast_1d(only)]))
        ):
            patterns = ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")
            found[name] = tuple(first_match(config[own], theirs, config[all_]) for own, all_ in patterns)
    return found


def _rows(model: Module, shapes: Mapping[str, tuple]) -> int | None:
    """The file's number of ids, if the vocabulary was extended: it has embedding and head with more rows."""
    embedding = f"{getattr(model, 'token_embedding', '')}.weight"
    if embedding not in shapes or not shapes[embedding][0] > model.config.vocab_size:
        return None
    tied = getattr(model, model.token_embedding).weight is getattr(model.lm_head, "weight", None)
    return shapes[embedding][0] if tied or "lm_head.weight" in shapes else None


def _check_fits(model, plain, config, wanted, shapes, rows, folder) -> None:
    """Raise ``Error`` unless the file has exactly the adapter's arrays, in the shapes that fit the model."""
    expected, by_id = {}, (getattr(model, "token_embedding", None), "lm_head")
    saved = _once(plain)
    for name, (rank, _) in wanted.items():
        if name not in saved:
            continue
        if not isinstance(plain[name], Linear):
            kind = type(plain[name]).__name__
            raise Error(f"the adapter in {folder} has LoRA on {name} ({kind}): only a Linear is supported")
        outputs, inputs = plain[name].weight.shape
        match [shapes.get(f"{name}.lora_{factor}.weight") for factor in "AB"]:
            case [(stored, _), (_, other)] if stored == other != rank:
                raise Error(f"{folder} has rank {stored} for {name}, but {rank} in its config: copy it again")
        expected |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    for name in sorted(shapes.keys() - expected.keys()):
        owner, _, local = name.replace(".base_layer.", ".").rpartition(".")
        parameter = getattr(plain.get(owner), local, None)
        if isinstance(parameter, Tensor) and (owner in wanted) == (".base_layer." in name):
            shape = plain[owner].layout(local, parameter.data).shape
            expected[name] = (rows, *shape[1:]) if rows and owner in by_id else shape
    for name, module in saved.items():
        if matches(config["modules_to_save"] or [], _published(model, name)):
            for inner, array in module.state_dict().items():
                expected.setdefault(f"{name}.{inner}", array.shape)
    wrong = [] if wanted else [f"no layer is named {config['target_modules']}"]
    wrong += [f"it has no {name}" for name in expected if name not in shapes]
    wrong += [f"the model has no {name}" for name in shapes if name not in expected]
    wrong += [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if wrong:
        reason = wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        base = config["base_model_name_or_path"] or "another model"
        raise Error(f"the adapter in {folder} does not fit the model ({reason}): load its base model, {base}")


def _untie(
    plain: Mapping[str, Module], keys: Mapping[str, str], weights: Weights, one_is_enough: bool
) -> None:
    """Give layers that share a parameter one each, unless the file has the same array for all of them.

    With ``one_is_enough`` they also stay tied if it has an array for some of them only.
    """
    owners = {}  # id of a parameter -> the layers that have it, each as (layer, name in it, key or None)
    names = {name.replace(".base_layer.", "."): key for name, key in keys.items()}
    for name, layer in _once(plain).items():
        for local, value in vars(layer).items():
            if isinstance(value, Tensor):
                owners.setdefault(id(value), []).append((layer, local, names.get(f"{name}.{local}")))
    for places in (places for places in owners.values() if len(places) > 1):
        shared, trained = getattr(*places[0][:2]), []
        for layer, local, key in places:
            if key is not None:
                array = layer.layout(local, weights[key]).astype(shared.dtype)
                # PEFT also stores W of a head with LoRA (base_layer), which was not trained
                if ".base_layer." not in key or not np.array_equal(array, to_device(shared.data, "cpu")):
                    trained.append((layer, local, array))
        in_part = len(trained) < len(places) and not one_is_enough
        if in_part or not all(np.array_equal(trained[0][2], x) for *_, x in trained):
            for layer, local, _ in trained:
                setattr(layer, local, Tensor(shared.data, requires_grad=shared.requires_grad))
