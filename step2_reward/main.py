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
from utils import metrics
from utils import report as reporting
from utils.checkpoints import model_folder as checkpoint
from utils.checkpoints import resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.data import batches, chat_template, comparisons
from utils.data.comparisons import Ranked
from utils.data.splits import DataSettings
from utils.distributed import process_group, shared_files, zero
from utils.kernels.cpu_products import PRODUCTS
from utils.metrics import Metric
from utils.models import language_model, scalar_model, scorer
from utils.planner import plan as planner
from utils.seeding import seed_everything
from utils.settings import fields as run_config

metrics.register(
    "step 2",
    Metric("loss", "nats a comparison", "ranking loss, mean over the pairs of each comparison"),
    Metric(
        "eval/accuracy",
        "share",
        "held-out pairs whose better answer scores higher",
        "not above `eval/accuracy_longer_answer`: it has learned length",
    ),
    Metric("eval/accuracy_low", "share", "lower end of its 95 % interval, by prompt"),
    Metric("eval/accuracy_high", "share", "upper end"),
    Metric("eval/accuracy_longer_answer", "share", "accuracy of always choosing the longer answer"),
    Metric("eval/margin", "score", "mean difference of the two scores of a pair"),
    Metric("eval/pairs", "", "how many pairs were held out"),
)


def batch_loss(engine, ranked: list[Ranked], config, device) -> torch.Tensor:
    """Summed loss of the prompts in `ranked` (each weighs 1)."""
    winners, losers, weights = losses.ranked_pairs([r.labels for r in ranked])
    margins = None
    if config.score_margin:
        labels = torch.tensor([label for r in ranked for label in r.labels], device=device)
        margins = config.score_margin * (labels[winners] - labels[losers])
    return losses.ranking_loss(
        scorer.group_scores(engine, [r.answers for r in ranked], device),
        winners,
        losers,
        weights,
        margins=margins,
        label_smoothing=config.label_smoothing,
        centring=config.centring,
    )


def score_all(engine, ranked: list[Ranked], config, device) -> list[list[float]]:
    """Scores of every answer, on every rank, in the order of `ranked`."""
    limits = config.micro_batch_size, config.micro_batch_tokens
    return scorer.score_groups(engine, [r.answers for r in ranked], device, *limits)


def evaluate(engine, ranked, config, device) -> dict[str, float]:
    """Accuracy, its 95 % interval by prompt and mean margin on held-out pairs; beside it the longer
    answer's."""
    from utils.intervals import ranking_accuracy

    labels, lengths, prompts = zip(
        *((r.labels, r.characters, r.prompt) for r in ranked), strict=True
    )
    scores = score_all(engine, ranked, config, device)
    measured = ranking_accuracy(labels, scores, lengths, prompts)
    return {f"eval/{name}": value for name, value in measured.items()}


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
    report.expect(steps)
    run_config.save(config, config.output_dir, process_group.world_size(), process_group.is_main())

    parts = {".": checkpoint.ModelFolder(engine.module.classifier, tokenizer, config)}
    save = functools.partial(checkpoint.save, config.output_dir, parts)

    before = run.once("before", lambda: evaluate(engine, held, config, device))
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
            sums = metrics.Sums(device)
            budget = config.micro_batch_size, config.micro_batch_tokens
            for micro in comparisons.deal(chosen, train, *budget):
                loss = batch_loss(engine, [train[i] for i in micro], config, device)
                engine.backward(loss, normaliser=len(chosen))
                sums.add({"loss": loss})
            measured = engine.step()
            bad_steps.note(measured["skipped"])
            measured |= sums.over(len(chosen))
            measured["seconds"] = time.time() - tick
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                measured |= evaluate(engine, held, config, device)
            report.log(
                step + 1,
                measured,
                show=("loss", "eval/accuracy", "learning_rate", "grad_norm", "seconds"),
            )
            run.after_step(step + 1, measured)

    # Evaluate, set the bias so that demonstrations score 0 on average, save.
    after = evaluate(engine, held, config, device)
    shown = score_all(engine, demonstrations, config, device)
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
