"""PPO-ptx: the language-model loss that InstructGPT adds to the actor's, so that a policy which
chases the score does not forget how to write.

The actor's loss is PPO's plus `ptx_coef` × the mean negative log-likelihood a token of
`global_batch_size` rows of `--ptx_data` (InstructGPT: 27.8, on the pretraining text).
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from utils import metrics
from utils.data import (
    batches,
    chat_template,
    instructions,
    loading,
    row_cache,
    row_tables,
    rows,
    schemas,
    turns,
)
from utils.data.reading import Reading
from utils.data.splits import DataSettings
from utils.distributed import host_memory
from utils.models import language_model
from utils.settings.run_config import columns_of


@dataclass
class Examples:
    """Tokenised rows, and how many optimizer steps have drawn from them."""

    rows: Sequence[chat_template.Encoded]
    counts: batches.Counts
    steps: int = 0

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, saved: dict) -> None:
        self.steps = saved["steps"]


def load(config, tokenizer) -> Examples:
    """Demonstrations (the answers count), or rows of plain `text` (all of it counts)."""
    bad = rows.BadRows(config.max_bad_rows, f"{config.output_dir}/bad_rows.jsonl")
    columns, settings = columns_of(config.columns), config.pick(DataSettings)
    limit = config.max_prompt_length + config.max_response_length
    learned = row_cache.Reader(
        functools.partial(instructions.load_conversations, columns=columns),
        functools.partial(
            batches.encode_conversations,
            tokenizer,
            max_length=limit,
            long_prompts=config.long_prompts,
            long_answers="drop",
        ),
        row_tables.SUPERVISED,
        settings,
        bad,
    )
    plain = row_cache.Reader(
        functools.partial(load_texts, columns=columns),
        functools.partial(encode_texts, tokenizer, max_length=limit),
        row_tables.SUPERVISED,
        settings,
        bad,
    )
    found = functools.reduce(
        operator.add,
        [
            (plain if _is_plain(name, columns) else learned)([name], "train")
            for name in config.ptx_data
        ],
    )
    bad.finish("ptx_data")
    examples = Examples(found.usable(), found.counts())
    if not examples.rows:
        raise SystemExit(f"ptx_data={config.ptx_data}: no row fits; raise --max_response_length")
    return examples


def _is_plain(name: str, columns: dict[str, str]) -> bool:
    """Is the first row one of `text`, and of nothing that an answer could be read from?"""
    readable = rows.stream_rows(name, instructions.SFT_SPLITS["train"], rows.BadRows(1.0))
    first = next(readable, None)
    data = schemas.renamed(first, columns).data if first is not None else {}
    return "text" in data and not instructions.has_answer(data)


def load_texts(names, *, split_role: str, columns, bad, tabulate):
    """Rows of plain `text` → Conversations of one turn; see instructions.load_conversations."""
    reading = Reading("text", "plain_text", columns)

    def convert(_, row: rows.Row) -> list[instructions.Conversation]:
        if instructions.has_answer(row.data):
            raise rows.BadRow("has the columns of a demonstration, unlike the first row")
        text = turns.text_of(row.data["text"], "text")
        return [instructions.Conversation(({"role": "text", "content": text},), row.where)]

    return loading.load_as(
        convert, reading, instructions.SFT_SPLITS, names, split_role, bad, tabulate
    )


def encode_texts(tokenizer, texts, max_length: int, bad):
    """Texts → (Encoded, Counts): all of a text counts, its end too where it fits."""
    counts, found = batches.Counts(), []
    for text in texts:
        ids = tokenizer(text.messages[0]["content"], add_special_tokens=False).input_ids
        ids = [*chat_template.start_of_text(tokenizer), *ids, tokenizer.eos_token_id]
        counts.kept += 1
        counts.cut_answers += len(ids) > max_length
        ids = ids[:max_length]
        found.append(chat_template.Encoded(ids, [True] * len(ids)))
    return found, counts


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
