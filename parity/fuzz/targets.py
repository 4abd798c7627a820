"""The list of targets: every file format that tinyllm reads."""

from functools import partial

from parity.fuzz import gguf, runs, tokenizers, weights
from parity.fuzz.harness import Target

# Tokenizers, which are all read by the same function: name -> how to make one, how to break it
OF_TOKENIZERS = {
    "own BPE": (tokenizers.make_bpe, tokenizers.our_tokenizer_mutations),
    "own characters": (tokenizers.make_char, tokenizers.our_tokenizer_mutations),
    "tokenizer.json": (tokenizers.make_byte_level, tokenizers.tokenizer_json_mutations),
    "tokenizer.json, Llama 2": (tokenizers.make_sentencepiece_json, tokenizers.tokenizer_json_mutations),
    "vocab.json and merges.txt": (tokenizers.make_pair, tokenizers.pair_mutations),
    "tokenizer.model, Llama 3": (tokenizers.make_llama3, tokenizers.llama3_mutations),
    "tokenizer.model, Llama 2": (tokenizers.make_sentencepiece, tokenizers.sentencepiece_mutations),
    "tokenizer_config.json": (tokenizers.make_described, tokenizers.described_mutations),
}

TARGETS = (
    Target("safetensors", weights.make_single, weights.load_single, weights.single_mutations),
    Target("safetensors shards", weights.make_shards, weights.load_shards, weights.shard_mutations),
    Target("GPT-2 folder", weights.make_gpt2, weights.load_hugging_face, weights.config_mutations),
    Target("Llama folder", weights.make_llama, weights.load_hugging_face, weights.config_mutations),
    Target("GGUF model", gguf.make_gguf_model, gguf.load_gguf_model, gguf.gguf_model_mutations),
    *(
        Target(
            name,
            partial(gguf.make_gguf_model, vocabulary=keys),
            gguf.load_gguf_tokenizer,
            partial(gguf.gguf_tokenizer_mutations, vocabulary=keys),
        )
        for name, keys in gguf.VOCABULARIES.items()
    ),
    *(
        Target(name, make, tokenizers.load_any_tokenizer, mutations)
        for name, (make, mutations) in OF_TOKENIZERS.items()
    ),
    Target("token file", runs.make_tokens, runs.load_tokens, runs.tokens_mutations),
    Target(
        "unfinished token file",
        runs.make_unfinished_tokens,
        runs.load_unfinished_tokens,
        runs.unfinished_mutations,
        writes=True,
    ),
    Target("run folder", runs.make_run, runs.load_run, runs.run_mutations),
    Target("jsonl text", runs.make_corpus, runs.load_corpus, runs.corpus_mutations),
)
