"""The common work of the throughput benchmarks: shapes, random models, prompts, and its arithmetic.

W: 32 prompts × 64 tokens, 128 new tokens each. W-var: the same prompts, answers of 16 to 128
tokens, evenly spread, each ended by the stop token.

Every system must give the same answer lengths, whatever way it decodes, batches or sorts, and at no
cost. So the policy itself counts, in its weights: each token has a level (the stop token level 0),
its embedding says which, and one MLP turns level k into k−1. A row whose prompt ends with a token
of level L answers with exactly L tokens, the last of them the stop token; which of a level's tokens
are drawn is left to chance. No hook, no logits processor: to all who run it it is a Llama.
"""

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from utils.data import prompts as prompt_data
from utils.data import splits, tables
from utils.distributed import zero

PAD, STOP, FIRST_WORD = 0, 1, 2  # token ids
FREQUENCIES = 16  # of a level's code, two numbers each
CODE = 2 * FREQUENCIES  # hidden dimensions 0 … CODE−1 hold the level, dimension CODE is always LOUD
LOUD = 8.0  # size of a code and of the constant: well above what the random layers add
HELD_OUT = 1e-9  # --eval_fraction: the one row that must be
SHARPNESS = 100.0  # nats between a token of the next level and one that shares nothing with it
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{{ '<|end|>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """A Llama-like model. Weights are random: speed does not ask what they say."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True
    family: str = "llama"

    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with, embeddings and head left out."""
        attention = self.hidden * self.hidden * (2 + 2 * self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate))

    def head_weights(self) -> int:
        return self.vocabulary * self.hidden


SHAPES = {
    "w": Shape(8192, 256, 688, 6, 8, 8),
    "walk": Shape(512, 96, 128, 2, 4, 4),  # no figure: to see that every line runs
    "qwen2.5-0.5b": Shape(151936, 896, 4864, 24, 14, 2, family="qwen2"),
    "qwen2.5-1.5b": Shape(151936, 1536, 8960, 28, 12, 2, family="qwen2"),
    "qwen2.5-7b": Shape(152064, 3584, 18944, 28, 28, 4, tied=False, family="qwen2"),
}


@dataclass(frozen=True)
class Work:
    """prompts rows of prompt_length tokens, each `samples` of them the same; answers as long as
    `answers` says."""

    shape: Shape = SHAPES["w"]
    prompts: int = 32
    prompt_length: int = 64
    new_tokens: int = 128
    shortest: int = 0  # 0: nobody stops before new_tokens
    samples: int = 1

    def asked(self) -> int:
        """How many different prompts there are."""
        return self.prompts // self.samples

    def answers(self) -> list[int]:
        """How many tokens each row answers with, the stop token included."""
        if not self.shortest:
            return [self.new_tokens] * self.prompts
        steps = max(1, self.asked() - 1)
        spread = [
            self.shortest + round(i * (self.new_tokens - self.shortest) / steps)
            for i in range(self.asked())
        ]
        random.Random(1).shuffle(spread)
        return [length for length in spread for _ in range(self.samples)]

    def levels(self) -> int:
        return self.new_tokens + 64  # more than any answer counts down


def flops(shape: Shape, rows: list[int], head_tokens: int) -> float:
    """Of one forward pass over rows of so many tokens, causal, the head on `head_tokens` of them.

    A multiplication and an addition a weight; of attention the lower triangle; no padding.
    """
    attention = 2 * shape.hidden * shape.layers * sum(t * (t + 1) for t in rows)
    return (
        2.0 * shape.matrix_weights() * sum(rows)
        + attention
        + 2.0 * shape.head_weights() * head_tokens
    )


def ppo_flops(work: Work, critic: bool = True) -> dict[str, float]:
    """Least arithmetic of one iteration of PPO, or of an algorithm without a critic, one epoch, by
    phase.

    generate: each token once through the model (the last one need not go in). score: reference,
    critic and reward model; old log-probabilities come out of the decode. train: actor and critic,
    backward twice a forward.
    """
    answers = work.answers()
    rows = [work.prompt_length + n for n in answers]
    whole = flops(work.shape, rows, sum(answers))
    headless = flops(work.shape, rows, 0)
    return {
        "generate": flops(work.shape, [t - 1 for t in rows], sum(answers)),
        "score": whole + (1 + critic) * headless,
        "train": 3 * (whole + critic * headless),
    }


def decode_bytes(work: Work, bytes_a_weight: int = 2) -> float:
    """Least memory traffic of the decode: every step reads all weights once, and each row its keys
    and values so far."""
    shape, answers = work.shape, work.answers()
    weights = shape.matrix_weights() + shape.head_weights()
    kv = 2 * shape.layers * shape.hidden * shape.kv_heads / shape.heads
    cached = sum(n * work.prompt_length + n * (n - 1) / 2 for n in answers)
    return bytes_a_weight * (max(answers) * weights + kv * cached)


def level_of(token: int, levels: int) -> int:
    """Stop token: 0. Words: 1 … levels−1, over and over."""
    return 0 if token == STOP else 1 + (token - FIRST_WORD) % (levels - 1)


def frequencies(levels: int) -> torch.Tensor:
    """FREQUENCIES numbers whose codes of different levels are as unlike as 200 draws find."""
    generator, lags = torch.Generator().manual_seed(0), torch.arange(1, levels)
    best, found = math.inf, None
    for _ in range(200):
        drawn = torch.randperm(levels // 2, generator=generator)[:FREQUENCIES] + 1.0
        alike = torch.cos(2 * math.pi * lags[:, None] * drawn / levels).mean(1).max().item()
        if alike < best:
            best, found = alike, drawn
    return found


def codes(at: torch.Tensor, levels: int) -> torch.Tensor:
    """(N,) levels → (N,CODE) unit vectors: cosines, then sines."""
    angles = 2 * math.pi * at[:, None] * frequencies(levels) / levels
    return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(FREQUENCIES)


@torch.no_grad()
def make_it_count(model, levels: int) -> None:
    """Set the weights by which a policy of random weights counts its answer down (see the top)."""
    hidden = model.config.hidden_size
    vocabulary = model.config.vocab_size
    level = torch.tensor([level_of(t, levels) for t in range(vocabulary)])
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table[:, :CODE] = (LOUD * codes(level, levels)).to(table.dtype)
        table[:, CODE] = LOUD
        table[PAD] = 0.0  # every other token has a head start over it
    for layer in model.model.layers:  # nobody else writes where the level stands
        layer.self_attn.o_proj.weight[: CODE + 1] = 0.0
        layer.mlp.down_proj.weight[: CODE + 1] = 0.0
    mlp, f = model.model.layers[-1].mlp, frequencies(levels)
    turn = 2 * math.pi * f / levels
    up = torch.zeros(CODE, hidden)
    cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
    up[:, :CODE] = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
    mlp.up_proj.weight[:CODE] = up.to(mlp.up_proj.weight.dtype)
    mlp.gate_proj.weight[:CODE] = 0.0
    mlp.gate_proj.weight[:CODE, CODE] = 1.0  # the constant opens the gate
    mlp.down_proj.weight[:, :CODE] = 0.0  # these CODE neurons write the level and nothing else
    # Behind the norm both factors are √(hidden/2) times their size: 8 of the new level to 1 of the
    # old remain, and the last norm and head make SHARPNESS nats of them.
    mlp.down_proj.weight[:CODE, :CODE] = (
        torch.eye(CODE).to(mlp.up_proj.weight.dtype) * LOUD * 16 / hidden
    )
    model.model.norm.weight[:CODE] = SHARPNESS / (LOUD * math.sqrt(hidden))


def make_tokenizer(vocabulary: int):
    """Words w2, w3, … of one token each: a text holds as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|pad|>", "<|end|>", *(f"w{i}" for i in range(FIRST_WORD, vocabulary))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token=names[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=names[PAD], eos_token=names[STOP]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_config(shape: Shape):
    from transformers import LlamaConfig, Qwen2Config

    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )


def save_models(work: Work, folder: Path, dtype: str = "fp32") -> Path:
    """policy/ and reward/, each with its tokenizer, in a folder of their own under `folder`, which
    is returned. Those that are there from an earlier run are used."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    recipe = [asdict(work.shape), work.levels(), dtype, Path(__file__).read_text(encoding="utf-8")]
    folder = folder / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    if (folder / "made").exists():
        return folder
    tokenizer, config = make_tokenizer(work.shape.vocabulary), model_config(work.shape)
    config.num_labels, config.reward_read_at = 1, "stop"  # as step 2 saves them
    for name, auto, seed in (
        ("policy", AutoModelForCausalLM, 0),
        ("reward", AutoModelForSequenceClassification, 1),
    ):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=zero.DTYPES[dtype])
        if name == "policy":
            make_it_count(model, work.levels())
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "made").touch()
    return folder


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def prompt_rows(work: Work) -> list[list[int]]:
    """Token ids of each different prompt; its last one is of the level that the answer counts down
    from."""
    draw, levels = random.Random(0), work.levels()
    starts = work.answers()[:: work.samples] if work.shortest else [levels - 1] * work.asked()
    return [
        [*some_words(draw, work.prompt_length - 1, work.shape), FIRST_WORD + level - 1]
        for level in starts
    ]


def some_words(draw: random.Random, count: int, shape: Shape) -> list[int]:
    return [draw.randrange(FIRST_WORD, shape.vocabulary) for _ in range(count)]


def answered_rows(work: Work) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, answer, other answer) of each row, for SFT and reward models: `work.answers()` says
    how long the answers are, the stop token included, the other one's in another order."""
    draw, lengths = random.Random(2), work.answers()

    def answer(length: int) -> list[int]:
        return [*some_words(draw, length - 1, work.shape), STOP]

    return [
        (prompt, answer(length), answer(other))
        for prompt, length, other in zip(prompt_rows(work), lengths, lengths[::-1], strict=True)
    ]


def write_rows(path: Path, rows: list[dict], shape: Shape, seed: int) -> None:
    """`rows`, each with a text `prompt`, as JSON Lines, and one row more, like the first but for
    its prompt, such that `--eval_fraction 1e-9 --seed {seed}` holds out that one and no other: what
    is trained on is then `rows`, all of them."""
    draw, texts = random.Random(3), [row["prompt"] for row in rows]
    while True:
        spare = words(some_words(draw, 8, shape))
        items = [
            prompt_data.Prompt(({"role": "user", "content": text},), "", {})
            for text in (*texts, spare)
        ]
        places = np.array([tables.place(item, f"hold_out {seed}") for item in items])
        held = [items[i] for i in np.flatnonzero(splits.held_out(places, HELD_OUT))]
        if [item.messages[0]["content"] for item in held] == [spare]:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in (*rows, rows[0] | {"prompt": spare})]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_prompts(work: Work, folder: Path) -> Path:
    """The prompts of `work` as data for --prompt_data; returns the file."""
    file = folder / f"prompts_{work.asked()}_{work.new_tokens}_{work.shortest}.jsonl"
    rows = [{"prompt": words(ids)} for ids in prompt_rows(work)]
    write_rows(file, rows, work.shape, seed=42)
    return file
