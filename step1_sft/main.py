"""Step 1: supervised fine-tuning. Loss on the assistant's tokens, end token included.

deepspeed step1_sft/main.py --model_name_or_path MODEL --sft_data DATA --output_dir FOLDER
"""

import functools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step1_sft.config import SFTConfig
from utils import metrics
from utils.checkpoints.model_folder import ModelFolder
from utils.data import batches, demonstrations, fitting
from utils.data.loading import DataSettings
from utils.distributed import host_memory, program, zero
from utils.generation import engines
from utils.generation.engine import Request, Sampling, Setup, synced
from utils.metrics import Metric
from utils.models import freezing, language_model
from utils.models.adapters import Lora
from utils.models.freezing import Freezing
from utils.models.loading import Loading
from utils.run import Run
from utils.settings import command_line

SHOWN = ("loss", "eval/loss", "learning_rate", "grad_norm", "tokens_per_second")
metrics.register(
    "step 1",
    Metric("loss", "nats a token", "negative log-likelihood of the assistant's tokens"),
    Metric("eval/perplexity", "", "exp of `eval/loss`", "rises while `loss` falls: overfitted"),
    Metric("tokens_per_second", "tokens/s", "tokens of all ranks' rows, without padding"),
)


def response_loss(model, ids, mask, supervised) -> tuple[torch.Tensor, int]:
    """Summed −log p of the supervised tokens, and how many there are.

    ids, mask, supervised: (B,T), the latter two on the CPU. Token t is predicted from t−1, so
    column 0 never counts.
    """
    logprobs, _ = language_model.wanted_logprobs(model, ids, mask, supervised)
    return -logprobs.sum(), len(logprobs)


@torch.no_grad()
def evaluate(engine, examples, budget: tuple[int, int], pad_id, device) -> dict[str, float]:
    """Held-out loss a token (nats) and perplexity, over all ranks. budget: of batches.share."""
    engine.module.eval()
    lengths = [len(e.ids) for e in examples]
    sums = metrics.Sums(device)
    for chosen in batches.share(range(len(examples)), lengths, *budget):
        # A rank whose rows have run out goes forward with the others: ZeRO-3 gathers in each pass.
        batch = batches.supervised_batch([examples[i] for i in chosen or [0]], pad_id)
        loss, count = response_loss(engine, host_memory.send(batch[0], device), *batch[1:])
        sums.add({"loss": loss * bool(chosen), "tokens": count * bool(chosen)})
    engine.module.train()
    totals = sums.over(1)
    loss = totals["loss"] / totals["tokens"]
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 100.0))}


class Answers:
    """Shows people greedy answers to the first held-out prompts; none where `count` is 0."""

    def __init__(self, run: Run, actor, tokenizer, examples):
        self.run, self.actor, self.tokenizer, self.examples = run, actor, tokenizer, examples
        self.count, self.limit = run.config.sample_answers, run.config.max_length
        gather = run.config.rollout_gather
        self.engine = engines.build(
            "native", Setup(actor, tokenizer, (), gather, longest=self.limit)
        )
        if self.count:
            run.say(f"sampled answers: {self.engine.description}")

    def show(self, when: str) -> None:
        if self.count == 0:
            return
        with synced(self.engine, self.actor):
            rows = [self.examples.item(i) for i in range(min(self.count, len(self.examples)))]
            answers = [self.answer(row.messages) for row in rows]
        self.run.say("\n".join([f"answers {when}:", *filter(None, answers)]))

    def answer(self, messages) -> str:
        """The prompt and its answer as two lines; empty where the prompt is too long."""
        length, tokenizer = min(64, self.limit // 2), self.tokenizer
        ids, _ = fitting.encode_prompt(
            tokenizer, messages[:-1], self.limit - length, self.run.config.long_prompts
        )
        if ids is None:
            return ""
        prompt = torch.tensor([ids])
        request = Request(prompt, torch.ones_like(prompt, dtype=torch.bool))
        sampling = Sampling(length, tokenizer.eos_token_id, tokenizer.pad_token_id)
        answer = self.engine.generate(request, sampling).response_ids[0]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        return f"  {messages[-2]['content'][:120]!r}\n    → {text[:120]!r}"


def main() -> None:
    config = command_line.parse(SFTConfig, __doc__)
    run = Run(config)
    device = run.device

    # Data, model, engine.
    tokenizer = run.load_tokenizer(config.max_length, "--max_length")
    pad_id = tokenizer.pad_token_id
    examples, held = demonstrations.load(
        config.sft_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        config.long_answers,
        run.say,
    )
    rows = config.global_batch_size
    steps = config.max_steps or batches.steps_of(config.epochs, rows, len(examples))
    run.announce(f"step 1, SFT: {steps} steps", steps)
    loading = dict(dtype=run.dtype, zero_stage=config.zero_stage)
    model = language_model.load(
        config.pick(Loading),
        config.model_name_or_path,
        tokenizer=tokenizer,
        lora=config.pick(Lora),
        **loading,
    )
    run.say(freezing.apply(model, config.pick(Freezing)))
    engine = zero.TrainEngine(model, config.pick(zero.Training), total_steps=steps, **loading)
    answers = Answers(run, engine, tokenizer, held)
    budget = config.micro_batch_size, config.micro_batch_tokens
    measure = functools.partial(evaluate, engine, held, budget, pad_id, device)

    folder = ModelFolder(engine.module, tokenizer, run.settings)
    done = run.restore({".": folder}, {"model": engine}, examples.fingerprint())
    before = run.once("before", measure)
    run.say(f"held-out loss before: {before['eval/loss']:.4f}")
    if run.resumed_from is None:
        answers.show("before")

    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(step, rows, len(examples), config.seed)
            taken = {i: examples[i] for i in chosen}
            lengths = {i: len(example.ids) for i, example in taken.items()}
            tokens = sum(sum(taken[i].supervised[1:]) for i in chosen)  # of all ranks
            sums = metrics.Sums(device)
            for micro in batches.share(chosen, lengths, *budget):
                ids, *masks = batches.supervised_batch([taken[i] for i in micro], pad_id)
                loss, _ = response_loss(engine, host_memory.send(ids, device), *masks)
                engine.backward(loss, normaliser=tokens)
                sums.add({"loss": loss})
            measured = engine.step()
            run.bad_steps.note(measured["skipped"])
            measured |= sums.over(tokens)
            measured["seconds"] = time.time() - tick
            measured["tokens_per_second"] = sum(lengths[i] for i in chosen) / measured["seconds"]
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                measured |= measure()
            run.after_step(step + 1, measured, SHOWN)

    after = measure()
    answers.show("after")
    run.save()
    result = {
        "eval_loss_before": before["eval/loss"],
        "eval_loss_after": after["eval/loss"],
        "eval_perplexity_after": after["eval/perplexity"],
        "steps": steps,
    }
    run.finish(
        result,
        f"held-out loss {before['eval/loss']:.4f} → {after['eval/loss']:.4f} "
        f"(perplexity {after['eval/perplexity']:.3f}); saved {config.output_dir}",
    )


if __name__ == "__main__":
    program.run(main)
