"""PPO-ptx: the language-model loss that InstructGPT adds to the actor's, so that a policy which
chases the score does not forget how to write.

The actor's loss is PPO's plus `ptx_coef` × the mean negative log-likelihood a token of
`global_batch_size` rows of `--ptx_data` (InstructGPT: 27.8, on the pretraining text).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from utils import metrics
from utils.data import batches, chat_template, fitting, texts
from utils.data.loading import DataSettings
from utils.distributed import host_memory
from utils.models import language_model


@dataclass
class Examples:
    """Tokenised rows, and how many optimizer steps have drawn from them."""

    rows: Sequence[chat_template.Encoded]
    counts: fitting.Counts
    steps: int = 0

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, saved: dict) -> None:
        self.steps = saved["steps"]


def load(config, tokenizer) -> Examples:
    """Demonstrations (the answers count), or rows of plain `text` (all of it counts)."""
    limit = config.max_prompt_length + config.max_response_length
    examples = Examples(*texts.load(config.ptx_data, tokenizer, config.pick(DataSettings), limit))
    if not examples.rows:
        raise SystemExit(f"ptx_data={config.ptx_data}: no row fits; raise --max_response_length")
    return examples


def add_gradient(actor, examples: Examples, config, pad_id: int, device) -> dict:
    """Backward passes of one optimizer step's rows; returns `ptx_loss`, nats a token."""
    chosen = batches.rows_of_step(
        examples.steps, config.global_batch_size, len(examples.rows), config.seed
    )
    examples.steps += 1
    taken = {i: examples.rows[i] for i in chosen}
    tokens = sum(sum(taken[i].supervised[1:]) for i in chosen)
    lengths = {i: len(row.ids) for i, row in taken.items()}
    sums = metrics.Sums(device)
    budget = config.micro_batch_size, config.micro_batch_tokens
    for micro in batches.share(chosen, lengths, *budget):
        ids, mask, supervised = batches.supervised_batch([taken[i] for i in micro], pad_id)
        ids = host_memory.send(ids, device)
        logprobs, _ = language_model.wanted_logprobs(actor, ids, mask, supervised)
        nll = -logprobs.sum()
        actor.backward(config.ptx_coef * nll, normaliser=tokens)
        sums.add({"ptx_loss": nll})
    return sums.over(tokens)
