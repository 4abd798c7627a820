"""The list of targets: every file format that tinyllm reads."""

from parity.fuzz import gguf, runs, tokenizers, weights
from parity.fuzz.harness import Target

TARGETS = (
    Target("safetensors", weights.make_single, weights.load_single, weights.single_mutations),
    Target("safetensors shards", weights.make_shards, weights.load_shards, weights.shard_mutations),
    Target("GPT-2 folder", weights.make_gpt2, weights.load_hugging_face, weights.config_mutations),
    Target("Llama folder", weights.make_llama, weights.load_hugging_face, weights.config_mutations),
    Target("GGUF model", gguf.make_gguf_model, gguf.load_gguf_model, gguf.gguf_model_mutations),
    Target(
        "GGUF byte-level", gguf.make_gguf_byte_level, gguf.load_gguf_tokenizer, gguf.gguf_byte_level_mutations
    ),
    Target(
        "GGUF SentencePiece",
        gguf.make_gguf_sentencepiece,
        gguf.load_gguf_tokenizer,
        gguf.gguf_sentencepiece_mutations,
    ),
    Target("own BPE", tokenizers.make_bpe, tokenizers.load_any_tokenizer, tokenizers.our_tokenizer_mutations),
    Target(
        "own characters",
        tokenizers.make_char,
        tokenizers.load_any_tokenizer,
        tokenizers.our_tokenizer_mutations,
    ),
    Target(
        "tokenizer.json",
        tokenizers.make_byte_level,
        tokenizers.load_any_tokenizer,
        tokenizers.tokenizer_json_mutations,
    ),
    Target(
        "tokenizer.json, Llama 2",
        tokenizers.make_sentencepiece_json,
        tokenizers.load_any_tokenizer,
        tokenizers.tokenizer_json_mutations,
    ),
    Target(
        "vocab.json and merges.txt",
        tokenizers.make_pair,
        tokenizers.load_any_tokenizer,
        tokenizers.pair_mutations,
    ),
    Target(
        "tokenizer.model, Llama 3",
        tokenizers.make_llama3,
        tokenizers.load_any_tokenizer,
        tokenizers.llama3_mutations,
    ),
    Target(
        "tokenizer.model, Llama 2",
        tokenizers.make_sentencepiece,
        tokenizers.load_any_tokenizer,
        tokenizers.sentencepiece_mutations,
    ),
    Target(
        "tokenizer_config.json",
        tokenizers.make_described,
        tokenizers.load_any_tokenizer,
        tokenizers.described_mutations,
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
