"""Who answers prompts in a rollout: our decode loop, or DeepSpeed's rollout class.

Both speak DeepSpeed's interface (`RolloutEngine.generate(request, sampling) → batch`) with what PPO
needs besides: the noise comes with the request, and log-probabilities may come with the batch. An
engine of another kind (a server that is sent the weights in `sync_weights`) is one class more.

Imported where it is used and not at the top of a file: it imports DeepSpeed, which takes 2 s.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepspeed.runtime.rollout import base
from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

from utils.distributed import process_group
from utils.generation import injected_kernels
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.generation.hybrid_engine import HybridEngine
from utils.models import language_model

PROBE_ROWS, PROBE_TOKENS, PROBE_ROUNDS = 4, 16, 3
# Nats by which a greedy token may fall short of the best one, and log-probabilities may differ.
PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05}


@dataclass
class Request(base.RolloutRequest):
    """Left-padded prompts. noise: (B, max_new_tokens) uniform numbers; None: greedy."""

    noise: torch.Tensor | None = None


@dataclass
class Sampling(base.SamplingConfig):
    """stop_id ends an answer, pad_id fills it up. logprobs: are they wanted?"""

    stop_id: int = -1
    pad_id: int = 0
    logprobs: bool = False


@dataclass
class Batch(base.RolloutBatch):
    """logprobs, entropies: (B,R) fp32 as the decode loop saw them, None where the engine does not
    tell."""

    logprobs: torch.Tensor | None = None
    entropies: torch.Tensor | None = None

    @property
    def response_ids(self) -> torch.Tensor:
        """(B,R), R = max_new_tokens, pad_id after the stop token."""
        return self.input_ids[:, int(self.response_start_idx[0]) :]


def _batch(prompt_ids, prompt_mask, responses, stop_id: int, *seen) -> Batch:
    kept = generation.mask_through_stop(responses, stop_id)
    start = torch.full((len(prompt_ids),), prompt_ids.shape[1], device=prompt_ids.device)
    return Batch(
        torch.cat([prompt_ids, responses], 1),
        torch.cat([prompt_mask.long(), kept.long()], 1),
        start,
        *seen,
    )


class NativeRollout(base.RolloutEngine):
    """Our decode loop on what `hybrid.generating()` gives: call `generate` inside it."""

    name = "native"

    def __init__(self, hybrid: HybridEngine, decode: str = "eager"):
        self.hybrid, self.reasons = hybrid, []
        self.decoder = Decoder(decode)

    def generate(self, request: Request, sampling: Sampling) -> Batch:
        if sampling.top_p != 1.0 or sampling.top_k > 0 or sampling.n_samples_per_prompt != 1:
            raise ValueError(f"the native engine takes prompts as they come, no top_k: {sampling}")
        ids, mask = request.prompt_ids, request.prompt_attention_mask
        logprobs = entropies = None
        if sampling.logprobs:
            logprobs = torch.zeros(len(ids), sampling.max_new_tokens, device=ids.device)
            entropies = torch.zeros_like(logprobs)
        responses = generation.generate(
            self.hybrid.generator,
            ids,
            mask,
            max_new_tokens=sampling.max_new_tokens,
            stop_id=sampling.stop_id,
            pad_id=sampling.pad_id,
            temperature=sampling.temperature,
            noise=request.noise,
            all_finished=self.hybrid.all_finished,
            logprobs=logprobs,
            entropies=entropies,
            decoder=self.decoder,
        )
        return _batch(ids, mask, responses, sampling.stop_id, logprobs, entropies)

    def release(self) -> None:
        """Keys, values and graphs make room; the next batch takes it again."""
        self.decoder.release()

    def sync_weights(self, step: int) -> None:
        """Nothing to push: `hybrid.generating()` gives the weights of now."""


class DeepSpeedRollout(base.RolloutEngine):
    """DeepSpeed's HybridEngineRollout around the trained module: transformers' `generate`.

    It decodes every row to the limit and, under ZeRO-3, gathers each layer for each token. It
    draws from torch's generator, which the request's noise seeds: the same request gives the same
    samples, but another number of ranks gives others.
    """

    name = "deepspeed"

    def __init__(self, hybrid: HybridEngine, tokenizer):
        self.hybrid, self.reasons = hybrid, []
        self.theirs = HybridEngineRollout(hybrid.train_engine.engine, tokenizer)

    def generate(self, request: Request, sampling: Sampling) -> Batch:
        if sampling.stop_id != self.theirs.tokenizer.eos_token_id:
            raise ValueError(
                f"DeepSpeed stops at the tokenizer's eos_token, not {sampling.stop_id}"
            )
        greedy, device = request.noise is None, request.prompt_ids.device
        drawn = dataclasses.replace(sampling, temperature=0.0) if greedy else sampling
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if not greedy:
                torch.manual_seed(int(request.noise.double().sum() * 2**24))
            found = self.theirs.generate(request, drawn)
        ids, mask = request.prompt_ids, request.prompt_attention_mask
        responses = found.input_ids[:, ids.shape[1] :]
        kept = generation.mask_through_stop(responses, sampling.stop_id)
        return _batch(ids, mask, responses.where(kept, sampling.pad_id), sampling.stop_id)

    def release(self) -> None:
        """Nothing to give back: it keeps nothing between batches."""

    def sync_weights(self, step: int) -> None:
        """Nothing to push: it generates with the trained module."""


def build(config, load: Callable, train: Callable, tokenizer, dtype: str):
    """(zero.TrainEngine, rollout engine) by --hybrid_engine; every rank must call it.

    load() → the actor as it is on disk; train(model, injected_tokens) → its TrainEngine. What
    cannot work is known before `deepspeed.initialize`; where it or the parity check after it
    fails, the actor is loaded again, and nothing of DeepSpeed's layers is left in it.
    """
    asked, model, why_not = config.hybrid_engine, load(), []
    wanted = asked in ("auto", "deepspeed")
    if wanted:
        why_not = injected_kernels.problems(model, config.zero_stage)
    inject = wanted and not why_not
    actor = theirs = None
    try:
        actor = train(model, config.max_prompt_length + config.max_response_length if inject else 0)
    except injected_kernels.ERRORS as error:
        if not inject:
            raise
        why_not = [f"deepspeed.initialize failed ({type(error).__name__}: {error})"]
    # Without its layers DeepSpeed's class does what ours does, and more of it: it decodes every
    # row to the limit and gathers layer by layer. That is worth asking for, but not worth trying.
    if actor is not None and (inject or asked == "deepspeed"):
        theirs = DeepSpeedRollout(HybridEngine(actor, "layer"), tokenizer)
        fault = _fault_of_settings(actor.module) or _differs(theirs, tokenizer, dtype)
        if fault:
            theirs, actor, why_not = None, None if inject else actor, [*why_not, fault]
    if actor is None:
        del model
        gc.collect()
        actor = train(load(), 0)
    in_step = asked == "off" or config.rollout_gather == "layer"
    ours = NativeRollout(HybridEngine(actor, "layer" if in_step else "rollout"), config.decode)
    for engine, what in ((ours, "not DeepSpeed's"), (theirs, "without its inference layers")):
        if engine is not None and why_not:
            engine.reasons.append(f"{what}: {', '.join(why_not)}")
    if theirs is None or asked == "deepspeed":
        return actor, theirs or ours
    speeds = {one: _speed(one, tokenizer) for one in (ours, theirs)}
    fastest = max(speeds, key=speeds.get)
    told = ", ".join(f"{one.name} {speed:.0f}" for one, speed in speeds.items())
    fastest.reasons.append(f"tokens a second on a probe: {told}")
    return actor, fastest


def settle(engine, config, rows: int, trained=()) -> str:
    """Choose how weights are gathered, once every model is loaded; what to say of the choice.

    rows: the sequences that one rank decodes at once. trained: `zero.TrainEngine`s beside the
    actor's.
    """
    asked = config.rollout_gather
    if config.hybrid_engine == "off" or engine.name == "deepspeed":
        asked = "layer"
    length = config.max_prompt_length + config.max_response_length
    how = engine.hybrid.choose_gather(asked, rows, length, trained)
    return f"rollouts: {engine.name} engine; " + "; ".join([how, *engine.reasons])


def _fault_of_settings(module) -> str:
    """What transformers' generate would do to the distribution, by the model's own settings."""
    said_by_request = {"temperature", "top_p", "top_k", "do_sample", "max_length", "max_new_tokens"}
    harmless = said_by_request | {"transformers_version", "_from_model_config", "use_cache"}
    bad = {
        name: value
        for name, value in module.generation_config.to_diff_dict().items()
        if name not in harmless and not name.endswith("token_id") and not name.startswith("output_")
    }
    return f"the model's generation_config changes what is drawn: {bad}" if bad else ""


def _probe(tokenizer, vocabulary: int, device) -> Request:
    """Rows of different lengths, left-padded, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_ROWS, 2 * PROBE_ROWS)
    ids = torch.randint(min(vocabulary, len(tokenizer)), shape, generator=generator)
    mask = torch.arange(shape[1])[None] >= 2 * torch.arange(PROBE_ROWS)[:, None]
    return Request(ids.where(mask, tokenizer.pad_token_id).to(device), mask.long().to(device))


def _run_probe(engine, tokenizer) -> Batch:
    module = engine.hybrid.train_engine.module
    device = engine.hybrid.train_engine.engine.device
    sampling = Sampling(PROBE_TOKENS, stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    return engine.generate(_probe(tokenizer, module.config.vocab_size, device), sampling)


@torch.no_grad()
def _differs(engine, tokenizer, dtype: str) -> str:
    """How `engine`'s greedy answers to the probe differ from the training forward; "" if not."""
    actor = engine.hybrid.train_engine
    try:
        with engine.hybrid.generating() as generator:
            batch = _run_probe(engine, tokenizer)
            responses = batch.response_ids
            length, mask = responses.shape[1], batch.attention_mask.bool()
            scoring = dict(temperature=1.0, micro_batch_size=len(responses))
            seen, _ = language_model.response_logprobs(
                generator, batch.input_ids, mask, length, **scoring
            )
    except injected_kernels.ERRORS as error:
        return f"generating fails ({type(error).__name__}: {error})"
    logits = language_model.response_logits(actor, batch.input_ids, mask, length).float()
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, responses[..., None]).squeeze(-1)
    kept = mask[:, -length:]
    short = float((logs.amax(-1) - own)[kept].max())
    apart = float((own - seen)[kept].abs().max())
    short, apart = (max(x) for x in zip(*process_group.gather_objects((short, apart)), strict=True))
    # Written so that nan fails.
    if short <= PROBE_TOLERANCE[dtype] and apart <= PROBE_TOLERANCE[dtype]:
        return ""
    return (
        f"its greedy tokens are up to {short:.2g} nats below the model's best, its "
        f"log-probabilities {apart:.2g} off (allowed {PROBE_TOLERANCE[dtype]})"
    )


def _speed(engine, tokenizer) -> float:
    """Tokens a second over all ranks on the probe, the median of some rounds after a first."""
    seconds = []
    for _ in range(1 + PROBE_ROUNDS):
        started = time.perf_counter()
        with engine.hybrid.generating():
            batch = _run_probe(engine, tokenizer)
            tokens = int(batch.attention_mask[:, -PROBE_TOKENS:].sum())
        seconds.append(time.perf_counter() - started)
    speeds = process_group.gather_objects(tokens / statistics.median(seconds[1:]))
    return sum(speeds)
