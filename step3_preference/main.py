"""Step 3 without a reward model: the policy learns from comparisons of answers themselves.

deepspeed step3_preference/main.py --model_name_or_path SFT --preference_data DATA \\
    --output_dir FOLDER
"""

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step3_preference import logprobs, losses
from step3_preference.checks import SelfCheck
from step3_preference.config import PreferenceConfig
from step3_preference.gold import HeldOutAnswers
from step3_preference.losses import LOSSES, Logprobs
from step3_preference.watch import Watch
from utils import metrics
from utils.checkpoints.model_folder import ModelFolder
from utils.data import batches, comparisons, preferences
from utils.data.loading import DataSettings
from utils.data.preferences import Answers
from utils.distributed import program, zero
from utils.metrics import Metric
from utils.models import freezing, language_model, value_heads
from utils.models.adapters import Lora
from utils.models.ema import EMA
from utils.models.freezing import Freezing
from utils.models.loading import Loading
from utils.run import Run
from utils.settings import command_line

SHOWN = ("loss", "accuracy", "margin", "eval/accuracy", "eval/verifier", "eval/judge")
SHOWN += ("learning_rate", "grad_norm", "seconds")

REWARD = (
    "implied reward β·s of the {} answers, s as the loss has it (a log-ratio for dpo, Q for ilql)"
)
metrics.register(
    "step 3, preferences",
    Metric("loss", "", "of `--loss`, mean over rows (of `ilql` over tokens)"),
    Metric("accuracy", "share", "pairs whose better answer has the higher implied reward"),
    Metric("margin", "", "implied reward of the chosen less that of the rejected answers"),
    Metric("chosen_reward", "", REWARD.format("better")),
    Metric("rejected_reward", "", REWARD.format("worse")),
    Metric("chosen_logprob", "nats an answer", "log-probability of the better answers"),
    Metric("rejected_logprob", "nats an answer", "of the worse answers"),
    Metric("chosen_length", "tokens", "mean length of the better answers, stop token included"),
    Metric("rejected_length", "tokens", "of the worse answers"),
    Metric(
        "kl",
        "nats an answer",
        "KTO's z0: the KL to the reference by answers to other prompts, at least 0",
    ),
    Metric("ilql_q_loss", "", "ILQL's: of both Q heads, mean over the answers' tokens"),
    Metric("ilql_v_loss", "", "of V, the expectile's"),
    Metric("ilql_cql_loss", "", "what keeps Q of other tokens low, times its weight"),
    Metric("ilql_lm_loss", "", "of the language model, times its weight"),
    Metric(
        "ilql_q",
        "",
        "the lesser Q of the targets, of the answers' tokens; rewards are −1 to 1",
        "beyond 1 or −1: the values run away; lower `--learning_rate`",
    ),
    Metric("ilql_v", "", "V before these tokens"),
    Metric("eval/accuracy_low", "share", "lower end of its 95 % interval, by prompt"),
    Metric("eval/accuracy_high", "share", "upper end"),
    Metric("eval/accuracy_longer_answer", "share", "accuracy of always choosing the longer answer"),
    Metric(
        "eval/prefers_longer",
        "share",
        "pairs of different length whose longer answer has the higher implied reward",
        "well above `eval/accuracy_longer_answer`: answers will grow",
    ),
    Metric("eval/pairs", "", "how many pairs were held out"),
    Metric(
        "eval/verifier",
        "share",
        "of the policy's answers to held-out `--prompt_data`, by the embedded task's program",
        "falls while `eval/margin` rises: over-optimised",
    ),
    Metric(
        "eval/judge",
        "score",
        "mean score of these answers by `--judge_model`",
        "falls while `eval/margin` rises: over-optimised",
    ),
    Metric("eval/judge_std", "score", "its standard deviation over the answers"),
    Metric(
        "eval/kl_k1", "nats a response", "log p − log q of these answers, mean: KL to the reference"
    ),
    Metric(
        "eval/response_length",
        "tokens",
        "mean length of these answers, stop token included",
        "grows from evaluation to evaluation: the better answers are longer (`chosen_length`), or "
        "fewer answers end (`eval/eos_share`)",
    ),
    Metric(
        "eval/eos_share",
        "share",
        "of these answers, that ended with the stop token",
        "near 0: raise `--max_response_length`, or `--sft_coef`",
    ),
)


class Rows:
    """The rows of a run, training or held out, and what the reference says of them.

    rows: a View of Answers. reference: its log-probabilities of them, by row; 0 where the loss has
    no reference. mismatched, and mismatched_reference: the same of KTO's answers to other prompts,
    where the loss is KTO. of_answers: what is measured of answers.
    """

    def __init__(self, rows, name: str, config):
        self.rows, self.name = rows, name
        mismatched = LOSSES[config.loss].reads_mismatched
        self.mismatched = preferences.Mismatched(rows, config.max_length) if mismatched else ()
        self.of_answers = logprobs.of_answers
        if config.loss == "ilql":
            self.of_answers = functools.partial(logprobs.with_values, how=config.how())

    def views(self) -> dict[str, Sequence[Answers]]:
        found = {self.name: self.rows, f"{self.name}_mismatched": self.mismatched}
        return {name: rows for name, rows in found.items() if rows}

    def refer(self, numbers: dict[str, list]) -> None:
        """numbers: of logprobs.of_reference; empty for a loss without one."""
        nothing = [[0.0] * len(row.labels) for row in self.rows] if not numbers else None
        self.reference = numbers.get(self.name, nothing)
        self.mismatched_reference = numbers.get(f"{self.name}_mismatched", ())

    def lengths(self, chosen: Sequence[int]) -> torch.Tensor:
        """(N,) fp64 tokens of the answers of some rows laid end to end."""
        some = [self.rows[i] for i in chosen]
        lengths = [len(a) - b for row in some for a, b in zip(row.answers, row.begins, strict=True)]
        return torch.tensor(lengths, dtype=torch.float64)

    def of(self, chosen: Sequence[int], policy: torch.Tensor) -> tuple[Logprobs, list]:
        """(log-probabilities of the answers of some rows laid end to end, their labels by row).
        policy: (N,), or what logprobs.with_values gives."""
        kind, terms = dict(dtype=torch.float64, device=policy.device), None
        if policy.dim() > 1:
            policy, terms = policy[:, 0], policy[:, 1:]
        reference = torch.tensor([x for i in chosen for x in self.reference[i]], **kind)
        x = Logprobs(policy, reference, self.lengths(chosen).to(policy.device), terms)
        return x, [self.rows[i].labels for i in chosen]

    @torch.no_grad()
    def z0(self, engine, chosen: Sequence[int], budget, device) -> float:
        """KTO's estimate of the KL to the reference, in nats an answer and at least 0: the mean
        log-ratio of mismatched answers to the prompts of `chosen`, over all ranks."""
        if not self.mismatched:
            return 0.0
        sums = metrics.Sums(device)
        for micro in comparisons.deal(chosen, self.mismatched, *budget):
            # A rank whose rows have run out goes forward with the others, as ZeRO-3 needs.
            some = [self.mismatched[i] for i in micro or [0]]
            policy = logprobs.of_answers(engine, some, device).sum()
            reference = sum(self.mismatched_reference[i][0] for i in micro)
            sums.add({"kl": (policy - reference) * bool(micro)})
        return max(0.0, sums.over(len(chosen))["kl"])


def prefers_longer(scores, lengths) -> float:
    """Share of pairs of one prompt's answers, of different length, whose longer answer has the
    higher score; ties count half."""
    right = [
        (s > t) + (s == t) / 2
        for row, sizes in zip(scores, lengths, strict=True)
        for s, n in zip(row, sizes, strict=True)
        for t, m in zip(row, sizes, strict=True)
        if n > m
    ]
    return sum(right) / len(right) if right else 0.5


def evaluate(engine, held: Rows, config, device) -> dict[str, float]:
    """Metrics of the held-out rows; the accuracy of pairs with its 95 % interval by prompt."""
    from utils.confidence import ranking_accuracy

    budget = config.micro_batch_size, config.micro_batch_tokens
    every, loss = range(len(held.rows)), LOSSES[config.loss]
    found = logprobs.of_all(engine, held.rows, device, budget, held.of_answers)
    policy = [x for row in found for x in row]
    x, labels = held.of(every, torch.tensor(policy, dtype=torch.float64))
    z0 = held.z0(engine, every, budget, device)
    _, sums = losses.batch_loss(loss, x, labels, config.how(), z0)
    measured = losses.means({name: float(value) for name, value in sums.items()})
    measured |= {"kl": z0} if held.mismatched else {}
    scores = [part.tolist() for part in loss.score(x).split(list(map(len, labels)))]
    rows = list(held.rows)
    if any(len(row) > 1 for row in labels):
        lengths, prompts = [row.characters for row in rows], [row.prompt for row in rows]
        measured |= ranking_accuracy(labels, scores, lengths, prompts) | {
            "margin": measured["margin"]
        }
        measured["prefers_longer"] = prefers_longer(scores, lengths)
    return {f"eval/{name}": value for name, value in measured.items()}


def result_of(before: dict, after: dict) -> dict:
    """What result.json says of the evaluations before and after training."""
    result = {f"{k.removeprefix('eval/')}_before": v for k, v in before.items()}
    return result | {f"{k.removeprefix('eval/')}_after": v for k, v in after.items()}


def told(result: dict) -> str:
    """The result in words; single answers have no pairs, and so no accuracy."""
    accuracy = ""
    if "pairs_after" in result:
        accuracy = (
            f"accuracy {result['accuracy_after']:.3f} (95 % by prompt: "
            f"{result['accuracy_low_after']:.3f} to {result['accuracy_high_after']:.3f}, "
            f"{result['pairs_after']} pairs), "
        )
    loss = f"{result['loss_before']:.4f} → {result['loss_after']:.4f}"
    return f"held-out loss {loss}, {accuracy}margin {result['margin_after']:.3f}"


def load_tokenizer(config, run):
    """The model's tokenizer, once all rows are sure to fit into its positions."""
    sampled = (config.max_prompt_length + config.max_response_length) * bool(config.prompt_data)
    if sampled > config.max_length:
        return run.load_tokenizer(sampled, "--max_prompt_length, --max_response_length")
    return run.load_tokenizer(config.max_length, "--max_length")


def load_rows(config, run, tokenizer) -> tuple[Rows, Rows]:
    """The comparisons to train on, and those that are held out."""
    views = preferences.load(
        config.preference_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_length,
        config.pairs,
        LOSSES[config.loss].takes_single,
        run.say,
        config.pair_margin,
    )
    train, held = (Rows(v, n, config) for v, n in zip(views, ("train", "held"), strict=True))
    return train, held


def build(config, run, tokenizer, steps: int):
    """The engine of the model, the average of its weights and, of ILQL, the targets of its Q heads;
    None for what the run does without."""
    how, loading = config.how(), dict(dtype=run.dtype, zero_stage=config.zero_stage)
    model = language_model.load(
        config.pick(Loading),
        config.model_name_or_path,
        tokenizer=tokenizer,
        lora=config.pick(Lora),
        ilql_beta=how.beta if config.loss == "ilql" else None,
        **loading,
    )
    run.say(freezing.apply(model, config.pick(Freezing)))
    engine = zero.TrainEngine(model, config.pick(zero.Training), total_steps=steps, **loading)
    ema = EMA(engine.module, config.ema_decay) if config.ema_decay else None
    targets = None
    if config.loss == "ilql":
        heads = engine.module.get_output_embeddings().value_heads
        targets = value_heads.Targets(heads, how.target_rate)
    return engine, ema, targets


def main() -> None:
    config = command_line.parse(PreferenceConfig, __doc__)
    run = Run(config)
    device, method, how = run.device, LOSSES[config.loss], config.how()

    # Data, the reference's log-probabilities, model, engine.
    tokenizer = load_tokenizer(config, run)
    train, held = load_rows(config, run, tokenizer)
    size, count = config.global_batch_size, len(train.rows)
    steps = config.max_steps or batches.steps_of(config.epochs, size, count)
    run.announce(f"step 3 by preferences, {config.loss}: {steps} steps", steps)
    numbers = {}
    if method.reads_reference:
        numbers = logprobs.of_reference(config, train.views() | held.views(), tokenizer, run)
    train.refer(numbers)
    held.refer(numbers)
    engine, ema, targets = build(config, run, tokenizer, steps)
    budget = config.micro_batch_size, config.micro_batch_tokens
    own = HeldOutAnswers(config, tokenizer, run, engine) if config.prompt_data else None

    def measure(moment: str) -> dict[str, float]:
        found = evaluate(engine, held, config, device)
        return found | (own.measure(moment) if own else {})

    folders = {".": ModelFolder(engine.module, tokenizer, run.settings)}
    if ema is not None:
        folders["ema"] = ModelFolder(engine.module, tokenizer, run.settings, ema)
    followers = {n: x for n, x in {"average": ema, "targets": targets}.items() if x is not None}
    engines = {"model": engine, **followers}
    watch = Watch(config, run.say)
    done = run.restore(folders, engines, train.rows.fingerprint(), watch=watch)
    if targets is not None:
        targets.copy()  # those of the checkpoint
    check = SelfCheck(config, run, tokenizer, engine, train, held)
    check.before_the_first_step(done)
    before = run.once("before", lambda: measure("before"))
    after = {}
    if run.resumed_from is None:
        watch.warn(0, before)
        if own:
            run.report.log(0, before, SHOWN)

    with run:
        for step in range(done, steps):
            tick = time.time()
            chosen = batches.rows_of_step(step, size, count, config.seed)
            z0 = train.z0(engine, chosen, budget, device)
            labels = [train.rows[i].labels for i in chosen]
            normaliser = float(method.count(labels, train.lengths(chosen)))  # of all ranks
            sums = metrics.Sums(device)
            for micro in comparisons.deal(chosen, train.rows, *budget):
                policy = train.of_answers(engine, [train.rows[i] for i in micro], device)
                loss, stats = losses.batch_loss(method, *train.of(micro, policy), how, z0)
                engine.backward(loss, normaliser)
                sums.add(stats)
            measured = engine.step()
            for follower in followers.values():
                follower.update()
            run.bad_steps.note(measured["skipped"])
            measured |= losses.means(sums.over(1)) | ({"kl": z0} if train.mismatched else {})
            measured["seconds"] = time.time() - tick
            check.after_a_step(chosen, z0, measured)
            if step + 1 == steps or (config.eval_every and (step + 1) % config.eval_every == 0):
                after = measure("after")
                measured |= after
            watch.warn(step + 1, measured)
            run.after_step(step + 1, measured, SHOWN)

    after = after or measure("after")  # of a run that is resumed behind its last step
    run.save()
    result = result_of(before, after) | {"steps": steps}
    run.finish(result, f"{told(result)}; saved {config.output_dir}")


if __name__ == "__main__":
    program.run(main)
