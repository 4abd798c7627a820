"""The options of a run: JSON round trip, defaults, and which of them a resumed run may change."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from support.runs import left

import tinyllm.training.config
from tinyllm.errors import Error
from tinyllm.training.config import PRESETS, TrainConfig, check_continues, flag
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import train

pytestmark = pytest.mark.usefixtures("quick")


CHANGES = dict(
    start_from="elsewhere",
    in_memory=1,
    tokenizer="bpe:300",
    arch="llama",
    special="text",
    special_tokens=("<|a|>",),
    n_layer=2,
    n_head=1,
    n_embd=16,
    context=4,
    stride=None,
    batch=16,
    steps=7,
    lr=1e-3,
    initial_lr=1e-5,
    min_lr=1e-5,
    warmup=1,
    weight_decay=0.0,
    clip=2.0,
    optimizer="muon",
    schedule="linear",
    token_splits=0.5,
    token_noise=0.5,
    eval_windows=3,
    second_text="elsewhere",
    dropout=0.1,
    tie_head=False,
    qkv_bias=False,
    head_bias=True,
    init="torch",
    profile=True,
    seed=1,
    dtype="float64",
    n_kv_head=1,
)


def test_every_option_is_either_free_or_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = left(out)
    config = begun_config(out)
    elsewhere = tinyllm.training.config.ELSEWHERE - {"dtype"}  # of which float64 is refused
    assert CHANGES.keys() == config.to_json().keys() - config.free - elsewhere - {"out"}
    for name, value in CHANGES.items():
        both = {"arch": "llama"} if name == "n_kv_head" else {}
        with pytest.raises(Error, match="tinyllm train --from") as raised:
            train(replace(config, **{name: value}, **both), progress=False)
        assert f"{flag(name)} {getattr(config, name)}" in str(raised.value)
        assert f"{flag(name)} {value}" in str(raised.value)
    with pytest.raises(Error, match=re.escape(f"--out {out}, not --out elsewhere")):
        train(replace(config, out="elsewhere"), progress=False)
    with pytest.raises(Error, match="--seed 0, --dtype float32, not --seed 1, --dtype float64"):
        train(replace(config, seed=1, dtype="float64"), progress=False)
    assert left(out) == before


@pytest.mark.parametrize(
    ("begun", "asked", "same"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float16", "tf32", True),
        ("float64", "float32", False),
        ("float16", "float64", False),
        ("float64", "float64", True),
    ],
)
def test_the_dtype_of_products_may_change_and_that_of_parameters_may_not(begun, asked, same):
    begun, asked = TrainConfig(dtype=begun), TrainConfig(dtype=asked, device="cuda:1", micro_batch=4)
    if same:
        check_continues(begun, asked)
        return
    with pytest.raises(Error, match=f"--dtype {begun.dtype}, not --dtype {asked.dtype}: omit that"):
        check_continues(begun, asked)


def test_integers_are_accepted_for_floats():
    config = TrainConfig(lr=1, gpu_memory=2)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_muon_is_not_divided_among_processes():
    with pytest.raises(Error, match=r"--shard-optimizer is True: .*Muon needs whole matrices"):
        TrainConfig(optimizer="muon", distributed="mpi", shard_optimizer=True)


def test_the_rate_falls_to_a_tenth_and_at_most_1e_4_by_default():
    assert [TrainConfig(lr=lr).final_lr for lr in (1e-2, 5e-4)] == pytest.approx([1e-4, 5e-5])


def test_warmup_is_a_sixth_of_the_steps_by_default():
    assert [TrainConfig(steps=steps).warmup_steps for steps in (1, 6, 30, 300)] == [0, 1, 5, 50]
    assert TrainConfig(steps=30, warmup=7).warmup_steps == 7
    presets = {name: TrainConfig(**options).warmup_steps for name, options in PRESETS.items()}
    assert presets == {
        "gpt2-small": 50,
        "modern": 20,
        "ten-minutes": 50,
        "gpt2-verdict": 10,
        "gpt2-124m": 500,
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(n_embd=15, n_head=2), ["--n-embd", "--n-head"]),
        (dict(arch="llama", n_head=2, n_kv_head=3), ["--n-head", "--n-kv-head"]),
        (dict(arch="llama", head_bias=True), ["--head-bias"]),
        (dict(checkpoint_every=0), ["--checkpoint-every"]),
    ],
)
def test_messages_name_options_as_they_are_typed(options, named):
    with pytest.raises(Error) as raised:
        TrainConfig(**options)
    assert all(name in str(raised.value) for name in named)
    assert "_" not in str(raised.value)
