"""Tiny random models of many families: configs, and folders for step 3 to start from."""

import json

import torch
import transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": LLAMA_LIKE,
    "Mistral": LLAMA_LIKE | {"sliding_window": 6},  # shorter than the rows
    "Qwen2": LLAMA_LIKE,
    "Qwen3": LLAMA_LIKE | {"head_dim": 8},
    "Gemma": LLAMA_LIKE | {"num_key_value_heads": 1, "head_dim": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": SIZES | {"intermediate_size": 48},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}
# These read dropout rates from their config in each forward pass.
READ_THEIR_CONFIG = {
    "Falcon": SIZES | {"alibi": True, "new_decoder_architecture": False},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
    | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 48},
}


def with_dropout(family: str, **settings):
    """A config with every rate of dropout it knows at 0.3, whatever its defaults are."""
    sizes = (FAMILIES | READ_THEIR_CONFIG)[family]
    config = getattr(transformers, f"{family}Config")(**sizes, **settings)
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.3)
    return config


def write(folder, family: str, tokenizer):
    """sft/ and reward/ of one family under `folder`: random weights, a bias, and the result.json
    of a reward model that tells better from worse."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = with_dropout(family, vocab_size=len(tokenizer), bos_token_id=None, **ids)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "sft")
    config.num_labels, config.reward_bias = 1, 0.25
    scorer = transformers.AutoModelForSequenceClassification.from_config(config)
    scorer.score.weight.data.normal_(0, 0.1)
    scorer.save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)
    shares = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9}
    result = shares | {"accuracy_longer_answer": 0.5, "pairs": 100}
    (folder / "reward/result.json").write_text(json.dumps(result))
    return folder
