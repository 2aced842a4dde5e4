"""Folders as each family's base or chat model comes in: its tokenizer's rules, its chat template
(tests/helpers/templates/, in our words), its habits of BOS, stop and pad, around a random model.

Tokenizers are trained on a few lines of text; what a family fixes (which characters a token is
made of, special tokens, what is put in front) is as the family has it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.helpers import custom_model
from tests.helpers.families import FAMILIES, LLAMA_LIKE, SIZES

TEMPLATES = Path(__file__).resolve().parent / "templates"
LEARNED = 200  # tokens beside single bytes and special ones
POSITIONS = 256
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": False}


@dataclass(frozen=True)
class Family:
    """model: transformers' name of the architecture. pieces: sentencepiece's "▁" tokens ("first":
    one before the first word too, "never": not) or "" for bytes as GPT-2 has them. special:
    special tokens in their order. named: which of them are bos, eos, unk and pad. adds_bos: does
    the tokenizer put it before text. spare: rows of the embedding that no token has."""

    model: str
    special: tuple[str, ...]
    named: dict[str, str]
    template: str = ""
    pieces: str = ""
    adds_bos: bool = False
    spare: int = 0
    tokenizer_class: str = "PreTrainedTokenizerFast"
    sizes: dict = field(default_factory=lambda: LLAMA_LIKE)


def _chatml(model: str, template: str, **more) -> Family:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    named = {"eos_token": special[0], "pad_token": special[0]}
    how = {"spare": 21, "tokenizer_class": "Qwen2Tokenizer"}
    return Family(model, special, named, template, **(how | more))


def _llama(model: str, template: str, *more: str, **how) -> Family:
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | how.pop("named", {})
    how = {"pieces": "first", "adds_bos": True, "tokenizer_class": "LlamaTokenizer"} | how
    return Family(model, ("<unk>", "<s>", "</s>", *more), named, template, **how)


def _gemma(model: str, template: str, **sizes) -> Family:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    how = {"pieces": "never", "adds_bos": True, "tokenizer_class": "GemmaTokenizer"}
    sizes = FAMILIES["Gemma"] | {"sliding_window": 8} | sizes
    return Family(model, special, named, template, sizes=sizes, **how)


END = ("<|endoftext|>",)
BOTH = {"bos_token": END[0], "eos_token": END[0], "unk_token": END[0]}
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA3 = (*LLAMA3, "<|eot_id|>", "<|finetune_right_pad_id|>")
PHI4 = (*END, "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_85|>")
GLM4 = (*END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ALL = {
    "Llama 2": _llama("Llama", "llama2"),
    "Llama 3.2": Family(
        "Llama",
        LLAMA3,
        {"bos_token": LLAMA3[0], "eos_token": LLAMA3[4]},
        "llama3",
        adds_bos=True,
    ),
    "Qwen2": _chatml("Qwen2", "qwen2"),
    "Qwen2.5": _chatml("Qwen2", "qwen2", sizes=LLAMA_LIKE | {"tie_word_embeddings": True}),
    "Qwen3": _chatml("Qwen3", "qwen3", sizes=FAMILIES["Qwen3"]),
    "Mistral": _llama("Mistral", "mistral", sizes=FAMILIES["Mistral"]),
    "Gemma 2": _gemma("Gemma2", "gemma2", query_pre_attn_scalar=8),
    "Gemma 3": _gemma("Gemma3Text", "gemma3", query_pre_attn_scalar=8),
    "Phi-3": _llama(
        "Phi3",
        "phi3",
        *END,
        *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        named={"eos_token": END[0], "pad_token": END[0]},
        adds_bos=False,
        spare=21,
    ),
    "Phi-4": Family(
        "Phi3",
        PHI4,
        {"bos_token": END[0], "eos_token": PHI4[3], "pad_token": PHI4[4]},
        "phi4",
        tokenizer_class="GPT2Tokenizer",
        spare=21,
    ),
    "GPT-2": Family("GPT2", END, BOTH, tokenizer_class="GPT2Tokenizer", sizes=FAMILIES["GPT2"]),
    "OPT": Family(
        "OPT",
        ("<s>", "<pad>", "</s>", "<unk>"),
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
        adds_bos=True,
        spare=7,
        tokenizer_class="GPT2Tokenizer",
        sizes=FAMILIES["OPT"],
    ),
    "GPT-NeoX": Family(
        "GPTNeoX",
        (*END, "<|padding|>"),
        BOTH,
        spare=27,
        tokenizer_class="GPTNeoXTokenizer",
        sizes=FAMILIES["GPTNeoX"],
    ),
    "Bloom": Family(
        "Bloom",
        ("<unk>", "<s>", "</s>", "<pad>"),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        spare=120,
        tokenizer_class="BloomTokenizerFast",
        sizes=FAMILIES["Bloom"],
    ),
    "Falcon": Family(
        "Falcon",
        (">>TITLE<<", ">>QUESTION<<", *END),
        {"eos_token": END[0]},
        "falcon",
        sizes=SIZES | {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    ),
    "GLM-4": Family(
        "Glm4",
        GLM4,
        {"eos_token": END[0], "pad_token": END[0]},
        "glm4",
        spare=9,
        sizes=LLAMA_LIKE | {"head_dim": 8},
    ),
    "InternLM 3": _llama("InternLM3", "internlm2", "<|im_start|>", "<|im_end|>", spare=5),
    "Mixtral": _llama(
        "Mixtral", "mistral", sizes=LLAMA_LIKE | {"num_local_experts": 4, "sliding_window": None}
    ),
    "Qwen2-MoE": _chatml(
        "Qwen2Moe",
        "qwen2",
        sizes=LLAMA_LIKE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "Qwen3-MoE": _chatml(
        "Qwen3Moe", "qwen3", sizes=FAMILIES["Qwen3"] | EXPERTS | {"num_experts": 4}
    ),
}
REAL = {n: f for n, f in ALL.items() if hasattr(transformers, f"{f.model}Config")}
ABSENT = {
    name: f"transformers {transformers.__version__} has no {family.model}"
    for name, family in ALL.items()
    if name not in REAL
}
CUSTOM = "custom code"  # a model whose Python files come with it
NAMES = (*REAL, CUSTOM)


def write(folder: Path, name: str, texts: list[str]) -> Path:
    """The family's model and tokenizer in `folder`, as downloaded."""
    if name == CUSTOM:
        return custom_model.write(folder, texts)
    config = write_tokenizer(folder, name, texts)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, name: str, texts: list[str]):
    """The tokenizer in `folder` and config.json, which names its class too; that config."""
    family = REAL[name]
    folder.mkdir(parents=True, exist_ok=True)
    backend = _pieces(family, texts) if family.pieces else _bytes(family, texts)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in family.special]
    )
    if family.adds_bos:
        bos = family.named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": family.tokenizer_class, "model_max_length": POSITIONS}
    settings |= family.named | {"clean_up_tokenization_spaces": False}
    if family.tokenizer_class in ("LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer"):
        settings["add_bos_token"] = family.adds_bos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if family.template:
        template = (TEMPLATES / f"{family.template}.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template)
    ids = {
        name.replace("token", "token_id"): backend.token_to_id(token)
        for name, token in family.named.items()
        if name != "unk_token"
    }
    config = getattr(transformers, f"{family.model}Config")(
        vocab_size=backend.get_vocab_size() + family.spare,
        **({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | ids),
        **family.sizes,
    )
    config.save_pretrained(folder)
    return config


def _bytes(family: Family, texts: list[str]) -> Tokenizer:
    """As GPT-2: 256 bytes, words with the space before them."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=256 + LEARNED, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def _pieces(family: Family, texts: list[str]) -> Tokenizer:
    """As sentencepiece: words with "▁" before them, bytes for characters that were never seen.
    Special tokens come first."""
    learned = Tokenizer(BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=family.pieces)
    learned.train_from_iterator(texts, BpeTrainer(vocab_size=2 * LEARNED, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    names = [*family.special, *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    backend = Tokenizer(
        BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family.pieces == "first":
        prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(prepend)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    return backend
