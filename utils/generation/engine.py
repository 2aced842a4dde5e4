"""What a rollout engine is: it answers prompts with the policy's weights as they are now.

    engine.sync(actor)                        the weights that it samples with from here on
    samples = engine.generate(request, sampling)
    engine.release()                          memory and modes as they were before

An engine may run in this process or behind a socket: it is given tensors on the CPU and gives such
back. Each is a module of utils/generation/engines/.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from utils.distributed import process_group
from utils.generation import sampling as generation


@dataclass(frozen=True)
class Request:
    """prompt_ids (B,P) int64 and prompt_mask (B,P) bool, left-padded. noise (B, max_new_tokens) in
    [0, 1) decides what is drawn: equal noise, equal samples; None: greedy."""

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    noise: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """stop_id ends an answer, pad_id fills it up. logprobs: are they wanted?"""

    max_new_tokens: int
    stop_id: int
    pad_id: int
    temperature: float = 1.0
    logprobs: bool = False
    nucleus: object = None  # Nucleus: what may be drawn; the native engine alone knows it


@dataclass(frozen=True)
class Samples:
    """B answers, right-padded to the R tokens of the longest, on the CPU."""

    response_ids: torch.Tensor  # (B,R) int64
    response_mask: torch.Tensor  # (B,R) bool, through the stop token
    logprobs: torch.Tensor | None  # (B,R) fp32, 0 off the mask; None: not asked for, or not known
    entropies: torch.Tensor | None  # as logprobs, in nats
    finish_reasons: list[str]  # "stop", or "length" where the answer is cut at the limit


class RolloutEngine(Protocol):
    """description: for the run's first lines. returns_logprobs, returns_entropies: can samples
    have them? generator: the module that samples, between `sync` and `release`; None where it is
    not in this process. policy_step: optimizer steps of the actor that answered last."""

    name: str
    description: str
    returns_logprobs: bool
    returns_entropies: bool
    policy_step: int
    generator: nn.Module | None

    def sync(self, actor) -> None:
        """Sample with the weights of now of a `zero.TrainEngine`. A collective."""

    def generate(self, request: Request, sampling: Sampling) -> Samples:
        """One answer to each prompt. A collective: every rank asks, with as many rows."""

    def release(self) -> None:
        """Give back what training needs: modes, and memory that is not kept for the next rollout.
        Harmless without `sync`."""


@dataclass(frozen=True)
class Untrained:
    """A whole model that nobody trains, in the place of an actor."""

    module: nn.Module
    zero_stage: int = 0

    @property
    def engine(self) -> nn.Module:
        return self.module


def steps_of(actor) -> int:
    """Optimizer steps that the actor has made, those before a resume too."""
    return getattr(actor.engine, "global_steps", 0)


@dataclass(frozen=True)
class Setup:
    """What an engine is built with, once every model of the run is loaded."""

    actor: object  # zero.TrainEngine or Untrained, whose weights `sync` will bring
    tokenizer: object
    others: tuple = ()  # the run's other zero.TrainEngines
    gather: str = "auto"  # --rollout_gather
    decode: str = "eager"  # --decode
    tokens_at_once: int = 0  # --generation_tokens
    rows_at_once: int = 1  # sequences that one rank decodes together, at most
    longest: int = 1  # tokens of a sequence at most, prompt included
    keep_memory: bool = True  # KV cache and graphs stay between rollouts
    vllm: object = None  # vllm_server.Settings of the run


@contextlib.contextmanager
def synced(engine: RolloutEngine, actor):
    """The engine with the actor's weights of now; all is as before afterwards, whatever happens."""
    try:
        engine.sync(actor)
        yield engine
    finally:
        engine.release()


def samples_of(responses, sampling: Sampling, logprobs=None, entropies=None) -> Samples:
    """(B, max_new_tokens) answers with anything behind their stop tokens → Samples."""
    responses = responses.cpu()
    mask = generation.mask_through_stop(responses, sampling.stop_id)
    longest = int(mask.sum(1).max())
    responses, mask = responses[:, :longest], mask[:, :longest]
    logprobs, entropies = (
        None if x is None else x.cpu()[:, :longest] * mask for x in (logprobs, entropies)
    )
    stopped = ((responses == sampling.stop_id) & mask).any(1).tolist()
    reasons = ["stop" if done else "length" for done in stopped]
    return Samples(responses.where(mask, sampling.pad_id), mask, logprobs, entropies, reasons)


def decoded_together(request: Request, new_tokens: int, most: int) -> Iterator[tuple]:
    """(slice of rows, the request of these without padding that none of them needs), for rows to
    decode at once; see batches_of. The slices are the same on every rank, for the longest of all
    ranks' i-th rows: ranks that decode in step take as many. A collective."""
    widths = request.prompt_mask.sum(1).tolist()
    if most:
        every_rank = process_group.gather_objects(widths)
        widths = [max(row) for row in zip(*every_rank, strict=True)]
    for rows in batches_of(widths, new_tokens, most):
        mask = request.prompt_mask[rows]
        left = int(mask.long().argmax(1).min())
        noise = None if request.noise is None else request.noise[rows]
        yield rows, Request(request.prompt_ids[rows, left:], mask[:, left:], noise)


def batches_of(widths: list[int], new_tokens: int, most: int) -> list[slice]:
    """Rows with prompts of `widths` tokens → neighbours to decode together, at most `most` tokens
    of prompts and room for answers; 0: all. A row longer than that goes alone."""
    batches, start, longest = [], 0, 0
    for row, width in enumerate(widths):
        longest = max(longest, width)
        if most and row > start and (row + 1 - start) * (longest + new_tokens) > most:
            batches.append(slice(start, row))
            start, longest = row, width
    return [*batches, slice(start, len(widths))]
