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
from utils import report as reporting
from utils.checkpoints import model_folder as checkpoint
from utils.checkpoints import resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.data import batches, chat_template, demonstrations, fitting
from utils.data.loading import DataSettings
from utils.distributed import host_memory, process_group, shared_files, zero
from utils.generation import sampling as generation
from utils.generation.hybrid_engine import HybridEngine
from utils.kernels.cpu_products import PRODUCTS
from utils.models import language_model
from utils.planner import plan as planner
from utils.seeding import seed_everything
from utils.settings import fields as run_config

SHOWN = ("loss", "eval/loss", "learning_rate", "grad_norm", "tokens_per_second")


def response_loss(model, ids, mask, supervised) -> tuple[torch.Tensor, int]:
    """Summed −log p of the supervised tokens, and how many there are.

    ids, mask, supervised: (B,T), the latter two on the CPU. Token t is predicted from t−1, so
    column 0 never counts.
    """
    logprobs, _ = language_model.wanted_logprobs(model, ids, mask, supervised)
    return -logprobs.sum(), len(logprobs)


@torch.no_grad()
def evaluate(engine, examples, config, pad_id, device) -> dict[str, float]:
    """Held-out loss a token (nats) and perplexity, over all ranks."""
    engine.module.eval()
    lengths = [len(e.ids) for e in examples]
    total = tokens = 0.0
    budget = config.micro_batch_size, config.micro_batch_tokens
    for chosen in batches.share(range(len(examples)), lengths, *budget):
        # A rank whose rows have run out goes forward with the others: ZeRO-3 gathers in each pass.
        batch = batches.supervised_batch([examples[i] for i in chosen or [0]], pad_id)
        loss, count = response_loss(engine, host_memory.send(batch[0], device), *batch[1:])
        if chosen:
            total, tokens = total + loss.item(), tokens + count
    engine.module.train()
    total, tokens = process_group.sum_over_ranks([total, tokens], device)
    loss = total / tokens
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 100.0))}


def sample_answers(model, tokenizer, examples, config, device, all_finished) -> str:
    """Greedy answers to the first held-out prompts, as text for people."""
    lines = []
    length = min(64, config.max_length // 2)
    for i in range(min(config.sample_answers, len(examples))):
        row = examples.item(i)
        ids, _ = fitting.encode_prompt(
            tokenizer, row.messages[:-1], config.max_length - length, config.long_prompts
        )
        if ids is None:
            continue
        prompt = torch.tensor([ids], device=device)
        answer = generation.generate(
            model,
            prompt,
            torch.ones_like(prompt, dtype=torch.bool),
            max_new_tokens=length,
            stop_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            all_finished=all_finished,
        )
        lines.append(
            f"  {row.messages[-2]['content'][:120]!r}\n"
            f"    → {tokenizer.decode(answer[0], skip_special_tokens=True)[:120]!r}"
        )
    return "\n".join(lines)


def build(config, device, report):
    """(tokenizer, training examples, held-out examples, engine, steps)."""
    dtype = zero.resolve_dtype(config.dtype, device)
    name = config.model_name_or_path
    language_model.check_positions(
        name, config.max_length, "--max_length", config.trust_remote_code
    )
    tokenizer = chat_template.load_tokenizer(name, config.trust_remote_code, config.date)
    examples, eval_examples = demonstrations.load(
        config.sft_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        config.long_answers,
        report.say,
    )
    steps = config.max_steps or batches.steps_of(
        config.epochs, config.global_batch_size, len(examples)
    )
    report.say(
        f"step 1, SFT: {steps} steps, {dtype}, ZeRO-{config.zero_stage}, "
        + reporting.batch_arithmetic(config, process_group.world_size())
    )
    planner.first_lines("sft", config, device, report.say)
    model = language_model.load(
        config, name, dtype=dtype, zero_stage=config.zero_stage, tokenizer=tokenizer
    )
    engine = zero.TrainEngine(
        model,
        config,
        dtype=dtype,
        zero_stage=config.zero_stage,
        learning_rate=config.learning_rate,
        total_steps=steps,
    )
    return tokenizer, examples, eval_examples, engine, steps


def say_result(config, report, before: dict, after: dict, counted: dict) -> None:
    """Write result.json; what the evaluations before and after say, for people."""
    result = {
        "eval_loss_before": before["eval/loss"],
        "eval_loss_after": after["eval/loss"],
        "eval_perplexity_after": after["eval/perplexity"],
    }
    reporting.save_result(config.output_dir, result | counted)
    report.say(
        f"held-out loss {before['eval/loss']:.4f} → {after['eval/loss']:.4f} "
        f"(perplexity {after['eval/perplexity']:.3f}); saved {config.output_dir}"
    )


def main() -> None:
    config = run_config.parse(SFTConfig, __doc__)
    resuming.check_output(config)
    reporting.quiet_libraries()
    device = process_group.init(config.timeout_minutes)
    shared_files.check(config)
    seed_everything(config.seed, config.deterministic)
    found = resuming.find(config)
    resuming.settle_date(config, found)

    # Build: data, model, engine.
    report = reporting.Report(
        config.output_dir, config.log_every, config.tensorboard, found and found.step
    )
    run = Checkpoints(config, report, found, device)
    tokenizer, examples, eval_examples, engine, steps = build(config, device, report)
    report.expect(steps)
    run_config.save(config, config.output_dir, process_group.world_size(), process_group.is_main())
    hybrid = HybridEngine(engine)
    how = hybrid.choose_gather(config.rollout_gather, rows=1, length=config.max_length)
    if config.sample_answers:
        report.say(f"sampled answers: {how}")

    def show_answers(when: str) -> None:
        if config.sample_answers == 0:
            return
        with hybrid.generating() as generator:
            answers = sample_answers(
                generator, tokenizer, eval_examples, config, device, hybrid.all_finished
            )
        report.say(f"answers {when}:\n{answers}")

    parts = {".": checkpoint.ModelFolder(engine.module, tokenizer, config)}
    save = functools.partial(checkpoint.save, config.output_dir, parts)

    def measure() -> dict[str, float]:
        return evaluate(engine, eval_examples, config, tokenizer.pad_token_id, device)

    before = run.once("before", measure)
    report.say(f"held-out loss before: {before['eval/loss']:.4f}")
    if found is None:
        show_answers("before")

    # Loop.
    bad_steps = reporting.BadSteps(config.max_bad_steps, report.say, save)
    carried = {"bad_steps": bad_steps, "products": PRODUCTS}
    done = run.follow({"model": engine}, carried, parts, examples.fingerprint())
    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(
                step, config.global_batch_size, len(examples), config.seed
            )
            taken = {i: examples[i] for i in chosen}
            lengths = {i: len(example.ids) for i, example in taken.items()}
            tokens = sum(sum(taken[i].supervised[1:]) for i in chosen)  # of all ranks
            loss_sum = torch.zeros((), dtype=torch.float64, device=device)
            budget = config.micro_batch_size, config.micro_batch_tokens
            for micro in batches.share(chosen, lengths, *budget):
                batch = batches.supervised_batch([taken[i] for i in micro], tokenizer.pad_token_id)
                loss, _ = response_loss(engine, host_memory.send(batch[0], device), *batch[1:])
                engine.backward(loss, normaliser=tokens)
                loss_sum += loss.detach()
            metrics = engine.step()
            bad_steps.note(metrics["skipped"])
            metrics["loss"] = process_group.sum_over_ranks([loss_sum.item()], device)[0] / tokens
            metrics["seconds"] = time.time() - tick
            metrics["tokens_per_second"] = sum(lengths[i] for i in chosen) / metrics["seconds"]
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                metrics |= measure()
            report.log(step + 1, metrics, show=SHOWN)
            run.after_step(step + 1, metrics)

    # Evaluate, save.
    after = measure()
    show_answers("after")
    save()
    say_result(config, report, before, after, {"steps": steps, "seconds": run.seconds()})
    report.close()
    process_group.shut_down()


if __name__ == "__main__":
    reporting.run(main)
