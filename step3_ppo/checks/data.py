"""Checks of what models are given and trained on: samples, stop token, template, rewards, data."""

import dataclasses
import json
from pathlib import Path

import torch
import yaml

from step3_ppo import algorithm
from step3_ppo.checks.probe import BEFORE, COPIES, Probe, check, distributions
from utils.data import chat_template, comparisons, fitting, rows, splits, tables
from utils.data.loading import DataSettings
from utils.distributed import process_group
from utils.generation import sampling as generation
from utils.models import scorer
from utils.verdicts import Doubt, Fault

PROMPTS_TRIED, COMPARISONS_TRIED = 8, 64


@check(BEFORE, "samples follow the policy")
def samples_follow_the_policy(probe: Probe) -> str:
    """Sampled tokens are as surprising as the policy's entropy says: not greedy, not truncated."""
    if probe.models.nucleus is not None:
        return "not checked: nlpo leaves tokens out"
    own = probe.own_rows()
    seen, kept = distributions(probe, own), own.action_mask.to(probe.device)
    surprise = -seen.logprobs - seen.entropies
    sums = [x[kept].double().sum() for x in (surprise, seen.variances)]
    total, variance, count = process_group.sum_over_ranks([*sums, kept.sum()], probe.device)
    excess, z = total / count, total / (variance**0.5 + 1e-9)
    what = f"−log p exceeds the entropy by {excess:+.3f} nats a token ({z:+.1f} standard errors)"
    # Upwards a rare token among sure ones is many standard errors, so size counts there too.
    if z < -6 or (z > 6 and excess > 0.1):
        raise Fault(
            f"over {count:.0f} sampled tokens {what}: sampling is greedy or leaves tokens "
            "out, or its temperature is not that of the log-probabilities; see "
            "generation.sample_tokens and --temperature"
        )
    return f"over {count:.0f} tokens {what}"


@check(BEFORE, "ranks and rows draw apart")
def ranks_and_rows_draw_apart(probe: Probe) -> str:
    """Copies of one prompt must not all get one answer, nor two ranks the same answers."""
    rollout, world = probe.rollout, process_group.world_size()
    ids = rollout.response_ids.where(rollout.response_mask, probe.models.tokenizer.pad_token_id)
    # (prompts, copies, ranks, …): rollout.collect deals row i to rank i % ranks.
    answers, logs = ids.view(-1, COPIES, world, ids.shape[1]), rollout.logprobs.sum(1)
    logs = logs.view(answers.shape[:3])
    for what, first, others in (
        ("rows", answers[:, :1], (answers[:, 1:], logs[:, 1:])),
        ("ranks", answers[:, :, :1], (answers[:, :, 1:], logs[:, :, 1:])),
    ):
        log_chance = float(others[1].sum())  # that they come out as they are, like the first
        if log_chance < -20 and bool((others[0] == first).all()):
            raise Fault(
                f"all {what} drew the same answers to the same prompts, which by chance has "
                f"probability e^{log_chance:.0f}: they share their noise, and a rollout holds "
                "fewer samples than it seems; see generation.uniform_noise and rollout.collect"
            )
    note = "; the policy is too sure to tell more" if float(logs[:, 1:].sum()) > -20 else ""
    different = len(set(map(tuple, ids.tolist())))
    return f"{different} different answers among {len(ids)}, {world} ranks{note}"


@check(BEFORE, "stop token")
def stop_token(probe: Probe) -> str:
    """EOS is another token than pad, counted once, scored, and missing where an answer is cut."""
    tokenizer, rollout = probe.models.tokenizer, probe.rollout
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if stop == pad:
        raise Fault(
            f"pad and stop token are both {tokenizer.eos_token!r} ({stop}): whatever masks pads "
            "masks the end of every answer; give the tokenizer a pad token of its own"
        )
    other = next(i for i in range(len(tokenizer)) if i not in (stop, pad))
    made = torch.tensor([[other, stop, pad, pad], [stop, pad, pad, pad], [other] * 4])
    mask, zeros = generation.mask_through_stop(made, stop), torch.zeros(made.shape)
    rewards, _ = algorithm.token_rewards(torch.ones(3), zeros, zeros, mask, 0.1)
    if rewards.argmax(1).tolist() != [1, 0, 3] or float(rewards.sum()) != 3.0:
        raise Fault(
            f"of answers that end at positions 1, 0 and 3 the score falls on {rewards.tolist()}; "
            "see generation.mask_through_stop and algorithm.token_rewards"
        )
    last = rollout.response_mask.long().sum(1, keepdim=True) - 1
    ends = rollout.response_ids.gather(1, last).squeeze(1) == stop
    wrong = ends != rollout.finished
    if probe.models.environment is not None:  # an episode may be cut where a reply had no room
        wrong &= rollout.finished
    if wrong.any():
        raise Fault(
            f"{int(wrong.sum())} of {len(ends)} sampled answers are called "
            "finished without a stop token in their mask, or the other way round"
        )
    expected = probe.models.actor.module.config.eos_token_id
    if expected != stop:
        raise Fault(f"the model's config stops at {expected}, the tokenizer at {stop}")
    share = float(rollout.finished.float().mean())
    return f"{tokenizer.eos_token!r} is inside loss, mask and reward; {share:.0%} of probe ended"


@check(BEFORE, "same language")
def same_language(probe: Probe) -> str:
    """Prompts are the tokens that training rows begin with, for the policy and the reward model."""
    tokenizer, reward = probe.models.tokenizer, probe.models.reward
    for prompt in probe.held[:PROMPTS_TRIED]:
        fitted = fitting.shortened(tokenizer, prompt.messages, probe.config.max_prompt_length)
        turns = (*fitted, {"role": "assistant", "content": "a"})
        try:
            whole = chat_template.encode_conversation(tokenizer, turns)
        except chat_template.TemplateError:
            continue  # a template that rewrites earlier turns; single turns are compared
        start = whole.ids[: whole.last_answer]
        if start != list(prompt.ids):
            raise Fault(
                f"the prompt {prompt.messages[-1]['content'][:80]!r} is given to the policy as "
                f"{tokenizer.decode(prompt.ids)[-80:]!r} and stands in training rows as "
                f"{tokenizer.decode(start)[-80:]!r}: the chat template is not the one the policy "
                "was trained with; use step 1's output folder whole"
            )
        if whole.ids[-1] != tokenizer.eos_token_id:
            raise Fault(f"an answer ends with {tokenizer.decode(whole.ids[-1:])!r} in the template")
    if reward is None:
        sources = ", ".join(probe.config.reward_sources())
        return f"template and stop token agree; scores come from {sources}"
    if not reward.by_text:
        return "policy and reward model share vocabulary, template, stop and pad token"
    end = reward.reader.read_at == "end"
    why = "is read behind the answer's stop token" if end else "has another tokenizer or template"
    return f"the reward model {why}: answers go to it as text"


@check(BEFORE, "reward model")
def reward_model_sanity(probe: Probe) -> str:
    """The reward model tells better from worse, and better than length does; its bias is set."""
    config, reward = probe.config, probe.models.reward
    if reward is None:
        return "no reward model: scores come from --reward_function"
    if config.preference_data:
        result = _held_out_accuracy(probe)
    else:
        path = Path(config.reward_model) / "result.json"
        if not path.exists():
            raise Doubt(
                f"{config.reward_model} has no result.json of step 2: whether it tells better from "
                "worse is not known; name comparisons with --preference_data"
            )
        result = json.loads(path.read_text(encoding="utf-8"))
    low, high = result["accuracy_low"], result["accuracy_high"]
    longer = result["accuracy_longer_answer"]
    text = (
        f"right on {result['accuracy']:.3f} ({low:.3f} to {high:.3f}, 95 % by prompt) of "
        f"{result['pairs']} held-out pairs, the longer answer on {longer:.3f}"
    )
    if high < 0.5:
        raise Fault(f"{text}: it prefers the worse answer; were the labels swapped in step 2?")
    if low <= 0.5:
        raise Doubt(
            f"{text}: perhaps no better than chance; train it on more comparisons, or hold "
            "out more of them (step 2's --eval_fraction)"
        )
    if result["accuracy"] <= max(longer, 1 - longer):
        always = "longer" if longer > 0.5 else "shorter"
        raise Doubt(f"{text}: no better than always taking the {always}, which PPO will learn")
    inner = getattr(reward.model, "module", reward.model)
    if not hasattr(inner.classifier.config, "reward_bias"):
        raise Doubt(
            f"{text}; its bias is not set (config.reward_bias), so scores have no zero: set "
            "--score_normalisation fixed, or train it with step2_reward/main.py"
        )
    return f"{text}; bias {inner.bias:.3f}"


def _held_out_accuracy(probe: Probe) -> dict:
    """The reward model's accuracy on held-out pairs of --preference_data, as step 2 measures it."""
    config, reward = probe.config, probe.models.reward
    bad = rows.BadRows(config.max_bad_rows)
    settings = dataclasses.replace(
        config.pick(DataSettings), data_schema="auto", data_weights=[], data_split=""
    )
    # What step 2 held out, not what this run's settings would: the prompt as it read it decides.
    saved = Path(config.reward_model) / "config.yaml"
    if saved.exists():
        then = yaml.safe_load(saved.read_text(encoding="utf-8"))
        same = ("eval_fraction", "seed", "data_split", "data_schema", "columns")
        settings = dataclasses.replace(settings, **{k: then[k] for k in same if k in then})

    _, every = splits.train_and_held_out(
        comparisons.COMPARISONS, config.preference_data, None, settings, 2, bad
    )
    held = []
    for comparison in every[:COMPARISONS_TRIED]:
        if refusal := reward.reader.refusal(comparison.prompt):
            bad.add(comparison.where, refusal, list(comparison.responses))
        else:
            held.append(comparison)
    bad.finish("preference_data")
    groups = [
        [reward.reader.encode(c.prompt, *one) for one in zip(c.responses, c.finished, strict=True)]
        for c in held
    ]
    scores = scorer.score_groups(reward.model, groups, probe.device, config.micro_batch_size)
    labels = [c.scores for c in held]
    if all(len(set(group)) == 1 for group in labels):
        raise Doubt(f"preference_data={config.preference_data} holds out no pair that differs")
    # Imported here: `evaluate` takes 2.5 s, which --help and refused settings should not pay.
    from utils.confidence import ranking_accuracy

    lengths = [[len(text) for text in c.responses] for c in held]
    return ranking_accuracy(labels, scores, lengths, [tables.place(c, "") for c in held])


@check(BEFORE, "data")
def prompts_are_apart(probe: Probe) -> str:
    """Training and held-out prompts share none; few are cut at the limit or come twice."""
    limit, tokenizer = probe.config.max_prompt_length, probe.models.tokenizer
    # By hashes: the tokens of a million prompts would take gigabytes.
    train, held = ([hash(tuple(p.ids)) for p in part] for part in (probe.train, probe.held))
    shared = len(set(train) & set(held))
    whole = [chat_template.encode_prompt(tokenizer, p.messages) for p in probe.held]
    cut = sum(len(ids) > limit for ids in whole) / len(whole)
    twice = 1 - len(set(train)) / len(train)
    text = (
        f"{len(train)} training and {len(held)} held-out prompts, {shared} of them in both; "
        f"{cut:.1%} of the latter are cut to --max_prompt_length {limit}; {twice:.1%} of the "
        "former come again"
    )
    if shared > 0.05 * len(set(held)):
        raise Fault(f"{text}: evaluation would be of what was trained on; name other held-out data")
    weighted = any(w > 1 for w in probe.config.data_weights)
    if shared or cut > 0.2 or (twice > 0.5 and not weighted):
        raise Doubt(f"{text}; raise --max_prompt_length, or look at the data for duplicates")
    return text
