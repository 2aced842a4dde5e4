"""Scores of whole conversations: the one place where a reward model is run.

`Reader` turns a conversation into the reward model's own token ids, up to the token at which it was
trained to be read. Rows of ids come in groups, the answers to one prompt: a model that takes rows
end to end reads what a group begins with once.

    group_scores   one forward pass, with a gradient: what step 2 trains on
    score_groups   any number of groups that every rank holds, dealt to the ranks: held-out
                   comparisons, labels of sampled answers, side-by-side evaluation
    Scorer         answers that each rank has sampled for itself: PPO's rewards
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.data import batches, chat_template, fitting
from utils.distributed import host_memory, process_group
from utils.kernels import packing
from utils.pretrained import config_of, positions_of

Group = Sequence[list[int]]  # rows of token ids that begin alike


@dataclass(frozen=True)
class Reader:
    """How a reward model reads a conversation.

    tokenizer: the reward model's own. max_length: tokens it has positions for; the prompts of
    longer rows are shortened. read_at: "stop" or "end", see chat_template. name: its path, for
    messages. pad_id: as in its config; plain transformers, with which public models are trained,
    takes the last token that is not this one for the end.
    """

    tokenizer: object
    max_length: int
    read_at: str
    name: str = "the reward model"
    pad_id: int | None = None

    @classmethod
    def load(
        cls, path: str, trust_remote_code: bool = False, read_at: str = "auto", date: str = ""
    ) -> "Reader":
        """Of a reward model's folder or hub name. Raises SystemExit with what is wrong."""
        tokenizer = chat_template.load_tokenizer(path, trust_remote_code, date)
        settings = config_of(path, trust_remote_code)
        if read_at == "auto":
            # Step 2's models of before the setting was saved are known by their bias.
            ours = "stop" if hasattr(settings, "reward_bias") else "end"
            read_at = getattr(settings, "reward_read_at", ours)
        if read_at not in chat_template.READ_AT:
            raise SystemExit(
                f"{path!r}: reward_read_at={read_at!r} in its config.json is none of "
                f"{', '.join(chat_template.READ_AT)}; mend it there, or set --reward_read_at"
            )
        pad_id = getattr(settings, "pad_token_id", None)
        return cls(tokenizer, positions_of(settings) or sys.maxsize, read_at, path, pad_id)

    def encode(self, messages: Sequence[dict], text: str, finished: bool) -> list[int]:
        """One answer's conversation; its score is read at the last id. An answer that was cut at
        the length limit has no stop token, and ends the row wherever the model is read.

        Raises TemplateError where the template refuses the conversation, never for the answer.
        """
        ids = self._whole(messages, text, finished)
        if len(ids) > self.max_length:
            prompt = len(chat_template.encode_prompt(self.tokenizer, messages))
            room = prompt - (len(ids) - self.max_length)
            fitted = fitting.shortened(self.tokenizer, messages, room)
            ids = self._whole(fitted, text, finished) if fitted else ids
        return ids[-self.max_length :]  # an answer that leaves no room for the frame

    def _whole(self, messages: Sequence[dict], text: str, finished: bool) -> list[int]:
        stop = self.tokenizer.eos_token
        while stop in text:  # spelled in letters: the answer would end there for a reader of ids
            text = text.replace(stop, "")
        if self.read_at == "end":
            ids = chat_template.encode_whole(self.tokenizer, messages, text, finished)
            while ids[-1] == self.pad_id:
                ids.pop()
            return ids
        try:
            turns = (*messages, {"role": "assistant", "content": text})
            ids = chat_template.encode_conversation(self.tokenizer, turns).ids[:-1]
        except chat_template.TemplateError:
            # It rewrites earlier turns, or refuses this answer for its text.
            ids = chat_template.encode_whole(self.tokenizer, messages, text, False)
        return [*ids, *[self.tokenizer.eos_token_id] * finished]

    def refusal(self, messages: Sequence[dict]) -> str | None:
        """Why no answer to `messages` can be scored, or None."""
        try:
            chat_template.around_answer(self.tokenizer, messages)
        except chat_template.TemplateError as error:
            return f"as {self.name} reads it: {error}"
        return None


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


def reads_text(reader: Reader, tokenizer) -> bool:
    """Whether the policy's ids would mean other text to a reward model, or end before the token
    that it is read at: then answers go to it as text."""
    return reader.read_at == "end" or bool(differences(tokenizer, reader.tokenizer))


def sequence_scores(
    forward, input_ids: torch.Tensor, mask: torch.Tensor, shared=None
) -> torch.Tensor:
    """(B,T) ids and mask → (B,) fp32 score at each row's last token (shared: see ScalarModel).

    Pads are never attended to, so any id does for them: 0, for which all models have an embedding.
    """
    input_ids = input_ids.masked_fill(~host_memory.send(mask, input_ids.device), 0)
    values = forward(input_ids, mask) if shared is None else forward(input_ids, mask, shared)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = host_memory.send((mask.long() * columns).argmax(-1), values.device)
    return values.gather(1, last[:, None]).squeeze(1)


def group_scores(forward, groups: Sequence[Group], device: torch.device) -> torch.Tensor:
    """(N,) fp32 scores of the rows of all groups laid end to end, each read at its last id."""
    rows = [ids for group in groups for ids in group]
    mask = batches.pad([[True] * len(ids) for ids in rows], False)
    shared = packing.shared_beginnings(groups) if len(rows) > len(groups) else None
    return sequence_scores(forward, host_memory.send(batches.pad(rows, 0), device), mask, shared)


def score_groups(
    forward, groups: Sequence[Group], device: torch.device, micro_batch_size: int, tokens: int = 0
) -> list[list[float]]:
    """Scores of every row, on every rank, from groups that are the same on every rank.

    micro_batch_size, tokens: groups, or tokens, of one forward pass; see batches.deal.
    """
    if not groups:
        return []
    lengths = [max(map(len, group)) for group in groups]
    ranks = process_group.rank(), process_group.world_size()
    counts = dict(enumerate(map(len, groups)))
    mine = batches.deal(range(len(groups)), lengths, *ranks, micro_batch_size, tokens, counts)
    parts = process_group.gather_objects(_score(forward, groups, mine, device))
    scores = {i: group for part in parts for i, group in part.items()}
    return [scores[i] for i in range(len(groups))]


@torch.no_grad()
def _score(forward, groups, micro_batches: list[list[int]], device) -> dict[int, list[float]]:
    """{i: scores of groups[i]} for each i in micro_batches; no pass waits for the one before it."""
    module = getattr(forward, "module", forward)
    was_training = module.training
    module.eval()
    # A rank whose groups have run out goes forward with the others, as ZeRO-3 needs.
    passes = [[groups[i] for i in chosen or [0]] for chosen in micro_batches]
    scores = [group_scores(forward, some, device) for some in passes]
    module.train(was_training)
    scores = iter(torch.cat(scores).tolist())
    by_group: dict[int, list[float]] = {}
    for chosen, some in zip(micro_batches, passes, strict=True):
        of_groups = [[next(scores) for _ in group] for group in some]
        by_group |= dict(zip(chosen, of_groups, strict=False))  # a filling has no number
    return by_group


@dataclass
class Scorer:
    """A reward model beside a policy. by_text: whether conversations go to it as text, through its
    reader, so that a model of another family will do, or as the policy's ids. device: of the ids
    that `model` takes."""

    model: object  # forward(ids (B,T), mask (B,T)) → (B,T) values, or the engine around it
    reader: Reader | None
    by_text: bool
    device: torch.device

    def scores(self, prompts, texts, finished, ids, mask, micro_batch_size: int, tokens: int = 0):
        """(B,) fp32 scores of B answers, as many on every rank, which all call this together.

        ids, mask (B,T): prompts and answers in the policy's ids, on the CPU as the scores are;
        prompts (with messages), texts and finished (B,): the same as text, and whether each answer
        ended with the stop token. micro_batch_size, tokens: of a forward pass.
        """
        if self.by_text:
            answers = zip(prompts, texts, finished.tolist(), strict=True)
            rows = [self.reader.encode(p.messages, text, done) for p, text, done in answers]
        else:
            rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        micro_batches = batches.in_step(list(map(len, rows)), micro_batch_size, tokens)
        scores = _score(self.model, [[row] for row in rows], micro_batches, self.device)
        return torch.tensor([scores[i][0] for i in range(len(rows))])
