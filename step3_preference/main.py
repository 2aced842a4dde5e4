"""Step 3 without a reward model: the policy learns from comparisons of answers themselves.

deepspeed step3_preference/main.py --model_name_or_path SFT --preference_data DATA \\
    --output_dir FOLDER
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step3_preference import logprobs, losses
from step3_preference.config import PreferenceConfig
from step3_preference.losses import LOSSES, Logprobs
from utils import metrics
from utils.checkpoints.model_folder import ModelFolder
from utils.data import batches, comparisons, preferences
from utils.data.loading import DataSettings
from utils.data.preferences import Answers
from utils.distributed import program, zero
from utils.metrics import Metric
from utils.models import language_model
from utils.models.loading import Loading
from utils.run import Run
from utils.settings import command_line

SHOWN = ("loss", "accuracy", "margin", "eval/accuracy", "learning_rate", "grad_norm", "seconds")

REWARD = "implied reward β·s of the {} answers, s as the loss has it (a log-ratio for dpo)"
metrics.register(
    "step 3, preferences",
    Metric("loss", "", "of `--loss`, mean over rows"),
    Metric("accuracy", "share", "pairs whose better answer has the higher implied reward"),
    Metric("margin", "", "implied reward of the chosen less that of the rejected answers"),
    Metric("chosen_reward", "", REWARD.format("better")),
    Metric("rejected_reward", "", REWARD.format("worse")),
    Metric("chosen_logprob", "nats an answer", "log-probability of the better answers"),
    Metric("rejected_logprob", "nats an answer", "of the worse answers"),
    Metric("chosen_length", "tokens", "mean length of the better answers, stop token included"),
    Metric("rejected_length", "tokens", "of the worse answers"),
    Metric("eval/accuracy_low", "share", "lower end of its 95 % interval, by prompt"),
    Metric("eval/accuracy_high", "share", "upper end"),
    Metric("eval/accuracy_longer_answer", "share", "accuracy of always choosing the longer answer"),
    Metric("eval/pairs", "", "how many pairs were held out"),
)


def numbers(policy: torch.Tensor, reference: list[list[float]], rows: Sequence[Answers]):
    """Logprobs of the answers of some rows laid end to end. policy: (N,); reference: by row."""
    kind = dict(dtype=torch.float64, device=policy.device)
    lengths = [len(a) - b for row in rows for a, b in zip(row.answers, row.begins, strict=True)]
    return Logprobs(
        policy,
        torch.tensor([x for row in reference for x in row], **kind),
        torch.tensor(lengths, **kind),
    )


def evaluate(engine, held, reference, config, device) -> dict[str, float]:
    """Metrics of the held-out rows, accuracy with its 95 % interval by prompt."""
    from utils.confidence import ranking_accuracy

    budget = config.micro_batch_size, config.micro_batch_tokens
    rows = list(held)
    policy = logprobs.of_all(engine, rows, device, budget)
    x = numbers(torch.tensor([p for row in policy for p in row]).double(), reference, rows)
    labels, loss = [row.labels for row in rows], LOSSES[config.loss]
    _, sums = losses.batch_loss(loss, x, labels, config.how())
    measured = losses.means({name: float(value) for name, value in sums.items()})
    scores = iter(loss.score(x).tolist())
    scores = [[next(scores) for _ in row.labels] for row in rows]
    lengths = [row.characters for row in rows]
    ranked = ranking_accuracy(labels, scores, lengths, [row.prompt for row in rows])
    ranked.pop("margin")
    return {f"eval/{name}": value for name, value in (measured | ranked).items()}


def main() -> None:
    config = command_line.parse(PreferenceConfig, __doc__)
    run = Run(config)
    device = run.device

    # Data, the reference's log-probabilities, model, engine.
    tokenizer = run.load_tokenizer(config.max_length, "--max_length")
    train, held = preferences.load(
        config.preference_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        config.pairs,
        run.say,
    )
    rows = config.global_batch_size
    steps = config.max_steps or batches.steps_of(config.epochs, rows, len(train))
    run.announce(f"step 3 by preferences, {config.loss}: {steps} steps", steps)
    method, how = LOSSES[config.loss], config.how()
    if method.reads_reference:
        parts = {"train": train, "held": held}
        reference = logprobs.of_reference(config, parts, tokenizer, run)
    else:
        reference = {
            name: [[0.0] * len(row.labels) for row in part]
            for name, part in (("train", train), ("held", held))
        }
    loading = dict(dtype=run.dtype, zero_stage=config.zero_stage)
    model = language_model.load(
        config.pick(Loading), config.model_name_or_path, tokenizer=tokenizer, **loading
    )
    engine = zero.TrainEngine(model, config.pick(zero.Training), total_steps=steps, **loading)
    budget = config.micro_batch_size, config.micro_batch_tokens

    def measure() -> dict[str, float]:
        return evaluate(engine, held, reference["held"], config, device)

    folder = ModelFolder(engine.module, tokenizer, run.settings)
    done = run.restore({".": folder}, {"model": engine}, train.fingerprint())
    before = run.once("before", measure)

    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(step, rows, len(train), config.seed)
            sums = metrics.Sums(device)
            for micro in comparisons.deal(chosen, train, *budget):
                some = [train[i] for i in micro]
                policy = logprobs.of_answers(engine, some, device)
                x = numbers(policy, [reference["train"][i] for i in micro], some)
                loss, stats = losses.batch_loss(method, x, [row.labels for row in some], how)
                engine.backward(loss, normaliser=len(chosen))
                sums.add(stats)
            measured = engine.step()
            run.bad_steps.note(measured["skipped"])
            measured |= losses.means(sums.over(1))
            measured["seconds"] = time.time() - tick
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                measured |= measure()
            run.after_step(step + 1, measured, SHOWN)

    after = measure()
    run.save()
    result = {f"{k.removeprefix('eval/')}_before": v for k, v in before.items()}
    result |= {f"{k.removeprefix('eval/')}_after": v for k, v in after.items()} | {"steps": steps}
    run.finish(
        result,
        f"held-out loss {result['loss_before']:.4f} → {result['loss_after']:.4f}, accuracy "
        f"{result['accuracy_after']:.3f} (95 % by prompt: {result['accuracy_low_after']:.3f} to "
        f"{result['accuracy_high_after']:.3f}, {result['pairs_after']} pairs), margin "
        f"{result['margin_after']:.3f}; saved {config.output_dir}",
    )


if __name__ == "__main__":
    program.run(main)
