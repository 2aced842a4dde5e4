"""Our own decode loop, on the trained module or, under ZeRO-3, on a plain copy of it."""

import contextlib

import torch
from torch import nn

from utils.distributed import process_group
from utils.generation import sampling as generation
from utils.generation import weights
from utils.generation.decoder import Decoder
from utils.generation.engine import Request, Samples, Sampling, Setup, samples_of


def build(setup: Setup) -> "NativeEngine":
    gather, how = weights.choose_gather(
        setup.gather, setup.actor, setup.rows_at_once, setup.longest, setup.others
    )
    engine = NativeEngine(gather, setup.decode, setup.tokens_at_once, setup.keep_memory)
    engine.description = f"native engine; {how}"
    return engine


class NativeEngine:
    """gather: under ZeRO-3, "rollout" (weights whole, once for all of it) or "layer" (each layer
    for each token). tokens_at_once: prompts and room for answers decoded together; 0: all.
    keep_memory: whether KV cache and graphs wait for the next rollout."""

    name, tells_logprobs = "native", True

    def __init__(
        self,
        gather: str = "rollout",
        decode: str = "eager",
        tokens_at_once: int = 0,
        keep_memory: bool = True,
    ):
        self.gather, self.tokens_at_once, self.keep_memory = gather, tokens_at_once, keep_memory
        self.description = f"native engine, gather {gather}"
        self.decoder = Decoder(decode)
        self.generator: nn.Module | None = None
        self.in_step = False  # do all ranks decode together?
        self._twin: nn.Module | None = None  # under ZeRO-3: built once, weightless between rollouts
        self._synced = contextlib.ExitStack()

    def sync(self, actor) -> None:
        self._synced.close()
        sharded = actor.zero_stage == 3
        self.in_step = sharded and self.gather == "layer"
        if sharded and not self.in_step:
            self._twin = self._twin or weights.plain_twin(actor.module)
            held = weights.filled(self._twin, actor.module)
        else:
            held = weights.in_eval_mode(actor)
        self.generator = self._synced.enter_context(held)

    def generate(self, request: Request, sampling: Sampling) -> Samples:
        shape, device = (len(request.prompt_ids), sampling.max_new_tokens), self._device()
        responses = torch.empty(shape, dtype=torch.int64, device=device)
        logprobs = entropies = None
        if sampling.logprobs:
            logprobs, entropies = (torch.zeros(shape, device=device) for _ in range(2))
        for rows in self._batches(request.prompt_mask, sampling.max_new_tokens):
            mask = request.prompt_mask[rows]
            left = int(mask.long().argmax(1).min())  # pads that none of them needs
            responses[rows] = generation.generate(
                self.generator,
                request.prompt_ids[rows, left:].to(device),
                mask[:, left:].to(device),
                max_new_tokens=sampling.max_new_tokens,
                stop_id=sampling.stop_id,
                pad_id=sampling.pad_id,
                temperature=sampling.temperature,
                noise=None if request.noise is None else request.noise[rows],
                in_step=self.in_step,
                logprobs=None if logprobs is None else logprobs[rows],
                entropies=None if entropies is None else entropies[rows],
                decoder=self.decoder,
            )
        return samples_of(responses, sampling, logprobs, entropies)

    def release(self) -> None:
        self._synced.close()
        self.generator = None
        if not self.keep_memory:
            self.decoder.release()

    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def _batches(self, prompt_mask: torch.Tensor, new_tokens: int) -> list[slice]:
        """Rows to decode together, the same slices on every rank, of whose i-th rows the longest
        counts: ranks that decode in step take as many batches."""
        widths = prompt_mask.sum(1).tolist()
        if self.tokens_at_once:
            every_rank = process_group.gather_objects(widths)
            widths = [max(row) for row in zip(*every_rank, strict=True)]
        return batches_of(widths, new_tokens, self.tokens_at_once)


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
