"""The published sizes of each architecture: name -> fields of its config, as in the model's config.json."""

LLAMA_3 = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8,
               rms_norm_eps=1e-5, max_position_embeddings=8192,
               rope_parameters=dict(rope_theta=500000.0))  # fmt: skip
LLAMA_3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)  # fmt: skip
LLAMA_3_1 = LLAMA_3 | dict(max_position_embeddings=131072, rope_parameters=LLAMA_3_ROPE | dict(factor=8.0))
LLAMA_3_2 = LLAMA_3_1 | dict(intermediate_size=8192, tie_word_embeddings=True,
                             rope_parameters=LLAMA_3_ROPE | dict(factor=32.0))  # fmt: skip
LLAMA = {
    "toy": dict(
        vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "Llama-2-7B": dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "Llama-3-8B": LLAMA_3,
    "Llama-3.1-8B": LLAMA_3_1,
    "Llama-3.2-1B": LLAMA_3_2 | dict(hidden_size=2048, num_hidden_layers=16),
    "Llama-3.2-3B": LLAMA_3_2 | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
}  # fmt: skip

# Of 2.5; use_sliding_window is false in all of them.
QWEN_2 = dict(rope_parameters=dict(rope_theta=1e6))
QWEN_2_5 = {
    "Qwen2.5-0.5B": QWEN_2 | dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": QWEN_2 | dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen2.5-3B": QWEN_2 | dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": QWEN_2 | dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
    ),
}  # fmt: skip

QWEN_3_ALL = dict(num_key_value_heads=8, max_position_embeddings=40960, rope_parameters=dict(rope_theta=1e6))
QWEN_3 = {
    "Qwen3-0.6B": QWEN_3_ALL | dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": QWEN_3_ALL | dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen3-4B": QWEN_3_ALL | dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, tie_word_embeddings=True,
    ),
    "Qwen3-8B": QWEN_3_ALL | dict(intermediate_size=12288, num_hidden_layers=36),
    "Qwen3-14B": QWEN_3_ALL | dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
    ),
    "Qwen3-32B": QWEN_3_ALL | dict(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
    ),
}  # fmt: skip

MISTRAL_7B = dict(max_position_embeddings=32768, rms_norm_eps=1e-5)
MISTRAL = {
    "Mistral-7B-v0.1": MISTRAL_7B,
    "Mistral-7B-v0.3": MISTRAL_7B | dict(
        vocab_size=32768, sliding_window=None, rope_parameters=dict(rope_theta=1e6),
    ),
    "Mistral-Nemo-12B": MISTRAL_7B | dict(
        vocab_size=131072, hidden_size=5120, num_hidden_layers=40, head_dim=128, sliding_window=None,
        max_position_embeddings=131072, rope_parameters=dict(rope_theta=1e6),
    ),
}  # fmt: skip

SMOLLM_3 = {
    "SmolLM3-3B": dict(max_position_embeddings=65536, rope_parameters=dict(rope_theta=5e6)),
}

OLMO_2_ALL = dict(
    vocab_size=100352, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_parameters=dict(rope_theta=5e5)
)
OLMO_2 = {
    "OLMo-2-1B": OLMO_2_ALL | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
    ),
    "OLMo-2-7B": OLMO_2_ALL,
}  # fmt: skip

GEMMA_2 = {"Gemma-2-2B": {}}
GEMMA_3_SMALL = dict(vocab_size=262144, max_position_embeddings=32768, num_attention_heads=4,
                     num_key_value_heads=1, sliding_window=512)  # fmt: skip
GEMMA_3 = {
    "Gemma-3-270M": GEMMA_3_SMALL | dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "Gemma-3-1B": GEMMA_3_SMALL | dict(hidden_size=1152, intermediate_size=6912),
}

MIXTRAL = {
    "Mixtral-8x7B": dict(max_position_embeddings=32768, rms_norm_eps=1e-5),
    "Mixtral-8x22B": dict(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
        max_position_embeddings=65536, rms_norm_eps=1e-5,
    ),
}  # fmt: skip

QWEN_3_MOE_ALL = dict(head_dim=128, norm_topk_prob=True, max_position_embeddings=40960,
                      rope_parameters=dict(rope_theta=1e6))  # fmt: skip
QWEN_3_MOE = {
    "Qwen3-30B-A3B": QWEN_3_MOE_ALL | dict(num_hidden_layers=48),
    "Qwen3-235B-A22B": QWEN_3_MOE_ALL | dict(
        hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64,
    ),
}  # fmt: skip
