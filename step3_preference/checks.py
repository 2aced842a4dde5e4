"""What must hold before the first optimizer step and after it, as the worst failures are silent.

A resumed run may be on another machine, with other libraries or ranks, so it is checked too.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from step3_preference import logprobs, losses
from step3_preference.losses import LOSSES
from utils import verdicts
from utils.data.preferences import Answers
from utils.verdicts import Doubt, Fault

LOOKED_AT = 64  # rows of each part
TOLERANCE = {"fp32": 5e-5, "fp16": 4e-3, "bf16": 2e-2}  # nats a token, that rounding explains
BEFORE: dict[str, Callable] = {}
AT_START: dict[str, Callable] = {}  # true of untrained weights alone: not of a resumed run
AFTER: dict[str, Callable] = {}


def check(when: dict[str, Callable], name: str) -> Callable:
    """Decorator: registers a check in `when` under the name that it is reported by."""

    def register(function: Callable) -> Callable:
        when[name] = function
        return function

    return register


@dataclass
class SelfCheck:
    """The run as its checks see it. train, held: main.Rows. first: (rows of the first optimizer
    step, KTO's z0, its loss), once it was made."""

    config: object
    run: object
    tokenizer: object
    engine: object
    train: object
    held: object
    first: tuple = field(default=(), init=False)
    digest: str = field(default="", init=False)

    def before_the_first_step(self, done: int) -> None:
        """done: steps that the run goes on from. Raises StopRun with every fault, where
        --self_check is on."""
        self.digest = self._digest()
        when = f"resumed at step {done + 1}" if done else "before the first step"
        self._run(BEFORE | ({} if done else AT_START), when)

    def after_a_step(self, chosen: Sequence[int], z0: float, measured: dict[str, float]) -> None:
        """The second part, at the first call. chosen: the rows of the step."""
        if not self.first:
            self.first = chosen, z0, measured["loss"]
            self._run(AFTER, "after the first step")

    def _run(self, checks: dict, when: str) -> None:
        if self.config.self_check != "off":
            faults = verdicts.run(checks, self, when, self.run.say)
            if self.config.self_check == "on":
                verdicts.stop_at(faults)

    def _digest(self) -> str:
        """Of all numbers of the reference."""
        parts = [self.train.reference, self.held.reference]
        parts += [self.train.mismatched_reference, self.held.mismatched_reference]
        flat = np.array([x for part in parts for row in part for x in row])
        return hashlib.sha256(flat.tobytes()).hexdigest()

    def looked_at(self) -> list[tuple[object, Answers]]:
        """(what was read, its tokens) of some rows of either part."""
        views = self.train.rows, self.held.rows
        return [(v.item(i), v[i]) for v in views for i in range(min(LOOKED_AT, len(v)))]

    def policy_of(self, part, chosen: Sequence[int]) -> losses.Logprobs:
        """Log-probabilities of some of its rows by the weights of now."""
        budget = self.config.micro_batch_size, self.config.micro_batch_tokens
        rows = [part.rows[i] for i in chosen]
        found = logprobs.of_all(self.engine, rows, self.run.device, budget, part.of_answers)
        return part.of(chosen, torch.tensor([x for row in found for x in row]).double())[0]


@check(BEFORE, "answers share their prompt")
def answers_share_their_prompt(given: SelfCheck) -> str:
    for item, row in given.looked_at():
        prompts = {tuple(ids[:b]) for ids, b in zip(row.answers, row.begins, strict=True)}
        if len(prompts) > 1 or min(row.begins) < 1:
            raise Fault(
                f"{item.where}: its answers stand behind {len(prompts)} different prompts, of "
                f"{sorted(row.begins)} tokens; the chat template rewrites earlier turns by what "
                "follows, so give single turns, or another template"
            )
    return f"of {len(given.looked_at())} rows looked at all"


@check(BEFORE, "stop token")
def answers_stop(given: SelfCheck) -> str:
    """It ends every answer that ended by itself, and is not the pad."""
    tokenizer = given.tokenizer
    if tokenizer.eos_token_id == tokenizer.pad_token_id:
        raise Fault(
            f"pad and stop token are both {tokenizer.eos_token!r}; give it a pad of its own"
        )
    ended = total = 0
    for item, row in given.looked_at():
        stops = [ids[-1] == tokenizer.eos_token_id for ids in row.answers]
        if all(item.finished) and not all(stops):
            last = tokenizer.decode(row.answers[stops.index(False)][-1:])
            raise Fault(
                f"{item.where}: an answer ends with {last!r} and not with {tokenizer.eos_token!r}: "
                "the policy would not learn to stop"
            )
        ended, total = ended + sum(stops), total + len(stops)
    return f"{ended} of {total} answers end with {tokenizer.eos_token!r}, the others were cut"


@check(BEFORE, "label order")
def labels_are_in_order(given: SelfCheck) -> str:
    """The answer that is trained as the best is the one that the row calls the best."""
    compared = 0
    for item, row in given.looked_at():
        if len(row.labels) < 2:
            continue
        best, worst = (item.responses[item.scores.index(pick(item.scores))] for pick in (max, min))
        k = row.labels.index(max(row.labels))
        tokens = row.answers[k][row.begins[k] :]
        text = given.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if text == worst.strip() != best.strip():
            raise Fault(
                f"{item.where}: {text[:80]!r} is trained as its best answer, and the row scores "
                f"{best[:80]!r} above it; see utils/data/preferences.py"
            )
        compared += 1
    return f"of {compared} comparisons the best answer is the row's best"


@check(BEFORE, "data")
def parts_are_apart(given: SelfCheck) -> str:
    """Training and held-out rows share no prompt, and few answers are cut."""
    train, held = (set(part.rows.numbers("prompt").tolist()) for part in (given.train, given.held))
    shared, counts = len(train & held), given.train.rows.counts()
    cut = counts.cut_answers / max(counts.kept, 1)
    text = (
        f"{len(train)} prompts to train on and {len(held)} held out, {shared} of them in both; "
        f"{cut:.1%} of the answers are cut to --max_length {given.config.max_length}"
    )
    if shared > 0.05 * len(held):
        raise Fault(f"{text}: evaluation would be of what was trained on; name other held-out data")
    if shared or cut > 0.2:
        raise Doubt(f"{text}; raise --max_length, or look at the data")
    return text


@check(BEFORE, "length")
def better_is_not_longer(given: SelfCheck) -> str:
    longer = [
        (n > m) + (n == m) / 2
        for _, row in given.looked_at()
        for n, a in zip(row.characters, row.labels, strict=True)
        for m, b in zip(row.characters, row.labels, strict=True)
        if a > b
    ]
    if not longer:
        return "no comparisons"
    share = sum(longer) / len(longer)
    text = f"the better answer is the longer one in {share:.0%} of {len(longer)} pairs"
    if share > 0.7 and LOSSES[given.config.loss].score in (losses.ratio, losses.logprob):
        raise Doubt(
            f"{text}, and --loss {given.config.loss} sums over tokens: answers will grow; "
            "--loss dpo_norm or simpo takes means over tokens"
        )
    return text


@check(AT_START, "margins 0 at the start")
def margins_are_nothing(given: SelfCheck) -> str:
    """The policy is the reference; so the numbers that were computed or read are right too."""
    config = given.config
    if not LOSSES[config.loss].reads_reference:
        return f"--loss {config.loss} has no reference"
    if config.reference_model not in ("", config.model_name_or_path):
        return f"the reference is another model, {config.reference_model}"
    x = given.policy_of(given.held, range(min(LOOKED_AT, len(given.held.rows))))
    gaps = ((x.policy - x.reference) / x.lengths).abs()
    tolerance = TOLERANCE[given.run.dtype]
    if not gaps.mean() <= tolerance or not gaps.max() <= 10 * tolerance:  # nan fails too
        raise Fault(
            f"policy and reference differ by {gaps.mean():.2g} nats a token on average and "
            f"{gaps.max():.2g} at most (allowed {tolerance:.0e} and {10 * tolerance:.0e}), though "
            "both are the start model: other rows, dropout, or a reference file of another model "
            f"({config.output_dir}/{logprobs.FILE}; delete it, it is made again)"
        )
    return f"policy and reference within {gaps.max():.1e} nats a token on {len(gaps)} answers"


@check(AFTER, "reference unchanged")
def reference_is_unchanged(given: SelfCheck) -> str:
    if given._digest() != given.digest:
        raise Fault("the reference's log-probabilities changed in the first step; they are frozen")
    return "all its log-probabilities are as before"


@check(AFTER, "the first step")
def first_step_lowers_its_loss(given: SelfCheck) -> str:
    """A gradient of the wrong sign or of other rows raises the loss of the rows stepped on."""
    chosen, z0, before = given.first
    x = given.policy_of(given.train, chosen)
    labels, loss = [given.train.rows[i].labels for i in chosen], LOSSES[given.config.loss]
    _, sums = losses.batch_loss(loss, x, labels, given.config.how(), z0)
    now = losses.means({name: float(value) for name, value in sums.items()})["loss"]
    text = f"loss of its rows {before:.5f} → {now:.5f}"
    if not now <= before + TOLERANCE[given.run.dtype]:
        raise Doubt(f"{text}: it rose; is --learning_rate {given.config.learning_rate:g} too high?")
    return text
