"""The config of a LoRA adapter, ``adapter_config.json``, in the layout of the package ``peft``."""

import json
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import read_json
from tinyllm.weights.hub import HUB_ID, find_model
from tinyllm.weights.safetensors import ADAPTER_CONFIG, is_adapter

CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"  # the ``task_type`` of a language model, of a classifier

# Keys of an adapter_config.json that are read: their types, and PEFT's default
READ = {
    "r": (int, 8),
    "lora_alpha": (int | float, 8),
    "lora_dropout": (int | float, 0.0),
    "target_modules": (str | list, []),
    "exclude_modules": (str | list | None, None),
    "layers_to_transform": (int | list | None, None),
    "rank_pattern": (dict | None, None),
    "alpha_pattern": (dict | None, None),
    "use_rslora": (bool, False),
    "modules_to_save": (list | None, None),
    "ensure_weight_tying": (bool, False),
    "task_type": (str | None, None),
    "base_model_name_or_path": (str | None, None),
    "revision": (str | None, None),
}

# Keys whose other values change the result in a way that is not implemented. The initializations allowed
# leave the base model's weights as they are; PiSSA, OLoRA, LoftQ and others do not.
FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# Keys that do not affect what an adapter computes once it is trained
BOOKKEEPING = set(
    "auto_mapping corda_config eva_config fan_in_fan_out inference_mode loftq_config lora_ga_config "
    "megatron_core peft_version qalora_group_size runtime_config".split()
)


def read_adapter_config(folder: str | Path) -> dict:
    """The keys ``READ`` of an adapter_config.json.

    Raises ``Error``, naming the key, for a variant of LoRA that is not supported, such as ``use_dora``.
    """
    path = Path(folder) / ADAPTER_CONFIG
    config = read_json(path)
    for key, known in FIXED.items():
        if config.get(key, known[0]) not in known:
            raise Error(f"{path}: {key} {config[key]!r} is not supported; supported: {known}")
    for key in config.keys() - READ.keys() - FIXED.keys() - BOOKKEEPING:
        if config[key]:  # not null, false or empty
            raise Error(f"{path}: {key} is not supported (it is {json.dumps(config[key])[:60]})")
    for key, (kinds, _) in READ.items():
        if key in config and not isinstance(config[key], kinds):
            raise Error(f"{path}: {key} cannot be {config[key]!r}: correct it, or copy the file again")
    return {key: config.get(key, default) for key, (_, default) in READ.items()}


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter, which may be given as that of a run, or as a hub id (see ``find_model``)."""
    folder = find_model(name)
    if not is_adapter(folder):
        raise Error(f"{name} has no {ADAPTER_CONFIG}: give an adapter's folder, or a run that trained one")
    return folder


def base_of(folder: Path) -> str:
    """The base model of an adapter, as ``load_model`` takes it; a relative path may start at the folder.

    Raises ``Error`` if the config names none, or another adapter.
    """
    config = read_adapter_config(folder)
    base = config["base_model_name_or_path"]
    if not base:
        raise Error(
            f"{folder / ADAPTER_CONFIG} names no base model: choose it with --model, and the adapter with "
            f"--adapter {folder}"
        )
    if (folder / base).exists():
        base = str(folder / base)
    elif config["revision"] and HUB_ID.fullmatch(base):
        base = f"{base}@{config['revision']}"
    try:
        path = find_model(base)
    except Error as error:
        raise Error(f"the base model of the adapter in {folder}: {error}") from None
    if is_adapter(path):
        raise Error(f"the base model of the adapter in {folder} is an adapter, {path}: merge that one first")
    return base


def check_causal_lm(folder: Path) -> None:
    """Raise ``Error`` for an adapter that is not a language model's."""
    task = read_adapter_config(folder)["task_type"]
    if task == SEQ_CLS:
        raise Error(
            f"the adapter in {folder} makes a classifier ({SEQ_CLS}), not a language model: use tinyllm "
            "classify"
        )
    if task not in (None, CAUSAL_LM):
        raise Error(
            f"the adapter in {folder} is for {task}: build that model and call load_adapter(model, ...)"
        )
