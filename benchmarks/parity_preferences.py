"""TRL 1.12's DPO, IPO, KTO, SimPO, ORPO and more, number by number and update by update against
step3_preference: same weights, same texts, same minibatches. TRL's numbers are read out of its
trainers as they run (trl_trainers.watching).
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import trl_trainers
from benchmarks.parity_methods import Gradients
from benchmarks.parity_rows import (
    CLOSE,
    GRADIENTS_CLOSE,
    WEIGHTS_CLOSE,
    Row,
    compare,
    of_norm,
    weight_row,
)
from step3_preference import logprobs, losses
from step3_preference.config import PreferenceConfig
from utils.data import chat_template, toy_tasks
from utils.data.comparisons import Comparison
from utils.data.preferences import Answers, Encode
from utils.distributed import zero
from utils.models import language_model
from utils.models.loading import Loading

PAIRS, BATCH = 24, 8  # of data, of an optimizer step: three of them
RATE = 3e-4
LENGTH = 96
# TRL's variables of the step, by trainer: the method that has them, its batch and its loss.
WATCHED = {
    "dpo": ("_compute_loss", "inputs chosen_logps rejected_logps ref_chosen_logps loss"),
    "kto": ("_compute_loss", "batch completion_logps kl loss"),
    "cpo": ("get_batch_loss_metrics", "batch policy_chosen_logps policy_rejected_logps loss"),
    "orpo": ("get_batch_loss_metrics", "batch policy_chosen_logps policy_rejected_logps loss"),
}


@dataclass(frozen=True)
class Method:
    """A row of METHODS. trl: which trainer, and its settings; ours: flags of step3_preference.
    likelihood_of_all: SFT's part of the loss as TRL's ORPO has it, see NLL. by_design: why TRL's
    updates are not ours."""

    trl: str
    theirs: dict
    ours: dict
    likelihood_of_all: bool = False
    by_design: str = ""


# ORPO's paper has the likelihood of the answer; its authors' code and TRL's that of the prompt too.
NLL = "TRL's likelihood is of prompt and answer, and a mean over all tokens of the batch"
OWN = dict(beta=0.1)
SMOOTH = dict(label_smoothing=0.1)
SIMPO = dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
WEIGHTS = dict(desirable_weight=1.5, undesirable_weight=0.5)
METHODS = {
    "DPO": Method("dpo", dict(loss_type="sigmoid") | OWN, dict(loss="dpo") | OWN),
    "IPO": Method("dpo", dict(loss_type="ipo") | OWN, dict(loss="ipo") | OWN),
    "robust DPO": Method(
        "dpo", dict(loss_type="robust") | OWN | SMOOTH, dict(loss="robust_dpo") | OWN | SMOOTH
    ),
    "DPO normalised by length": Method(
        "dpo", dict(loss_type="sigmoid_norm", beta=5.0), dict(loss="dpo_norm", beta=5.0)
    ),
    "APO zero": Method("dpo", dict(loss_type="apo_zero") | OWN, dict(loss="apo_zero") | OWN),
    "APO down": Method("dpo", dict(loss_type="apo_down") | OWN, dict(loss="apo_down") | OWN),
    "KTO": Method("kto", OWN | WEIGHTS, dict(loss="kto") | OWN | WEIGHTS),
    "SimPO": Method("cpo", SIMPO, dict(loss="simpo", beta=2.0, margin=1.0)),
    "ORPO": Method("orpo", OWN, dict(loss="orpo") | OWN, by_design=NLL),
    "ORPO, TRL's likelihood": Method(
        "orpo", OWN, dict(loss="orpo", sft_coef=0.0) | OWN, likelihood_of_all=True
    ),
}


def comparisons(tokenizer) -> list[Answers]:
    """Right and wrong answers to prompts of the embedded task, of other lengths each."""
    draw, encode, rows = random.Random(3), Encode(tokenizer, LENGTH, "cut"), []
    for task in toy_tasks.draw_tasks(PAIRS, seed=5):
        answers = toy_tasks.right_answer(task, draw), toy_tasks.bad_answer(task, draw)
        prompt = ({"role": "user", "content": toy_tasks.row_of(task)["prompt"]},)
        encoded, _ = encode(Comparison(prompt, answers, (1.0, 0.0), ""))
        rows.append(encoded)
    return rows


def answers_alone(rows: list[Answers]) -> list[Answers]:
    """One answer to each prompt, right ones and wrong ones in turn."""
    return [
        Answers([row.answers[k]], [row.begins[k]], [1.0 - k], row.characters)
        for row, k in zip(rows, [0, 1] * (len(rows) // 2), strict=True)
    ]


def data_of(method: Method, tokenizer) -> tuple[list[Answers], dict[str, list]]:
    """Rows as ours, and as TRL's columns."""
    rows = comparisons(tokenizer)
    if method.trl != "kto":
        return rows, texts(tokenizer, rows)
    rows = answers_alone(rows)
    columns = {
        "prompt": [tokenizer.decode(row.answers[0][: row.begins[0]]) for row in rows],
        "completion": [tokenizer.decode(row.answers[0][row.begins[0] :]) for row in rows],
        "label": [row.labels[0] > 0 for row in rows],
    }
    return rows, columns


def texts(tokenizer, rows: list[Answers]) -> dict[str, list[str]]:
    first = {
        "prompt": [row.answers[0][: row.begins[0]] for row in rows],
        "chosen": [row.answers[0][row.begins[0] :] for row in rows],
        "rejected": [row.answers[1][row.begins[1] :] for row in rows],
    }
    return {name: [tokenizer.decode(ids) for ids in column] for name, column in first.items()}


def run_trl(method: Method, folder: Path) -> dict:
    """What TRL's trainer computes in one pass over the data."""
    policy, reference = str(folder / "actor"), str(folder / "reference")
    _, columns = data_of(method, chat_template.load_tokenizer(policy))
    given = trl_trainers.settings(str(folder / "trl"), BATCH, BATCH, RATE, "fp32")
    given |= dict(max_steps=PAIRS // BATCH, max_grad_norm=0.0, max_length=LENGTH) | method.theirs
    reference = reference if method.trl in ("dpo", "kto") else None
    trainer = trl_trainers.offline(method.trl, policy, reference, columns, **given)
    name, variables = WATCHED[method.trl]
    with trl_trainers.watching(trainer, **{name: variables}) as found:
        trainer.train()
    return {"calls": found[name], "steps": found["steps"]}


def keys(call: dict) -> list[tuple]:
    """What tells rows of a minibatch apart: the ids of each answer, its prompt included."""
    batch = call.get("inputs", call.get("batch"))
    names = ("input_ids", "attention_mask")
    if "label" in batch:
        sides = [[batch[name]] for name in names]
    elif "input_ids" in batch:
        sides = [batch[name].chunk(2) for name in names]
    else:
        sides = [[batch[f"{who}_{name}"] for who in ("chosen", "rejected")] for name in names]
    answers = [kept_of(*pair) for pair in zip(*sides, strict=True)]
    return list(zip(*answers, strict=True))


def kept_of(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]


def mismatched(batch: dict) -> list[Answers]:
    """TRL's answers to other prompts, by which KTO estimates the KL: those of the same minibatch,
    moved on by one. (Ours are moved on by one in the data set.)"""
    ids = kept_of(batch["KL_input_ids"], batch["KL_attention_mask"])
    begins = batch["KL_completion_mask"].argmax(1).tolist()
    return [Answers([list(x)], [b], [0.0], [0]) for x, b in zip(ids, begins, strict=True)]


def logprobs_of(call: dict) -> torch.Tensor:
    """What TRL has of the answers, row by row."""
    if "completion_logps" in call:
        return call["completion_logps"]
    chosen, rejected = (
        call.get(f"{who}_logps", call.get(f"policy_{who}_logps")) for who in ("chosen", "rejected")
    )
    return torch.stack([chosen, rejected], 1).flatten()


def method_rows(method: Method, found: dict, folder: Path, device) -> list[Row]:
    """Rows of log-probabilities, losses, gradients and weights, update by update."""
    start_from = str(folder / "actor")
    config = PreferenceConfig(model_name_or_path=start_from, **method.ours)
    loss, how = losses.LOSSES[config.loss], config.how()
    tokenizer = chat_template.load_tokenizer(start_from)
    data, _ = data_of(method, tokenizer)
    place = {tuple(map(tuple, row.answers)): i for i, row in enumerate(data)}
    loading = dict(dtype="fp32", tokenizer=tokenizer)
    reference = language_model.load(Loading(), str(folder / "reference"), **loading).eval()
    model = language_model.load(Loading(), start_from, **loading)
    training = zero.Training(RATE, "constant", 0.0, 0.0, 0.95, 0.0, "none")
    engine = zero.TrainEngine(
        model, training, dtype="fp32", zero_stage=0, total_steps=PAIRS // BATCH
    )
    gradients, rows, above = Gradients(engine), [], []
    start = trl_trainers.snapshot(dict(engine.module.named_parameters()))
    for k, (call, theirs) in enumerate(zip(found["calls"], found["steps"], strict=True), start=1):
        some = [data[place[key]] for key in keys(call)]  # KeyError: other tokens than ours
        lengths = [len(a) - b for row in some for a, b in zip(row.answers, row.begins, strict=True)]
        lengths = torch.tensor(lengths, dtype=torch.float64)
        policy = logprobs.of_answers(engine, some, device)
        z0 = 0.0
        with torch.no_grad():
            of_reference = logprobs.of_answers(reference, some, device)
            if "kl" in call:
                others = mismatched(call["batch"])
                both = (logprobs.of_answers(m, others, device) for m in (engine, reference))
                z0 = max(0.0, torch.sub(*both).mean().item())
                rows.append(compare(f"KL, update {k}", z0, call["kl"], None, CLOSE, scale=1.0))
                above.append(z0 > 0)
        x = losses.Logprobs(policy, of_reference, lengths)
        labels = [row.labels for row in some]
        total, _ = losses.batch_loss(loss, x, labels, how, z0)
        if method.likelihood_of_all:
            whole = [dataclasses.replace(r, answers=r.answers[:1], begins=[1]) for r in some]
            tokens = sum(len(row.answers[0]) - 1 for row in whole)
            total = total - len(some) * logprobs.of_answers(engine, whole, device).sum() / tokens
        engine.backward(total, normaliser=len(some))
        engine.step()
        ours = policy.detach() / (lengths if method.trl in ("cpo", "orpo") else 1)
        rows.append(compare(f"log-probs, update {k}", ours, logprobs_of(call), tolerance=CLOSE))
        if "ref_chosen_logps" in call:
            title = f"reference log-probs, update {k}"
            both = of_reference[::2], call["ref_chosen_logps"]
            rows.append(compare(title, *both, tolerance=CLOSE))
        value, mean = call["loss"].item(), total.item() / len(some)
        rows.append(compare(f"loss, update {k}", mean, value, None, CLOSE, scale=abs(mean)))
        close = GRADIENTS_CLOSE[k > 1]
        rows.append(of_norm(f"gradient, update {k}", gradients.last, theirs["gradients"], close))
        now = trl_trainers.snapshot(dict(engine.module.named_parameters()))
        title = f"weights after update {k}"
        rows.append(weight_row(title, start, now, theirs["weights"], WEIGHTS_CLOSE))
    if above and not any(above):
        raise RuntimeError("the KL was 0 in every update: it is not compared")
    if method.by_design:
        rows = [
            dataclasses.replace(row, tolerance=None, note=method.by_design)
            for row in rows
            if "update 1" in row.quantity
        ]
    return rows


def record(folder: Path) -> dict[str, dict]:
    """{method: what TRL computes}, on the models of parity_numbers.make_models in `folder`."""
    return {name: run_trl(method, folder) for name, method in METHODS.items()}


def run(folder: Path, recorded: dict[str, dict], device) -> dict[str, list[Row]]:
    """{method: its rows}; see parity_numbers.run."""
    return {
        name: method_rows(METHODS[name], found, folder, device) for name, found in recorded.items()
    }
