"""Step 2: the reward model. K answers a prompt go forward once, all their pairs are ranked.

deepspeed step2_reward/main.py --model_name_or_path SFT --preference_data DATA --output_dir FOLDER
"""

import functools
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step2_reward import loss as losses
from step2_reward.config import RewardConfig
from utils import report as reporting
from utils.checkpoints import model_folder as checkpoint
from utils.checkpoints import resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.data import batches, chat_template, comparisons
from utils.data.comparisons import Ranked
from utils.data.loading import DataSettings
from utils.distributed import host_memory, process_group, shared_files, zero
from utils.kernels import packing
from utils.kernels.cpu_products import PRODUCTS
from utils.models import language_model, scalar_model
from utils.planner import plan as planner
from utils.seeding import seed_everything
from utils.settings import fields as run_config


def scores_of(engine, ranked: list[Ranked], pad_id: int, device) -> torch.Tensor:
    """(N,) scores of all answers of `ranked`, laid end to end. A prompt goes forward once."""
    answers = [ids for r in ranked for ids in r.answers]
    ids = host_memory.send(batches.pad(answers, pad_id), device)
    mask = batches.pad([[True] * len(a) for a in answers], False)
    shared = packing.shared_beginnings([r.answers for r in ranked])
    return scalar_model.sequence_scores(engine, ids, mask, shared)


def batch_loss(engine, ranked: list[Ranked], config, pad_id: int, device) -> torch.Tensor:
    """Summed loss of the prompts in `ranked` (each weighs 1)."""
    winners, losers, weights = losses.ranked_pairs([r.labels for r in ranked])
    margins = None
    if config.score_margin:
        labels = torch.tensor([label for r in ranked for label in r.labels], device=device)
        margins = config.score_margin * (labels[winners] - labels[losers])
    return losses.ranking_loss(
        scores_of(engine, ranked, pad_id, device),
        winners,
        losers,
        weights,
        margins=margins,
        label_smoothing=config.label_smoothing,
        centring=config.centring,
    )


@torch.no_grad()
def score_all(engine, ranked: list[Ranked], config, pad_id: int, device) -> list[list[float]]:
    """Scores of every answer, on every rank, in the order of `ranked`."""
    engine.module.eval()
    found = {}
    budget = config.micro_batch_size, config.micro_batch_tokens
    for chosen in comparisons.deal(range(len(ranked)), ranked, *budget):
        # A rank whose rows have run out goes forward with the others: ZeRO-3 gathers in each pass.
        rows = [ranked[i] for i in chosen or [0]]
        flat = iter(scores_of(engine, rows, pad_id, device).tolist())
        found |= {i: [next(flat) for _ in ranked[i].answers] for i in chosen}
    engine.module.train()
    everything = {i: s for part in process_group.gather_objects(found) for i, s in part.items()}
    return [everything[i] for i in range(len(ranked))]


def evaluate(engine, ranked, config, pad_id, device) -> dict[str, float]:
    """Accuracy, its 95 % interval by prompt and mean margin on held-out pairs; beside it the longer
    answer's."""
    from utils.intervals import pair_accuracy

    scores = score_all(engine, ranked, config, pad_id, device)
    winners, losers, _ = losses.ranked_pairs([r.labels for r in ranked])
    flat = [s for group in scores for s in group]
    sizes = [float(c) for r in ranked for c in r.characters]
    owners = [str(r.prompt) for r in ranked for _ in r.answers]
    prompts = [owners[i] for i in winners]
    ours = pair_accuracy([flat[i] for i in winners], [flat[i] for i in losers], prompts)
    longer = pair_accuracy([sizes[i] for i in winners], [sizes[i] for i in losers], prompts)
    return {
        "eval/accuracy": ours["accuracy"],
        "eval/accuracy_low": ours["low"],
        "eval/accuracy_high": ours["high"],
        "eval/margin": ours["margin"],
        "eval/accuracy_longer_answer": longer["accuracy"],
        "eval/pairs": ours["pairs"],
    }


def freeze(model, patterns: list[str]) -> str:
    """Leave only weights that match a pattern, and the head, trainable; says how many."""
    for name, p in model.named_parameters():
        p.requires_grad_(
            not patterns or ".score." in name or any(re.search(x, name) for x in patterns)
        )
    free = [n for n, p in model.named_parameters() if p.requires_grad]
    if patterns and all(".score." in n for n in free):
        names = [n for n, _ in model.named_parameters()]
        raise SystemExit(
            f"trainable_modules={patterns} matches no weight; names look like "
            f"{names[len(names) // 2]!r}; change --trainable_modules"
        )
    return f"{len(free)} of {sum(1 for _ in model.parameters())} weights are trained"


def build(config, device, report):
    """(tokenizer, training, held-out and demonstration Ranked, engine, steps)."""
    dtype = zero.resolve_dtype(config.dtype, device)
    name = config.model_name_or_path
    language_model.check_positions(
        name, config.max_length, "--max_length", config.trust_remote_code
    )
    tokenizer = chat_template.load_tokenizer(name, config.trust_remote_code, config.date)
    train, held, demonstrations = comparisons.load(
        config.preference_data,
        config.sft_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        report.say,
    )
    steps = config.max_steps or batches.steps_of(
        config.epochs, config.global_batch_size, len(train)
    )
    report.say(
        f"step 2, reward model: {steps} steps, {dtype}, ZeRO-{config.zero_stage}, "
        + reporting.batch_arithmetic(config, process_group.world_size())
    )
    planner.first_lines("reward", config, device, report.say)
    model = scalar_model.load(
        config,
        name,
        dtype=dtype,
        zero_stage=config.zero_stage,
        tokenizer=tokenizer,
        head="normal",
    )
    report.say(freeze(model, config.trainable_modules))
    engine = zero.TrainEngine(
        model,
        config,
        dtype=dtype,
        zero_stage=config.zero_stage,
        learning_rate=config.learning_rate,
        total_steps=steps,
    )
    return tokenizer, train, held, demonstrations, engine, steps


def main() -> None:
    config = run_config.parse(RewardConfig, __doc__)
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
    tokenizer, train, held, demonstrations, engine, steps = build(config, device, report)
    pad_id = tokenizer.pad_token_id
    report.expect(steps)
    run_config.save(config, config.output_dir, process_group.world_size(), process_group.is_main())

    parts = {".": checkpoint.ModelFolder(engine.module.classifier, tokenizer, config)}
    save = functools.partial(checkpoint.save, config.output_dir, parts)

    before = run.once("before", lambda: evaluate(engine, held, config, pad_id, device))
    report.say(
        f"held-out accuracy before: {before['eval/accuracy']:.3f}, always the longer "
        f"answer: {before['eval/accuracy_longer_answer']:.3f}"
    )

    # Loop.
    bad_steps = reporting.BadSteps(config.max_bad_steps, report.say, save)
    carried = {"bad_steps": bad_steps, "products": PRODUCTS}
    done = run.follow({"model": engine}, carried, parts, train.fingerprint())
    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(step, config.global_batch_size, len(train), config.seed)
            loss_sum = torch.zeros((), dtype=torch.float64, device=device)
            budget = config.micro_batch_size, config.micro_batch_tokens
            for micro in comparisons.deal(chosen, train, *budget):
                loss = batch_loss(engine, [train[i] for i in micro], config, pad_id, device)
                engine.backward(loss, normaliser=len(chosen))
                loss_sum += loss.detach()
            metrics = engine.step()
            bad_steps.note(metrics["skipped"])
            (loss_sum,) = process_group.sum_over_ranks([loss_sum.item()], device)
            metrics["loss"] = loss_sum / len(chosen)
            metrics["seconds"] = time.time() - tick
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                metrics |= evaluate(engine, held, config, pad_id, device)
            report.log(
                step + 1,
                metrics,
                show=("loss", "eval/accuracy", "learning_rate", "grad_norm", "seconds"),
            )
            run.after_step(step + 1, metrics)

    # Evaluate, set the bias so that demonstrations score 0 on average, save.
    after = evaluate(engine, held, config, pad_id, device)
    shown = score_all(engine, demonstrations, config, pad_id, device)
    bias = engine.module.bias + sum(s for group in shown for s in group) / len(shown)
    engine.module.set_bias(bias)
    save()
    result = {k.removeprefix("eval/"): v for k, v in after.items()}
    result |= {
        "accuracy_before": before["eval/accuracy"],
        "bias": bias,
        "steps": steps,
        "seconds": run.seconds(),
    }
    reporting.save_result(config.output_dir, result)
    report.say(
        f"held-out accuracy {result['accuracy']:.3f} (95 % by prompt: {result['accuracy_low']:.3f} "
        f"to {result['accuracy_high']:.3f}, {result['pairs']} pairs), always the longer answer "
        f"{result['accuracy_longer_answer']:.3f}, mean margin {result['margin']:.3f}, bias "
        f"{bias:.3f}; saved {config.output_dir}"
    )
    report.close()
    process_group.shut_down()


if __name__ == "__main__":
    reporting.run(main)
