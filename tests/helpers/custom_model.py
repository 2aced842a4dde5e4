"""A model whose Python files come with it (tests/helpers/custom_code/),
as Baichuan's, the first Qwen's and
ChatGLM's do.

Its tokenizer is written in Python and has neither pad nor end token, its embedding has more rows
than the tokenizer has tokens, its config names the rows in its own way, and `auto_map` names no
class for scores.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

CODE = Path(__file__).resolve().parent / "custom_code"
WORDS, ROWS = 40, 320
AUTO_MAP = {
    "AutoConfig": "configuration_small.SmallConfig",
    "AutoModel": "modeling_small.SmallModel",
    "AutoModelForCausalLM": "modeling_small.SmallForCausalLM",
}
SHAPE = {"padded_vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2}


def words(texts: list[str]) -> int:
    """How many words the tokenizer learns from `texts`."""
    return len(_words(texts))


def _words(texts: list[str]) -> list[str]:
    counted = Counter(f" {word}" for text in texts for word in text.split(" "))
    common = sorted(word for word, _ in counted.most_common(WORDS))
    return sorted(common, key=len, reverse=True)


def write(folder: Path, texts: list[str], rows: int = ROWS) -> Path:
    """The model in `folder`, as downloaded. Its random weights are the same in every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    for file in CODE.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "small.vocab").write_text(json.dumps(_words(texts)))
    auto_map = {"AutoTokenizer": ["tokenization_small.SmallTokenizer", None]}
    settings = {"tokenizer_class": "SmallTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    settings = {"model_type": "small_custom", "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(settings | SHAPE | {"padded_vocab_size": rows}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(folder)
    return folder
