"""DeepSpeed's HybridEngineRollout: transformers' `generate` on the trained module.

It decodes every row to the limit, under ZeRO-3 gathers each layer for each token, and returns no
log-probabilities. It draws from torch's generator, which the request's noise seeds: the same
request gives the same samples, but on another number of ranks the samples are others.
"""

import contextlib

import torch
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout
from torch import nn

from utils.generation import weights
from utils.generation.engine import (
    Request,
    Samples,
    Sampling,
    Setup,
    decoded_together,
    samples_of,
    steps_of,
)

# Settings of a generation_config that a request says itself, or that change no draw.
HARMLESS = {"temperature", "top_p", "top_k", "do_sample", "max_length", "max_new_tokens"}
HARMLESS |= {"transformers_version", "_from_model_config", "use_cache"}


def build(setup: Setup) -> "DeepSpeedEngine":
    bad = {
        name: value
        for name, value in setup.actor.module.generation_config.to_diff_dict().items()
        if not name.endswith("token_id") and not name.startswith("output_") and name not in HARMLESS
    }
    if bad:
        raise SystemExit(
            "rollout_engine=deepspeed: the model's generation_config changes what is drawn: "
            f"{bad}; take it out, or set --rollout_engine native"
        )
    return DeepSpeedEngine(setup.tokenizer, setup.tokens_at_once)


class DeepSpeedEngine:
    name, returns_logprobs, returns_entropies = "deepspeed", False, False
    description = (
        "deepspeed engine: every row is decoded to the limit, under ZeRO-3 each layer is gathered "
        "for each token, and another number of ranks draws other samples"
    )

    def __init__(self, tokenizer, tokens_at_once: int = 0):
        self.tokenizer, self.tokens_at_once = tokenizer, tokens_at_once
        self.generator: nn.Module | None = None
        self._synced, self.policy_step = contextlib.ExitStack(), 0

    def sync(self, actor) -> None:
        self._synced.close()
        self.policy_step = steps_of(actor)
        self.generator = self._synced.enter_context(weights.in_eval_mode(actor))
        self.rollout = HybridEngineRollout(actor.engine, self.tokenizer)

    def generate(self, request: Request, sampling: Sampling) -> Samples:
        if sampling.stop_id != self.tokenizer.eos_token_id:
            raise ValueError(
                f"DeepSpeed stops at the tokenizer's eos_token, not {sampling.stop_id}"
            )
        greedy, limit = request.noise is None, sampling.max_new_tokens
        device = next(self.generator.parameters()).device
        how = SamplingConfig(limit, 0.0 if greedy else sampling.temperature)
        responses = torch.full((len(request.prompt_ids), limit), sampling.pad_id, device=device)
        for rows, part in decoded_together(request, limit, self.tokens_at_once):
            ids, mask = part.prompt_ids.to(device), part.prompt_mask.long().to(device)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                if not greedy:
                    torch.manual_seed(int(part.noise.double().sum() * 2**24))
                batch = self.rollout.generate(RolloutRequest(ids, mask), how)
            answers = batch.input_ids[:, ids.shape[1] :]
            responses[rows, : answers.shape[1]] = answers
        return samples_of(responses, sampling)

    def release(self) -> None:
        self._synced.close()
        self.generator = None
