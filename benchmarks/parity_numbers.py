"""One rollout of TRL's PPOTrainer and the optimizer steps on it, number by number against ours.

Same weights, same sampled tokens, same hyperparameters. TRL's numbers are read out of its running
train() (trl_runner.Capture); ours come from step3_ppo and utils.models.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import trl_runner
from benchmarks.parity_rows import WEIGHTS_CLOSE, Row, by_design, compare, weight_row
from step3_ppo import advantages, algorithm, models, update
from step3_ppo import rollout as rollouts
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Experience, make_experience
from step3_ppo.state import State
from utils.data import chat_template, toy_tasks
from utils.generation import sampling as generation
from utils.models import from_scratch, language_model, scorer

ROOT = Path(__file__).resolve().parent.parent
# The differences that are meant, all of them.
#
# TRL gives a response that stopped before the limit one step more, t = L+1 after its stop token L:
# V' is read at the stop token and trained on, and the score is paid there. GAE then makes of the
# stop token r_L + γ((1−λ)V' + λ·score) − V_L, where ours, which ends with it, is r_L + score − V_L.
# So TRL's policy is taught by (1−λ) parts of what its critic believes of the score it already has.
STEPS = "TRL adds a step after an early stop and pays the score there"
BOOTSTRAP = "TRL's stop token earns γ((1−λ)V' + λ·score), V' read at it; ours the score"
BESSEL = "TRL divides the variance by n−1 tokens, ours by n"
FILL = "never used; ours 0, TRL 1.0"
VARIANTS = {
    "PPO, KL by k1": {},
    "PPO, KL by k3, rewards whitened": {"kl_estimator": "k3", "whiten_rewards": True},
}


def settings(folder: Path, **changes) -> PPOConfig:
    """Two epochs of two minibatches on one rollout, with every number away from its default."""
    config = PPOConfig(
        output_dir=str(folder / "ours"),
        model_name_or_path=str(folder / "actor"),
        reference_model=str(folder / "reference"),
        reward_model=str(folder / "reward"),
        critic_model=str(folder / "critic"),
        prompt_data=["-"],
        max_steps=1,
        prompts_per_rollout=32,
        global_batch_size=16,
        micro_batch_size=8,
        ppo_epochs=2,
        max_response_length=16,
        temperature=0.7,
        kl_coef=0.13,
        gamma=0.97,
        lam=0.9,
        clip_ratio=0.1,
        clip_value=0.15,
        learning_rate=3e-4,
        critic_learning_rate=5e-4,
        lr_schedule="constant",
        warmup_ratio=0.0,
        gradient_clipping=0.0,  # TRL's train() never clips; its max_grad_norm is not read
        ema_decay=0.0,
        dtype="fp32",
    )
    return dataclasses.replace(config, **changes)


def make_models(folder: Path) -> None:
    """actor/, reference/, reward/ and critic/, two layers each and no two alike, and data/.

    The reference has seen enough demonstrations that some answers stop early and others do not.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    data = toy_tasks.write(folder / "data", 0, demonstrations=960, prompts=160, held_out=8)
    shape = dict(hidden_size=48, layers=2, heads=4, intermediate_size=96, max_positions=256)
    from_scratch.build(
        folder / "base_model",
        from_scratch.texts_of([str(data["sft"])]),
        vocab_size=512,
        seed=0,
        **shape,
    )
    command = [sys.executable, str(ROOT / "step1_sft/main.py")]
    command += ["--model_name_or_path", folder / "base_model", "--sft_data", data["sft"]]
    command += ["--output_dir", folder / "reference", "--max_steps", 120, "--max_length", 96]
    command += ["--global_batch_size", 16, "--micro_batch_size", 16, "--learning_rate", "3e-3"]
    # Not auto, which is bf16 on some CPUs: TRL would then load and run what was saved in bf16.
    command += ["--dtype", "fp32", "--tensorboard", "false", "--max_eval_rows", 16]
    command += ["--log_every", 60, "--overwrite"]  # a run of the benchmark before this one
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    tokenizer = chat_template.load_tokenizer(str(folder / "reference"))
    generator = torch.Generator().manual_seed(1)

    def save(model, name):
        for p in model.parameters():
            p.data += 0.1 * p.data.std() * torch.randn(p.shape, generator=generator)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    save(AutoModelForCausalLM.from_pretrained(folder / "reference"), "actor")
    for name, bias in (("reward", 0.4), ("critic", -0.2)):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "reference", num_labels=1
        )
        model.score.weight.data.normal_(0.0, 0.3, generator=generator)
        model.config.reward_bias = bias
        save(model, name)


def run_trl(config, folder: Path) -> trl_runner.Capture:
    """One iteration of PPOTrainer.train(), watched."""
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    rows = (folder / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        chat_template.encode_prompt(tokenizer, [{"role": "user", "content": p}])
        for p in (json.loads(row)["prompt"] for row in rows)
    ]
    trainer = trl_runner.build_trainer(config, prompts, tokenizer, str(folder / "trl"))
    capture = trl_runner.Capture()
    with capture.watching(trainer):
        trainer.train()
    return capture


@torch.no_grad()
def our_rollout(ours: models.Models, theirs: dict, config):
    """Their sampled tokens through our models and functions.

    Returns (Rollout, values (B,R), steps (B,R) bool). `steps` is the response mask and one step
    more where the response stopped early, as TRL lays a trajectory out; `values` covers it.
    """
    prompt_ids, responses = theirs["queries"], theirs["responses"]
    prompt_mask = prompt_ids != ours.tokenizer.pad_token_id
    mask = generation.mask_through_stop(responses, ours.tokenizer.eos_token_id)
    steps = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    ids, real = torch.cat([prompt_ids, responses], 1), torch.cat([prompt_mask, mask], 1)
    length = responses.shape[1]
    score = dict(temperature=config.temperature, with_entropies=True)
    logprobs, entropies = language_model.response_logprobs(
        ours.actor.module, ids, real, length, **score
    )
    ref_logprobs, _ = language_model.response_logprobs(ours.reference, ids, real, length, **score)
    (values,) = rollouts.values_of(ids, real, mask, ours.critic)
    none = torch.zeros(len(ids))
    rollout = rollouts.Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=responses,
        response_mask=mask,
        action_mask=mask,
        earlier=[()] * len(ids),
        logprobs=logprobs * mask,
        engine_logprobs=logprobs * mask,
        ref_logprobs=ref_logprobs * mask,
        entropies=entropies * mask,
        values=values * mask,
        scores=scorer.sequence_scores(ours.reward.model, ids, real),
        function_scores=none,
        judge_scores=none,
        finished=(responses == ours.tokenizer.eos_token_id).any(1),
        group=torch.arange(len(ids)),
        policy_step=torch.zeros(len(ids), dtype=torch.int64),
    )
    return rollout, values * steps, steps


def whiten(x, mask, shift_mean=True):
    """Our whitening, and the same with TRL's variance, whose divisor is n−1."""
    ours, n = advantages.whiten(x, mask, shift_mean), int(mask.sum())
    mean = 0.0 if shift_mean else advantages.masked_mean(x, mask)
    return ours, ((ours - mean) * ((n - 1) / n) ** 0.5 + mean) * mask


def rollout_rows(rollout, values, steps, theirs: dict, config):
    """Rows of one rollout's numbers, and three ways to learn from it: {name: Experience}."""
    mask, logprobs = rollout.response_mask, rollout.logprobs
    shipped, _ = make_experience(rollout, config, State(config.kl_coef))
    parts = (rollout.scores, logprobs, rollout.ref_logprobs)
    price = (config.kl_coef, config.estimator_of_kl())
    penalties, kl = algorithm.token_rewards(torch.zeros_like(parts[0]), *parts[1:], mask, *price)
    rewards, _ = algorithm.token_rewards(*parts, mask, *price)
    # The same functions on TRL's trajectory, where the score's step is one past the stop token.
    rewards_on, _ = algorithm.token_rewards(*parts, steps, *price)
    if config.whiten_rewards:
        rewards, _ = whiten(rewards, mask, shift_mean=False)
        _, rewards_on = whiten(rewards_on, steps, shift_mean=False)
    raw, returns = advantages.gae(rewards, rollout.values, mask, config.gamma, config.lam)
    raw_on, returns_on = advantages.gae(rewards_on, values, steps, config.gamma, config.lam)
    whitened, whitened_on = whiten(theirs["raw_advantages"], mask)
    their_mask, their_steps = ~theirs["padding_mask"], ~theirs["padding_mask_p1"]
    spread = logprobs[mask].std().item()
    rows = [
        compare("response mask", mask, their_mask, tolerance=0.0),
        by_design("steps with value and reward", mask, their_steps, STEPS),
        compare("  the same, on TRL's steps", steps, their_steps, tolerance=0.0),
        compare("log-probs", logprobs, theirs["logprobs"], mask),
        compare("reference log-probs", rollout.ref_logprobs, theirs["ref_logprobs"], mask),
        by_design("log-probs off the mask", logprobs, theirs["logprobs"], FILL, ~mask),
        compare("scores", rollout.scores, theirs["scores"]),
        compare("values", values, theirs["values"], steps),
        # Differences of log-probabilities: the rounding is theirs, however small what is left.
        compare("KL a token", kl, theirs["kl"], scale=spread),
        compare(
            "rewards without the score",
            penalties,
            theirs["non_score_reward"],
            scale=config.kl_coef * spread,
        ),
        by_design("rewards", rewards, theirs["rewards"], STEPS),
        compare("  rewards on TRL's steps", rewards_on, theirs["rewards"]),
        by_design("advantages", raw, theirs["raw_advantages"], BOOTSTRAP, mask),
        compare("  advantages on TRL's steps", raw_on, theirs["raw_advantages"], mask),
        by_design("returns", returns, theirs["returns"], BOOTSTRAP, mask),
        compare("  returns on TRL's steps", returns_on, theirs["returns"], steps),
        by_design("whitening of TRL's advantages", whitened, theirs["advantages"], BESSEL, mask),
        compare("  whitening × √((n−1)/n)", whitened_on, theirs["advantages"], mask),
    ]
    _, advantages_on = whiten(raw_on, mask)
    on = Experience(
        rollout, mask, logprobs, rollout.values, advantages_on, returns_on, mask.float()
    )
    # The extra step's column stays when a minibatch is cut to its longest response.
    longer = dataclasses.replace(rollout, response_mask=steps)
    return rows, {
        "shipped": shipped,
        "actor on TRL's steps": on,
        "critic on TRL's steps": dataclasses.replace(
            on, rollout=longer, action_mask=steps, values=values
        ),
    }


def learn(ours: models.Models, actor_experience, critic_experience, batches, config, device):
    """Our optimizer steps on the minibatches `batches` (lists of rows). Yields the metrics and
    {"policy", "value": {name: weight}} after each."""
    for rows in batches:
        metrics = update.step_actor(ours, actor_experience, rows, config, device)
        metrics |= update.step_critic(ours.critic, critic_experience, rows, config, device)
        yield metrics, weights(ours)


def weights(ours: models.Models) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the trained weights, named as TRL's models name them."""
    trained = {"policy": ours.actor.module, "value": ours.critic.module.classifier}
    return {
        who: {name: p.detach().clone() for name, p in module.named_parameters()}
        for who, module in trained.items()
    }


def update_rows(ours, again, experiences, updates: list[dict], config, device) -> list[Row]:
    """Rows of the losses and of the weights after each update. `again`: a second build of ours,
    which learns as shipped."""
    start, rows = weights(ours), []
    batches = [list(u["micro_batch_inds"]) for u in updates]
    on_theirs = (experiences["actor on TRL's steps"], experiences["critic on TRL's steps"])
    steps = learn(ours, *on_theirs, batches, config, device)
    for k, (theirs, (metrics, now)) in enumerate(zip(updates, steps, strict=True), start=1):
        # A policy loss may be 0 by chance; it is a mean of advantages, whose deviation is 1.
        for name, loss, scale in (
            ("policy_loss", "pg_loss", 1.0),
            ("value_loss", "vf_loss", metrics["value_loss"]),
        ):
            title = f"{name.replace('_', ' ')}, update {k}"
            rows.append(compare(title, metrics[name], theirs[loss], scale=scale))
        for who in ("policy", "value"):
            title = f"{who} weights after update {k}"
            both = (now[who], theirs["weights"][who])
            rows.append(weight_row(title, start[who], *both, WEIGHTS_CLOSE))
    shipped = [experiences["shipped"]] * 2
    *_, (_, last) = learn(again, *shipped, batches, config, device)
    for who in ("policy", "value"):
        title = f"{who} weights after update {len(updates)}, as shipped"
        both = (last[who], updates[-1]["weights"][who])
        rows.append(weight_row(title, start[who], *both, None, "all of it together"))
    return rows


def record(folder: Path) -> dict[str, trl_runner.Capture]:
    """{variant: what TRL computes}, on the models of make_models in `folder`."""
    return {
        name: run_trl(settings(folder, **changes), folder) for name, changes in VARIANTS.items()
    }


def run(folder: Path, recorded: dict[str, trl_runner.Capture], device) -> dict[str, list[Row]]:
    """{variant: its rows}. The process group has begun, after which no trainer of TRL may:
    accelerate, inside it, would read the group's variables as its own."""
    tables = {}
    for name, capture in recorded.items():
        config = settings(folder, **VARIANTS[name])
        tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
        ours, again = (models.build(config, tokenizer, config.dtype, device) for _ in range(2))
        rollout, values, steps = our_rollout(ours, capture.rollout, config)
        rows, experiences = rollout_rows(rollout, values, steps, capture.rollout, config)
        rows += update_rows(ours, again, experiences, capture.updates, config, device)
        tables[name] = rows
    return tables
