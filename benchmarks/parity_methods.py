"""GRPO, Dr. GRPO, DAPO, GSPO, CISPO and RLOO of TRL 1.12, number by number and update by update
against ours.

Same weights, same sampled tokens, same rewards and settings. TRL's numbers are read out of its
trainers as they run (trl_trainers.watching); its tokens then go through our step, and its
minibatches through our engine.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import trl_trainers
from benchmarks.parity_numbers import settings
from benchmarks.parity_rows import (
    CLOSE,
    GRADIENTS_CLOSE,
    WEIGHTS_CLOSE,
    Row,
    compare,
    of_norm,
    weight_row,
)
from step3_ppo import models, update
from step3_ppo import rollout as rollouts
from step3_ppo.config import PPOConfig
from step3_ppo.episodes import Episode, Segment
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from utils.data import chat_template
from utils.data.prompts import Prompt

# Eight prompts with four answers each, two epochs of two minibatches.
ROLLOUT = dict(
    prompts_per_rollout=8,
    samples_per_prompt=4,
    micro_batch_size=16,
    logprobs_from="forward",
)


# What TRL does by itself and does not do here, where it has a setting for it, or a size of the
# rollout at which the two agree.
#
# TRL multiplies the KL in the loss by the ratio and differentiates the product. At the first
# update, where the ratio is 1, that adds k3·∇log p to the gradient: on the policy's own samples it
# is then that of KL(policy ‖ reference), where GRPO's paper has that of KL(reference ‖ policy).
PLAIN_KL = dict(use_bias_correction_kl=False)
RATIO_OF_KL = "TRL multiplies the KL in the loss by the ratio, which adds k3·∇log p"
# TRL's mean over tokens divides each minibatch by a share of the rollout's tokens, ours by its own:
# equal where the rollout is one minibatch.
ONE_MINIBATCH = dict(global_batch_size=32, micro_batch_size=32)


@dataclass(frozen=True)
class Method:
    """A row of ONLINE. trl: which trainer, and its settings; ours: flags of step 3. by_design: why
    TRL's updates are not ours."""

    trl: str
    theirs: dict
    ours: dict
    by_design: str = ""


ONLINE = {
    "GRPO": Method("grpo", dict(loss_type="grpo") | PLAIN_KL, dict(algorithm="grpo")),
    "GRPO, TRL's own KL": Method(
        "grpo", dict(loss_type="grpo"), dict(algorithm="grpo"), RATIO_OF_KL
    ),
    "Dr. GRPO": Method(
        "grpo",
        dict(loss_type="dr_grpo", scale_rewards="none") | PLAIN_KL,
        dict(algorithm="dr_grpo"),
    ),
    "GRPO, mean over tokens (DAPO), clipped higher": Method(
        "grpo",
        dict(loss_type="dapo") | PLAIN_KL,
        dict(algorithm="grpo", loss_normalisation="token", clip_ratio_high=0.15) | ONE_MINIBATCH,
    ),
    "GSPO": Method(
        "grpo",
        dict(loss_type="grpo", importance_sampling_level="sequence") | PLAIN_KL,
        dict(algorithm="gspo", clip_ratio=0.02, clip_ratio_high=0.03),
    ),
    # TRL's epsilon_high is the limit of the weight itself, and it has no lower one.
    "CISPO": Method(
        "grpo",
        dict(loss_type="cispo", epsilon_high=1.05) | PLAIN_KL,
        dict(algorithm="cispo", clip_ratio=1.0, clip_ratio_high=0.05) | ONE_MINIBATCH,
    ),
    "RLOO": Method("rloo", {}, dict(algorithm="rloo", action_level="sequence")),
}


def reward(prompts, completion_ids, **_) -> list[float]:
    """TRL's reward function: any that depends on the tokens, with ties, and with groups whose
    answers all score the same."""
    return [
        sum(ids) % 7 / 3 if sum(map(ord, prompt)) % 4 else 0.5
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def run_trl(method: Method, config: PPOConfig, folder: Path) -> dict:
    """What one rollout of TRL's trainer and its optimizer steps compute."""
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    lines = (folder / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        tokenizer.decode(chat_template.encode_prompt(tokenizer, [{"role": "user", "content": p}]))
        for p in (json.loads(line)["prompt"] for line in lines[: config.prompts_per_rollout])
    ]
    trainer = trl_trainers.online(
        method.trl, config, prompts, reward, str(folder / "trl"), **method.theirs
    )
    variables = dict(_generate_and_score_completions="output rewards", _compute_loss="inputs loss")
    with trl_trainers.watching(trainer, **variables) as found:
        trainer.train()
    return found


@torch.no_grad()
def our_rollout(ours: models.Models, found: dict, config: PPOConfig, device) -> rollouts.Rollout:
    """TRL's tokens and rewards as a rollout of step 3, scored by our models."""
    (sampled,) = found["_generate_and_score_completions"]
    batch = sampled["output"]
    stop = ours.tokenizer.eos_token_id
    both = zip(unpadded(batch, "prompt"), unpadded(batch, "completion"), strict=True)
    episodes = [
        Episode(list(ids), [Segment(torch.tensor(answer))], answer[-1] == stop)
        for ids, answer in both
    ]
    prompts = [Prompt((), "", {}, episode.prompt_ids) for episode in episodes]
    group = torch.arange(config.prompts_per_rollout).repeat_interleave(config.samples_per_prompt)
    asked = (prompts, episodes, config, device, False, group)
    return dataclasses.replace(rollouts.score(ours, *asked), scores=sampled["rewards"])


def unpadded(batch: dict, part: str) -> list[tuple[int, ...]]:
    ids, mask = batch[f"{part}_ids"], batch[f"{part}_mask"].bool()
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]


def rollout_rows(rollout, experience, found: dict) -> list[Row]:
    """Rows of the rollout's numbers."""
    batch = found["_generate_and_score_completions"][0]["output"]
    mask = rollout.action_mask
    theirs = batch["advantages"][:, None].expand(mask.shape)
    rows = [compare("response mask", mask, batch["completion_mask"], tolerance=0.0)]
    for title, ours, name in (
        ("log-probs", rollout.logprobs, "old_per_token_logps"),
        ("reference log-probs", rollout.ref_logprobs, "ref_per_token_logps"),
    ):
        if name in batch:
            rows.append(compare(title, ours, batch[name], mask, CLOSE))
    if "old_logps" in batch:
        sums = (rollout.logprobs * mask).sum(1)
        rows.append(compare("log-probs of answers", sums, batch["old_logps"], tolerance=CLOSE))
    if experience.action_mask.shape != mask.shape:  # an answer is an action
        theirs, mask = theirs[:, :1], experience.action_mask
    rows.append(compare("advantages", experience.advantages, theirs, mask, CLOSE))
    return rows


def minibatches(rollout, found: dict) -> list[tuple[list[int], float]]:
    """(rows of our rollout, TRL's loss) of each of its forward passes with a gradient."""
    whole = found["_generate_and_score_completions"][0]["output"]
    place = {key: i for i, key in enumerate(_keys(whole))}
    return [
        ([place[key] for key in _keys(call["inputs"])], call["loss"].item())
        for call in found["_compute_loss"]
    ]


def _keys(batch: dict) -> list[tuple]:
    # Answers that are alike are told apart by nothing, and need not be.
    return list(zip(unpadded(batch, "prompt"), unpadded(batch, "completion"), strict=True))


def update_rows(ours: models.Models, experience, found: dict, why: str, config, device):
    """Rows of losses, gradients and weights, update by update. why: they differ by design."""
    module, gradients, rows, clipped = ours.actor.module, Gradients(ours.actor), [], []
    start = trl_trainers.snapshot(dict(module.named_parameters()))
    for k, ((chosen, loss), theirs) in enumerate(
        zip(minibatches(experience.rollout, found), found["steps"], strict=True), start=1
    ):
        metrics = update.step_actor(ours, experience, chosen, config, device)
        whole = metrics["policy_loss"] + experience.kl_in_loss * metrics.get("kl_in_loss", 0.0)
        rows.append(compare(f"loss, update {k}", whole, loss, None, CLOSE, scale=1.0))
        close = GRADIENTS_CLOSE[k > 1]
        rows.append(of_norm(f"gradient, update {k}", gradients.last, theirs["gradients"], close))
        now = trl_trainers.snapshot(dict(module.named_parameters()))
        title = f"weights after update {k}"
        rows.append(weight_row(title, start, now, theirs["weights"], WEIGHTS_CLOSE))
        clipped.append(metrics.get("clip_fraction", 0.0))
    if not max(clipped) > 0:
        raise RuntimeError(
            f"no ratio was clipped in {len(clipped)} updates: the clip is not compared"
        )
    if why:
        rows = [dataclasses.replace(row, tolerance=None, note=why) for row in rows]
    return rows


class Gradients:
    """last: {name: gradient} that the engine's optimizer stepped on last."""

    def __init__(self, engine):
        self.last = {}
        engine.adamw.register_step_pre_hook(
            lambda *_: self.last.update(
                {name: p.grad.clone() for name, p in engine.module.named_parameters()}
            )
        )


def record(folder: Path) -> dict[str, dict]:
    """{method: what TRL computes}, on the models of parity_numbers.make_models in `folder`."""
    return {name: run_trl(m, our_settings(m, folder), folder) for name, m in ONLINE.items()}


def our_settings(method: Method, folder: Path) -> PPOConfig:
    return settings(folder, **ROLLOUT | method.ours)


def run(folder: Path, recorded: dict[str, dict], device) -> dict[str, list[Row]]:
    """{method: its rows}; see parity_numbers.run."""
    tables = {}
    for name, found in recorded.items():
        config = our_settings(ONLINE[name], folder)
        tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
        ours = models.build(config, tokenizer, config.dtype, device)
        rollout = our_rollout(ours, found, config, device)
        experience, _ = make_experience(rollout, config, State(config.kl_coef))
        tables[name] = rollout_rows(rollout, experience, found)
        why = ONLINE[name].by_design
        tables[name] += update_rows(ours, experience, found, why, config, device)
    return tables
