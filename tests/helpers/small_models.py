"""Actors and critics small enough to calculate with, an engine without DeepSpeed, rollouts by hand.

`step3_ppo/rollout.py` and `update.py` run on these as they do on what step 3 loads.
"""

from types import SimpleNamespace

import torch
from torch import nn

from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Rollout

PAD = 0


class TableActor(nn.Module):
    """A language model whose next token depends on the last one alone: (readable, writable) ids."""

    def __init__(self, reads: int, writes: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(reads, writes))

    def forward(self, input_ids, attention_mask, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


class TableCritic(nn.Module):
    """A value for each token read, like ScalarModel's forward."""

    def __init__(self, reads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(reads))

    def forward(self, input_ids, mask):
        return self.table[input_ids]


class Engine:
    """What step 3 uses of zero.TrainEngine, on one rank; with learning rate 0 gradients add up."""

    zero_stage = 0

    def __init__(self, module: nn.Module, learning_rate: float = 0.0):
        self.module, self.learning_rate = module, learning_rate
        self.engine = module  # of which `eval` and `train` are asked
        self.optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss_sum, normaliser):
        (loss_sum / normaliser).backward()

    def step(self):
        if self.learning_rate:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"grad_norm": 0.0, "learning_rate": self.learning_rate, "skipped": 0.0}

    def gradient(self) -> torch.Tensor:
        """All gradients since the last call, end to end in one vector."""
        found = [p.grad.flatten().clone() for p in self.module.parameters()]
        self.module.zero_grad()
        return torch.cat(found)


def config_of(**settings) -> PPOConfig:
    """PPOConfig with what every run needs, and no rounding beside the model's own."""
    given = dict(output_dir="-", model_name_or_path="-", reward_model="-", prompt_data=["-"])
    return PPOConfig(**(given | settings))


def rollout_of(rows: list[dict]) -> Rollout:
    """Rows {prompt, response: ids; logprobs, ref_logprobs, values: one a response token; score;
    finished; actions: for each response token whether it is the policy's, by default all; group: by
    default its own} → a Rollout, padded as rollout.collect pads."""
    left = max(len(row["prompt"]) for row in rows)
    right = max(len(row["response"]) for row in rows)

    def prompts(name_of, fill):
        return torch.tensor([[fill] * (left - len(r["prompt"])) + name_of(r) for r in rows])

    def responses(name_of, fill):
        return torch.tensor([name_of(r) + [fill] * (right - len(r["response"])) for r in rows])

    return Rollout(
        prompt_ids=prompts(lambda r: r["prompt"], PAD),
        prompt_mask=prompts(lambda r: [True] * len(r["prompt"]), False),
        response_ids=responses(lambda r: r["response"], PAD),
        response_mask=responses(lambda r: [True] * len(r["response"]), False),
        action_mask=responses(lambda r: r.get("actions") or [True] * len(r["response"]), False),
        earlier=[() for _ in rows],
        logprobs=responses(lambda r: r["logprobs"], 0.0),
        engine_logprobs=responses(lambda r: r.get("engine", r["logprobs"]), 0.0),
        ref_logprobs=responses(lambda r: r["ref_logprobs"], 0.0),
        entropies=responses(lambda r: [1.0] * len(r["response"]), 0.0),
        values=responses(lambda r: r["values"], 0.0),
        scores=torch.tensor([r["score"] for r in rows]),
        function_scores=torch.zeros(len(rows)),
        judge_scores=torch.zeros(len(rows)),
        finished=torch.tensor([r["finished"] for r in rows]),
        group=torch.tensor([r.get("group", i) for i, r in enumerate(rows)]),
        policy_step=torch.zeros(len(rows), dtype=torch.int64),
    )


def drawn_rows(count: int, vocabulary: int, seed: int, longest: int = 6) -> list[dict]:
    """Rows for `rollout_of` of different lengths, with numbers drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n, scale=1.0):
        return (scale * torch.randn(n, generator=generator)).tolist()

    def ids(n):
        return torch.randint(1, vocabulary, (n,), generator=generator).tolist()

    rows = []
    for i in range(count):
        prompt, length = ids(1 + i % 4), 1 + (i * 5) % longest
        logprobs = [-abs(x) - 0.5 for x in normal(length)]
        noise = normal(length, 0.5)
        rows.append(
            {
                "prompt": prompt,
                "response": ids(length),
                "logprobs": logprobs,
                "ref_logprobs": [a + b for a, b in zip(logprobs, noise, strict=True)],
                "values": normal(length),
                "score": normal(1, 2.0)[0],
                "finished": i % 3 != 1,
            }
        )
    return rows
