"""Classifiers against their PyTorch twin and ``transformers``, folders in both directions, and padding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import (
    EVERYTHING,
    GEMMA2,
    GEMMA3,
    NO_DROPOUT,
    RELATIVES,
    ROPES,
    SMALL,
    SMALL_LLAMA,
    assert_close,
    configs,
    llama_configs,
    on_host,
)
from support.suite import proven

from parity.ops import cases
from parity.twins import bridge
from tinyllm import Error, GPT2Config, LlamaConfig, load_model, nn
from tinyllm.models import ARCHITECTURES, Gemma2Config, SequenceClassifier, empty_model
from tinyllm.models.classifier import POOLINGS
from tinyllm.weights.adapters import load_adapter, save_adapter
from tinyllm.weights.safetensors import Weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LABELS = ("bad", "good", "neither")
CONFIGS = {
    "gpt2": GPT2Config(**SMALL, **NO_DROPOUT),
    "gpt2 untied": GPT2Config(**SMALL, **NO_DROPOUT, tie_word_embeddings=False),
    "llama": EVERYTHING,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_classifier(config, labels=LABELS, pooling="last", seed=0, dtype=np.float64, pad_id=0):
    rng = np.random.default_rng(seed)
    model = SequenceClassifier(
        ARCHITECTURES[config.model_type](config, rng=rng), labels, rng, pooling, pad_id
    )
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name or ".ln_" in name else 0.0
        parameter.replace(mean + 0.3 * rng.standard_normal(parameter.shape))
    return model.astype(dtype).eval()


def padded(config, rows, longest, classes=3, seed=0, pad_id=0):
    """Ids (B, T) filled up with ``pad_id``, which occurs in no text, lengths and targets."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, rows)
    lengths[rng.integers(rows)] = longest
    ids = rng.integers(1, config.vocab_size, (rows, longest))
    ids[np.arange(longest) >= lengths[:, None]] = pad_id
    return ids, lengths, rng.integers(0, classes, rows)


# ------------------------------------------------------------------------ against the PyTorch twin


def check_against_the_twin(model, ids, lengths, targets):
    twin = bridge.to_torch(model)
    arrays = [torch.from_numpy(array) for array in (ids, lengths, targets)]
    cases.assert_close(model(ids, lengths).data, twin(*arrays[:2]).detach().numpy(), "logits")
    loss, theirs = model.loss(ids, lengths, targets), twin.loss(*arrays)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-10)
    loss.backward()
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    # Gradients that are 0 but for rounding: of queries and keys of one position, of one normalized channel.
    floor = cases.FLOOR * max(gradient.abs().max() for gradient in expected.values()).item()
    for name, parameter in model.named_parameters():
        cases.assert_close(parameter.grad, expected[name].numpy(), f"gradient of {name}", floor=floor)


@proven("subject", ["SequenceClassifier"])
@settings(deadline=None, max_examples=15)
@given(
    config=configs() | llama_configs() | st.one_of(map(llama_configs, RELATIVES.values())),
    rows=st.integers(1, 4),
    classes=st.integers(2, 5),
    pooling=st.sampled_from(POOLINGS),
    seed=st.integers(0, 2**32 - 1),
)
def test_logits_loss_and_gradients_equal_torchs(subject, config, rows, classes, pooling, seed):
    labels = [str(number) for number in range(classes)]
    model = random_classifier(config, labels, pooling, seed)
    longest = int(np.random.default_rng(seed).integers(1, config.context + 1))
    check_against_the_twin(model, *padded(config, rows, longest, classes, seed))


@proven("subject", ["SequenceClassifier"])
@pytest.mark.parametrize("pooling", POOLINGS)
@every_model
def test_a_padded_batch_equals_torchs(subject, config, pooling):
    check_against_the_twin(random_classifier(config, pooling=pooling), *padded(config, 5, 8))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_loss_and_gradients_on_the_device_equal_numpys(pooling, put):
    model = random_classifier(CONFIGS["llama"], pooling=pooling)
    arguments, found = padded(model.config, 3, 8), []
    for place in (np.asarray, put):
        for parameter in model.parameters():
            parameter.replace(place(parameter.data))
        loss = model.loss(*arguments)
        loss.backward()
        found.append((loss.item(), *(on_host(parameter.grad) for parameter in model.parameters())))
    for ours, expected in zip(*found):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * np.abs(expected).max() + 1e-15)


def test_ignored_targets_and_num_targets():
    model = random_classifier(CONFIGS["gpt2"])
    ids, lengths, targets = padded(model.config, 4, 8)
    targets[1] = -100
    of_three = model.loss(ids[[0, 2, 3]], lengths[[0, 2, 3]], targets[[0, 2, 3]]).item()
    assert model.loss(ids, lengths, targets).item() == pytest.approx(of_three, rel=1e-12)
    total = model.loss(ids, lengths, targets, num_targets=1).item()
    assert total == pytest.approx(3 * of_three, rel=1e-12)


# ------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("pooling", POOLINGS)
@every_model
def test_padding_batch_size_and_order_do_not_change_the_logits(config, pooling):
    model = random_classifier(config, pooling=pooling)
    ids, lengths, targets = padded(config, 5, 6)
    alone = np.concatenate([model([row[:n]]).data for row, n in zip(ids, lengths)])
    for fill in (0, 7):
        wider = np.full((5, 8), fill)
        wider[:, :6] = np.where(np.arange(6) < lengths[:, None], ids, fill)
        assert_close(model(wider, lengths).data, alone, "logits", 1e-12)
        order = [3, 0, 4, 2, 1]
        assert_close(model(wider[order], lengths[order]).data, alone[order], "logits", 1e-12)
    losses = [model.loss([r[:n]], [n], [t]).item() for r, n, t in zip(ids, lengths, targets)]
    assert model.loss(ids, lengths, targets).item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_a_text_has_the_angles_of_its_own_length_in_any_batch():
    """RoPE of type "longrope" has other frequencies for texts of more than 5 tokens."""
    config = LlamaConfig(**SMALL_LLAMA | dict(max_position_embeddings=12), rope_parameters=ROPES["longrope"])
    model = random_classifier(config)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (2, 9))
    together = model(ids, [4, 9]).data
    np.testing.assert_allclose(together[0], model(ids[:1, :4]).data[0], rtol=1e-12)
    np.testing.assert_allclose(together[1], model(ids[1:]).data[0], rtol=1e-12)


def test_the_state_of_each_pooling():
    config = CONFIGS["gpt2"]
    ids, lengths, _ = padded(config, 3, 8)
    for pooling, state in {
        "last": lambda h, n: h[n - 1],
        "first": lambda h, n: h[0],
        "mean": lambda h, n: h[:n].mean(axis=0),
    }.items():
        model = random_classifier(config, pooling=pooling)
        h = model.language_model.hidden_states(ids).data
        expected = np.stack([state(row, n) for row, n in zip(h, lengths)]) @ model.score.weight.data.T
        assert_close(model(ids, lengths).data, expected, pooling, 1e-12)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9], [3], [[3, 3]], [3.0, 3.0]])
def test_wrong_lengths_are_refused(lengths):
    model = random_classifier(CONFIGS["gpt2"])
    with pytest.raises(Error, match="lengths"):
        model(np.ones((2, 8), int), lengths)


# --------------------------------------------------------------------- folders of transformers


def theirs_of(config, labels, **options):
    """A classifier of ``transformers`` with perturbed weights."""
    sizes = dict(num_labels=len(labels), pad_token_id=0, bos_token_id=0, eos_token_id=0, **options)
    if isinstance(config, GPT2Config):
        made = transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(**SMALL, **NO_DROPOUT, **sizes)
        )
    else:
        fields = {key: getattr(config, key) for key in vars(config) if key != "rope_parameters"}
        made = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**fields, rope_parameters=dict(config.rope_parameters), **sizes)
        )
    made.config.id2label = dict(enumerate(labels))
    made.config.label2id = {label: number for number, label in enumerate(labels)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def tolerance(config):
    """``transformers`` computes norms, rotations and softmax in float32: of Gemma, three times the norms."""
    return 1e-10 if isinstance(config, GPT2Config) else 3e-6 if isinstance(config, Gemma2Config) else 1e-6


@pytest.mark.parametrize(
    "labels", [LABELS, ("LABEL_0", "LABEL_1"), tuple("abcdefghijkl")], ids=["named", "default", "12"]
)
@pytest.mark.parametrize("config", [CONFIGS["gpt2"], EVERYTHING], ids=["gpt2", "llama"])
def test_a_folder_of_transformers_loads(tmp_path, config, labels):
    theirs = theirs_of(config, labels)
    theirs.save_pretrained(tmp_path)
    model = SequenceClassifier.from_pretrained(tmp_path, np.float64)
    assert model.labels == labels and model.pad_id == 0 and not model.training
    ids, lengths, _ = padded(config, 5, 8)
    logits = theirs.double()(torch.from_numpy(ids)).logits  # finds the last id that is not pad_token_id
    assert_close(model(ids, lengths).data, logits, "logits", tolerance(config))


@every_model
def test_a_saved_folder_loads_in_transformers_and_here(tmp_path, config):
    model = random_classifier(config, dtype=np.float32)
    model.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert theirs.config.problem_type == "single_label_classification"
    ids, lengths, _ = padded(config, 5, 8)
    again = SequenceClassifier.from_pretrained(tmp_path, np.float64)
    assert again.labels == LABELS and again.pad_id == 0
    assert np.array_equal(again(ids, lengths).data, model.astype(np.float64)(ids, lengths).data)
    logits = theirs(torch.from_numpy(ids)).logits
    assert_close(again(ids, lengths).data, logits, "logits", tolerance(config))


def test_names_are_those_of_transformers(tmp_path):
    for config in (CONFIGS["gpt2"], EVERYTHING):
        folder = tmp_path / config.model_type
        random_classifier(config).save_pretrained(folder)
        theirs = theirs_of(config, LABELS)
        assert {*Weights(folder)} == {*theirs.state_dict()} == {*random_classifier(config).state_dict()}


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_another_pooling_is_saved_and_refused_by_transformers(tmp_path, pooling):
    model = random_classifier(CONFIGS["gpt2"], pooling=pooling)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tinyllm-gpt2"):
        transformers.AutoConfig.from_pretrained(tmp_path)
    ids, lengths, _ = padded(model.config, 3, 8)
    again = SequenceClassifier.from_pretrained(tmp_path, np.float64)
    assert again.pooling == pooling
    assert np.array_equal(again(ids, lengths).data, model(ids, lengths).data)


def test_a_classifier_and_a_language_model_are_not_confused(tmp_path):
    random_classifier(CONFIGS["gpt2"]).save_pretrained(tmp_path / "classifier")
    random_classifier(CONFIGS["gpt2"]).language_model.save_pretrained(tmp_path / "model")
    for load in (load_model, empty_model):
        with pytest.raises(Error, match="contains a classifier"):
            load(tmp_path / "classifier")
    with pytest.raises(Error, match=r"no classifier.*fine-tune one"):
        SequenceClassifier.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"problem_type": "regression"}, "problem_type"),
        ({"id2label": {"0": "only"}}, "labels"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}}, "labels"),
        ({"id2label": {"0": "a", "1": 1}}, "labels"),
        ({"id2label": None, "num_labels": "2"}, "num_labels"),
        ({"id2label": None, "num_labels": 2**21}, "num_labels must be at most"),
        ({"pooling": "max"}, "pooling"),
        ({"model_type": "bert"}, "bert"),
    ],
)
def test_an_unsupported_config_is_refused(tmp_path, change, named):
    random_classifier(CONFIGS["gpt2"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(Error, match=named):
        SequenceClassifier.from_pretrained(tmp_path)


def test_wrong_arguments_are_refused():
    model = ARCHITECTURES["gpt2"](CONFIGS["gpt2"], rng=0)
    for labels in ([], ["one"], ["same", "same"], [1, 2], ["a", ""]):
        with pytest.raises(Error, match="labels"):
            SequenceClassifier(model, labels, 0)
    with pytest.raises(Error, match="pooling"):
        SequenceClassifier(model, LABELS, 0, "max")
    with pytest.raises(Error, match="language model"):
        SequenceClassifier(model.lm_head, LABELS, 0)


def test_the_score_is_the_models_head_and_its_only_new_parameter():
    for config in (CONFIGS["gpt2"], LlamaConfig(**vars(EVERYTHING) | dict(tie_word_embeddings=False))):
        base = ARCHITECTURES[config.model_type](config, rng=0)
        names = {name for name, _ in base.named_parameters() if not name.startswith("lm_head")}
        model = SequenceClassifier(base, LABELS, 0)
        assert model.language_model is base and base.lm_head is model.score
        found = {name for name, _ in model.named_parameters()}
        assert found == {base.prefix + name for name in names} | {"score.weight"}


# ------------------------------------------------------------------------------ adapters of peft


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], EVERYTHING], ids=["gpt2", "llama"])
def test_an_adapter_of_a_classifier_is_exchanged_with_peft(tmp_path, config):
    """LoRA and score: from here to PEFT, and what PEFT saves back again."""
    peft = pytest.importorskip("peft")
    model = random_classifier(config, dtype=np.float32)
    base, rng = model.language_model, np.random.default_rng(1)
    published = ARCHITECTURES[config.model_type](config, rng=0)
    body = {name: array for name, array in base.state_dict().items() if name != "lm_head.weight"}
    published.load_state_dict(published.state_dict() | body)
    published.save_pretrained(tmp_path / "base")
    nn.add_lora(base, rank=2, targets="all-linear", modules_to_save=["lm_head"], rng=rng)
    for layer in nn.lora_layers(model).values():
        layer.lora_B.weight.replace(rng.standard_normal(layer.lora_B.weight.shape).astype(np.float32))
    save_adapter(model, tmp_path / "ours", tmp_path / "base", "SEQ_CLS")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=0, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    ids, lengths, _ = padded(config, 5, 8)
    logits = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids, lengths).data, logits, "logits in PEFT", 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = SequenceClassifier(load_model(tmp_path / "base"), LABELS, None)
    load_adapter(again, tmp_path / "theirs")
    assert np.array_equal(again.eval()(ids, lengths).data, model(ids, lengths).data)
