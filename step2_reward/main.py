"""Step 2: the reward model. K answers a prompt go forward once, all their pairs are ranked.

deepspeed step2_reward/main.py --model_name_or_path SFT --preference_data DATA --output_dir FOLDER
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step2_reward import loss as losses
from step2_reward.config import RewardConfig
from utils import metrics
from utils.checkpoints.model_folder import ModelFolder
from utils.data import batches, comparisons
from utils.data.comparisons import Ranked
from utils.data.loading import DataSettings
from utils.distributed import program, zero
from utils.metrics import Metric
from utils.models import freezing, scalar_model, scorer
from utils.models.adapters import Lora
from utils.models.freezing import Freezing
from utils.models.loading import Loading
from utils.run import Run
from utils.settings import command_line

SHOWN = ("loss", "eval/accuracy", "learning_rate", "grad_norm", "seconds")

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
    winners, losers, weights = comparisons.ranked_pairs([r.labels for r in ranked])
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


def evaluate(ranked: list[Ranked], score) -> dict[str, float]:
    """Accuracy, its 95 % interval by prompt and mean margin on held-out pairs; beside it the longer
    answer's."""
    from utils.confidence import ranking_accuracy

    scores = score([r.answers for r in ranked])
    labels, lengths = [r.labels for r in ranked], [r.characters for r in ranked]
    measured = ranking_accuracy(labels, scores, lengths, [r.prompt for r in ranked])
    return {f"eval/{name}": value for name, value in measured.items()}


def main() -> None:
    config = command_line.parse(RewardConfig, __doc__)
    run = Run(config)
    device = run.device

    # Data, model, engine.
    tokenizer = run.load_tokenizer(config.max_length, "--max_length")
    train, held, demonstrations = comparisons.load(
        config.preference_data,
        config.sft_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        run.say,
    )
    rows = config.global_batch_size
    steps = config.max_steps or batches.steps_of(config.epochs, rows, len(train))
    run.announce(f"step 2, reward model: {steps} steps", steps)
    loading = dict(dtype=run.dtype, zero_stage=config.zero_stage)
    model = scalar_model.load(
        config.pick(Loading),
        config.model_name_or_path,
        tokenizer=tokenizer,
        head="normal",
        lora=config.pick(Lora),
        **loading,
    )
    run.say(freezing.apply(model, config.pick(Freezing)))
    engine = zero.TrainEngine(model, config.pick(zero.Training), total_steps=steps, **loading)
    budget = config.micro_batch_size, config.micro_batch_tokens

    def score(groups: list) -> list[list[float]]:
        return scorer.score_groups(engine, groups, device, *budget)

    def measure() -> dict[str, float]:
        return evaluate(held, score)

    folder = ModelFolder(engine.module.classifier, tokenizer, run.settings)
    done = run.restore({".": folder}, {"model": engine}, train.fingerprint())
    before = run.once("before", measure)
    run.say(
        f"held-out accuracy before: {before['eval/accuracy']:.3f}, always the longer "
        f"answer: {before['eval/accuracy_longer_answer']:.3f}"
    )

    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(step, rows, len(train), config.seed)
            sums = metrics.Sums(device)
            for micro in comparisons.deal(chosen, train, *budget):
                loss = batch_loss(engine, [train[i] for i in micro], config, device)
                engine.backward(loss, normaliser=len(chosen))
                sums.add({"loss": loss})
            measured = engine.step()
            run.bad_steps.note(measured["skipped"])
            measured |= sums.over(len(chosen))
            measured["seconds"] = time.time() - tick
            if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < steps:
                measured |= measure()
            run.after_step(step + 1, measured, SHOWN)

    # The bias is set so that demonstrations score 0 on average.
    after = measure()
    shown = score([r.answers for r in demonstrations])
    bias = engine.module.bias + sum(s for group in shown for s in group) / len(shown)
    engine.module.set_bias(bias)
    run.save()
    result = {k.removeprefix("eval/"): v for k, v in after.items()}
    result |= {"accuracy_before": before["eval/accuracy"], "bias": bias, "steps": steps}
    run.finish(
        result,
        f"held-out accuracy {result['accuracy']:.3f} (95 % by prompt: {result['accuracy_low']:.3f} "
        f"to {result['accuracy_high']:.3f}, {result['pairs']} pairs), always the longer answer "
        f"{result['accuracy_longer_answer']:.3f}, mean margin {result['margin']:.3f}, bias "
        f"{bias:.3f}; saved {config.output_dir}",
    )


if __name__ == "__main__":
    program.run(main)
