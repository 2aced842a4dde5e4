"""The config of a small Llama, whose size and speed the planner is asked."""

import transformers

LLAMA = transformers.LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
