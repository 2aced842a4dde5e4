"""Our own decode loop, on the trained module or, under ZeRO-3, on a plain copy of it."""

import contextlib

import torch
from torch import nn

from utils.generation import sampling as generation
from utils.generation import weights
from utils.generation.decoder import Decoder
from utils.generation.engine import (
    Request,
    Samples,
    Sampling,
    Setup,
    decoded_together,
    samples_of,
    steps_of,
)


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

    name, returns_logprobs, returns_entropies = "native", True, True

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
        self.policy_step = 0
        self.in_step = False  # do all ranks decode together?
        self._twin: nn.Module | None = None  # under ZeRO-3: built once, weightless between rollouts
        self._synced = contextlib.ExitStack()

    def sync(self, actor) -> None:
        self._synced.close()
        self.policy_step = steps_of(actor)
        sharded = actor.zero_stage == 3
        self.in_step = sharded and self.gather == "layer"
        if sharded and not self.in_step:
            self._twin = self._twin or weights.plain_twin(actor.module)
            held = weights.filled(self._twin, actor.module)
        else:
            held = weights.in_eval_mode(actor)
        self.generator = self._synced.enter_context(held)

    def generate(self, request: Request, sampling: Sampling) -> Samples:
        device = next(self.generator.parameters()).device
        shape = len(request.prompt_ids), sampling.max_new_tokens
        responses = torch.empty(shape, dtype=torch.int64, device=device)
        numbers = [torch.zeros(shape, device=device) for _ in range(2 * sampling.logprobs)]
        decoder = self.decoder
        if sampling.nucleus is not None:
            decoder = sampling.nucleus.beside(decoder)
        for rows, part in decoded_together(request, sampling.max_new_tokens, self.tokens_at_once):
            responses[rows] = generation.generate(
                self.generator,
                part.prompt_ids.to(device),
                part.prompt_mask.to(device),
                max_new_tokens=sampling.max_new_tokens,
                stop_id=sampling.stop_id,
                pad_id=sampling.pad_id,
                temperature=sampling.temperature,
                noise=part.noise,
                in_step=self.in_step,
                logprobs_and_entropies=[x[rows] for x in numbers] or None,
                decoder=decoder,
            )
        return samples_of(responses, sampling, *numbers)

    def release(self) -> None:
        self._synced.close()
        self.generator = None
        if not self.keep_memory:
            self.decoder.release()
