"""The reward model as step 3 asks it: by the policy's ids where they mean the same text to both,
else by the text itself, tokenised anew, so that a reward model of another family will do."""

from dataclasses import dataclass

import torch

from utils.data import batches
from utils.distributed import host_memory
from utils.models import scalar_model
from utils.models.reward_reader import Reader


def differences(tokenizer, other) -> list[str]:
    """In what the ids of two tokenizers would mean different text; empty where in nothing."""
    return [
        what
        for what, mine, theirs in (
            ("vocabulary", tokenizer.get_vocab(), other.get_vocab()),
            ("chat template", tokenizer.chat_template, other.chat_template),
            ("stop token", tokenizer.eos_token, other.eos_token),
            ("pad token", tokenizer.pad_token, other.pad_token),
        )
        if mine != theirs
    ]


def readers(config) -> dict[str, Reader]:
    """How each reward model of the run reads a conversation, by the flag that names it."""
    read_at = {"reward_model": config.reward_read_at, "judge_model": "auto"}
    return {
        flag: Reader.load(getattr(config, flag), config.trust_remote_code, where, config.date)
        for flag, where in read_at.items()
        if getattr(config, flag)
    }


def reads_text(reader: Reader, tokenizer) -> bool:
    """Whether the policy's ids would mean other text to a reward model, or end before the token
    that it is read at."""
    return reader.read_at == "end" or bool(differences(tokenizer, reader.tokenizer))


@dataclass
class RewardModel:
    """model: (ids (B,T), mask (B,T)) → (B,T). by_text: whether conversations go to it as text,
    through its reader, or as the policy's ids."""

    model: object
    reader: Reader | None
    by_text: bool

    @torch.no_grad()
    def scores(
        self, prompts, texts, finished, input_ids, mask, micro_batch_size: int, tokens: int = 0
    ):
        """(B,) fp32 scores of responses.

        input_ids, mask (B,T): prompts and responses in the policy's ids; prompts, texts and
        finished (B,): the same as messages, answers and whether each ended with the stop token.
        The scores are where the mask is; with a mask on the CPU no micro-batch waits for the
        device of the ids.
        """
        device = input_ids.device
        if self.by_text:
            rows = [
                self.reader.encode(p.messages, text, done)
                for p, text, done in zip(prompts, texts, finished.tolist(), strict=True)
            ]
            input_ids = batches.pad(rows, 0)
            flags = batches.pad([[True] * len(row) for row in rows], False)
        else:
            input_ids, flags = input_ids.cpu(), mask.cpu()
        found, order = [], []
        for rows in batches.in_step(flags.sum(1).tolist(), micro_batch_size, tokens):
            used = flags[rows].any(0)
            ids = host_memory.send(input_ids[rows][:, used], device)
            found.append(scalar_model.sequence_scores(self.model, ids, flags[rows][:, used]))
            order += rows
        scores = torch.empty(len(flags))
        scores[order] = torch.cat(found).float().cpu()
        return scores.to(mask.device)
