"""The reward model as step 3 asks it: by the policy's ids where they mean the same text to both,
else by the text itself, tokenised anew, so that a reward model of another family will do."""

from dataclasses import dataclass

import torch

from utils.data import batches, chat_template
from utils.distributed import host_memory
from utils.models import scalar_model


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


@dataclass
class RewardModel:
    """model: (ids (B,T), mask (B,T)) → (B,T). tokenizer: its own where it reads other ids than
    the policy writes, else None. max_length: tokens it has positions for; texts lose their left
    end."""

    model: object
    tokenizer: object | None
    max_length: int

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
        if self.tokenizer is not None:
            rows = [
                self.encode(p.messages, text, done)
                for p, text, done in zip(prompts, texts, finished.tolist(), strict=True)
            ]
            input_ids = batches.pad(rows, self.tokenizer.pad_token_id)
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

    def encode(self, messages, text: str, finished: bool) -> list[int]:
        """One conversation in the reward model's own ids, up to its stop token; an answer cut at
        the limit has none."""
        stop = self.tokenizer.eos_token
        # An answer that spells the stop token in letters would end there for a reader of ids.
        answer = {"role": "assistant", "content": text.replace(stop, "")}
        encoded = chat_template.encode_conversation(self.tokenizer, (*messages, answer))
        ids = encoded.ids if finished else encoded.ids[:-1]
        return ids[-self.max_length :]
