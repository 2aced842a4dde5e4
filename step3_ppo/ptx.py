"""PPO-ptx: the language-model loss that InstructGPT adds to the actor's, so that a policy which
chases the score does not forget how to write.

The actor's loss is PPO's plus `ptx_coef` × the mean negative log-likelihood a token of
`global_batch_size` rows of `--ptx_data` (InstructGPT: 27.8, on the pretraining text).
"""

from dataclasses import dataclass

import torch

from utils.config import columns_of
from utils.data import batches, chat_template, instructions, rows, turns
from utils.distributed import host_memory, process_group
from utils.models import language_model


@dataclass
class Examples:
    """Tokenised rows, and how many optimizer steps have drawn from them."""

    rows: list[chat_template.Encoded]
    counts: batches.Counts
    steps: int = 0

    def carry(self) -> dict:
        return {"steps": self.steps}

    def take_up(self, saved: dict) -> None:
        self.steps = saved["steps"]


def load(config, tokenizer) -> Examples:
    """Demonstrations (the answers count), or rows of plain `text` (all of it counts)."""
    bad = rows.BadRows(config.max_bad_rows, f"{config.output_dir}/bad_rows.jsonl")
    columns = columns_of(config.columns)
    limit = config.max_prompt_length + config.max_response_length
    found: list[chat_template.Encoded] = []
    counts = batches.Counts()
    for name in config.ptx_data:
        splits = instructions.SFT_SPLITS["train"]
        seen = rows.read_rows(name, splits, rows.BadRows(1.0))
        if seen and all(_is_plain(row.data) for row in seen):
            for row in rows.read_rows(name, splits, bad):
                try:
                    text = turns.text_of(row.data["text"], "text")
                except rows.BadRow as problem:
                    bad.add(row.where, str(problem), row.data)
                    continue
                ids = tokenizer(text, add_special_tokens=False).input_ids
                ids = [*chat_template.start_of_text(tokenizer), *ids, tokenizer.eos_token_id]
                counts.kept += 1
                counts.cut_answers += len(ids) > limit
                found.append(chat_template.Encoded(ids[:limit], [True] * min(len(ids), limit)))
            continue
        conversations = instructions.load_conversations([name], columns=columns, bad=bad)
        encoded, more = batches.encode_conversations(
            tokenizer, conversations, limit, config.long_prompts, "drop", bad
        )
        found += encoded
        counts.kept += more.kept
        counts.dropped += more.dropped
    bad.finish("ptx_data")
    if not found:
        raise SystemExit(f"ptx_data={config.ptx_data}: no row fits; raise --max_response_length")
    return Examples(found, counts)


def _is_plain(data: dict) -> bool:
    """Is this a row of `text`, and of nothing that an answer could be read from?"""
    return "text" in data and not instructions.has_answer(data)


def add_gradient(actor, examples: Examples, config, pad_id: int, device) -> float:
    """Backward passes of one optimizer step's rows; returns the mean loss, nats a token."""
    chosen = batches.rows_of_step(
        examples.steps, config.global_batch_size, len(examples.rows), config.seed
    )
    examples.steps += 1
    tokens = sum(sum(examples.rows[i].supervised[1:]) for i in chosen)
    lengths = [len(e.ids) for e in examples.rows]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro in batches.deal(chosen, lengths, *batches.shares(config)):
        ids, mask, supervised = batches.supervised_batch([examples.rows[i] for i in micro], pad_id)
        ids = host_memory.send(ids, device)
        logprobs, _ = language_model.wanted_logprobs(actor, ids, mask, supervised)
        nll = -logprobs.sum()
        actor.backward(config.ptx_coef * nll, normaliser=tokens)
        total += nll.detach()
    return process_group.sum_over_ranks([total.item()], device)[0] / tokens
