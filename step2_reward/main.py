"""Step 2: the reward model. K answers a prompt go forward once, all their pairs are ranked.

deepspeed step2_reward/main.py --model_name_or_path SFT --preference_data DATA --output_dir FOLDER
"""

import functools
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import pyarrow as pa
import torch

from step2_reward import loss as losses
from step2_reward.config import RewardConfig
from utils import report as reporting
from utils.checkpoints import model_folder as checkpoint
from utils.checkpoints import resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.data import (
    batches,
    chat_template,
    fitting,
    instructions,
    preferences,
    row_cache,
    row_tables,
    rows,
    splits,
)
from utils.distributed import host_memory, process_group, shared_files, zero
from utils.kernels import packing
from utils.kernels.cpu_products import PRODUCTS
from utils.models import language_model, scalar_model
from utils.planner import plan as planner
from utils.seeding import seed_everything
from utils.settings import command_line
from utils.settings.run_config import columns_of


@dataclass(frozen=True)
class Ranked:
    """One prompt's K answers as token rows, how good each is, and its length in characters."""

    answers: tuple[list[int], ...]
    labels: tuple[float, ...]
    characters: tuple[int, ...]
    prompt: float = 0.0  # a hash of its text, by which pairs are told apart


RANKED = row_tables.Layout(
    preferences.Comparison,
    {
        "answers": pa.list_(row_tables.TOKENS),
        "labels": pa.list_(pa.float64()),
        "characters": pa.list_(pa.int64()),
        "prompt": pa.float64(),
    },
    lambda found, _: Ranked(
        tuple(found["answers"]), tuple(found["labels"]), tuple(found["characters"]), found["prompt"]
    ),
)


def encode(
    tokenizer, comparisons, max_length: int, long_prompts: str, bad
) -> tuple[list[Ranked], batches.Counts]:
    """Comparisons → (Ranked, Counts of answers). All answers of a comparison follow the same prompt
    tokens, cut so that the longest one fits; one that is too long even so keeps its stop token,
    where its score is read, for it is ranked as the whole answer. One that was cut before it was
    ranked has none. Answers that the template cannot render go to `bad`."""
    counts, encoded = batches.Counts(), []
    for row in comparisons:
        try:
            answers, fate = fitting.encode_answers(
                tokenizer, row.prompt, row.responses, max_length, long_prompts
            )
        except chat_template.TemplateError as error:
            bad.add(row.where, str(error), list(row.responses))
            continue
        counts += fate
        if answers is None:
            continue
        # An answer that was cut when it was sampled has no stop token in PPO, and so none here.
        answers = [a if done else a[:-1] for a, done in zip(answers, row.finished, strict=True)]
        characters = tuple(len(t) for t in row.responses)
        encoded.append(Ranked(tuple(answers), row.scores, characters, splits.place(row, "")))
    return encoded, counts


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


def deal(chosen, ranked: list[Ranked], config) -> list[list[int]]:
    """This rank's micro-batches of rows `chosen` of `ranked`."""
    lengths = {i: max(map(len, ranked[i].answers)) for i in chosen}
    counts = {i: len(ranked[i].answers) for i in chosen}
    return batches.deal(chosen, lengths, *batches.shares(config), counts)


@torch.no_grad()
def score_all(engine, ranked: list[Ranked], config, pad_id: int, device) -> list[list[float]]:
    """Scores of every answer, on every rank, in the order of `ranked`."""
    engine.module.eval()
    found = {}
    for chosen in deal(range(len(ranked)), ranked, config):
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


def load_data(config, tokenizer, report):
    """(training comparisons, held-out comparisons, held-out demonstrations), tokenised."""
    bad = rows.BadRows(config.max_bad_rows, f"{config.output_dir}/bad_rows.jsonl")
    columns = columns_of(config.columns)
    load = row_cache.Reader(
        functools.partial(preferences.load_comparisons, schema=config.data_schema, columns=columns),
        functools.partial(
            encode, tokenizer, max_length=config.max_length, long_prompts=config.long_prompts
        ),
        RANKED,
        config,
        bad,
    )
    train, held = splits.train_and_held_out(
        config.preference_data, load, preferences.PREFERENCE_SPLITS["eval"], config, step=2, bad=bad
    )
    demonstrations = []
    if config.sft_data:
        _, shown = splits.train_and_held_out(
            config.sft_data,
            row_cache.Reader(
                functools.partial(instructions.load_conversations, columns=columns),
                functools.partial(row_tables.as_read),
                row_tables.CONVERSATIONS,
                config,
                bad,
            ),
            instructions.SFT_SPLITS["eval"],
            splits.unweighted(config),
            step=1,
            bad=bad,
        )
        encoded, _ = batches.encode_conversations(
            tokenizer, shown, config.max_length, config.long_prompts, "cut", bad
        )
        demonstrations = [Ranked((e.ids,), (0.0,), (0,)) for e in encoded]
    dropped = [part.counts().dropped for part in (train, held)]
    train, held = train.usable(), held.usable()
    ties = len(train) + len(held)
    train, held = (part.where("labels", lambda v: len(set(v)) > 1) for part in (train, held))
    ties -= len(train) + len(held)
    report.say(
        f"{len(train)} comparisons to train on, {len(held)} held out; {ties} left out, whose "
        "answers are all equally good"
    )
    bad.finish("preference_data")
    if not train or not held:
        raise SystemExit("no comparison to train or evaluate on; give more --preference_data")
    told = zip((train, held), dropped, ("answers to train on", "held-out answers"), strict=True)
    for part, lost, name in told:
        report.say((part.counts() + batches.Counts(dropped=lost)).line(name))
    if not demonstrations:
        best = [max(range(len(r.labels)), key=lambda k, r=r: r.labels[k]) for r in held]
        demonstrations = [
            Ranked((r.answers[k],), (0.0,), (0,)) for r, k in zip(held, best, strict=True)
        ]
    return train, held, demonstrations


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
    train, held, demonstrations = load_data(config, tokenizer, report)
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
    config = command_line.parse(RewardConfig, __doc__)
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
    if process_group.is_main():
        command_line.save(config, config.output_dir, process_group.world_size())

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
            for micro in deal(chosen, train, config):
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
