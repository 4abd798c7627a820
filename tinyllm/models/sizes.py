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
GEMMA_2 = {"Gemma-2-2B": {}}
GEMMA_3_SMALL = dict(vocab_size=262144, max_position_embeddings=32768, num_attention_heads=4,
                     num_key_value_heads=1, sliding_window=512)  # fmt: skip
GEMMA_3 = {
    "Gemma-3-270M": GEMMA_3_SMALL | dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "Gemma-3-1B": GEMMA_3_SMALL | dict(hidden_size=1152, intermediate_size=6912),
}
