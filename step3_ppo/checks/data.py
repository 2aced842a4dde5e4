"""The self-check's questions about what models are given: samples, stop token, template, data."""

import dataclasses
import json
from pathlib import Path

import torch
import yaml

from step3_ppo import algorithm
from step3_ppo.checks.models import PROBE_COPIES, Doubt, Fault, distributions, own_rows
from utils.data import chat_template, comparisons, fitting, rows, splits
from utils.data.loading import DataSettings
from utils.distributed import process_group
from utils.generation import sampling as generation
from utils.models import reward_reader

PROMPTS_TRIED, COMPARISONS_TRIED = 8, 64


def samples_follow_the_policy(check) -> str:
    """Sampled tokens are as surprising as the policy's entropy says: not greedy, not truncated."""
    probe = own_rows(check)
    seen, kept = distributions(check, probe), probe.response_mask.to(check.device)
    surprise = -seen.logprobs - seen.entropies
    sums = [x[kept].double().sum() for x in (surprise, seen.variances)]
    total, variance, count = process_group.sum_over_ranks([*sums, kept.sum()], check.device)
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


def ranks_and_rows_draw_apart(check) -> str:
    """Copies of one prompt must not all get one answer, nor two ranks the same answers."""
    probe, world = check.probe, process_group.world_size()
    pad_id, sure = check.models.tokenizer.pad_token_id, True
    answers = probe.response_ids.where(probe.response_mask, pad_id).tolist()
    logs = probe.logprobs.sum(1).tolist()
    alike = {"rows": 0.0, "ranks": 0.0}
    everywhere = {"rows": True, "ranks": world > 1}
    for first in range(0, len(answers), PROBE_COPIES * world):
        for copy in range(PROBE_COPIES):
            for rank in range(world):
                at = first + copy * world + rank
                for what, other in (("rows", first + rank), ("ranks", first + copy * world)):
                    if at != other:
                        everywhere[what] &= answers[at] == answers[other]
                        alike[what] += logs[at]
        sure = sure and alike["rows"] > -20
    for what, equal in everywhere.items():
        if equal and alike[what] < -20:
            raise Fault(
                f"all {what} drew the same answers to the same prompts, which by chance has "
                f"probability e^{alike[what]:.0f}: they share their noise, and a rollout holds "
                f"fewer samples than it seems; see generation.uniform_noise and rollout.collect"
            )
    different = len({tuple(a) for a in answers})
    note = "; the policy is too sure to tell more" if sure else ""
    return f"{different} different answers among {len(answers)}, {world} ranks{note}"


def stop_token(check) -> str:
    """EOS is another token than pad, counted once, scored, and missing where an answer is cut."""
    tokenizer = check.models.tokenizer
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if stop == pad:
        raise Fault(
            f"pad and stop token are both {tokenizer.eos_token!r} ({stop}): whatever masks pads "
            "masks the end of every answer; give the tokenizer a pad token of its own"
        )
    other = next(i for i in range(len(tokenizer)) if i not in (stop, pad))
    made = torch.tensor([[other, stop, pad, pad], [stop, pad, pad, pad], [other] * 4])
    mask = generation.mask_through_stop(made, stop)
    if mask.sum(1).tolist() != [2, 1, 4]:
        raise Fault(
            f"answers of 2, 1 and 4 tokens, stop token included, are masked as "
            f"{mask.sum(1).tolist()}: a stop token outside the mask is never learned; see "
            "generation.mask_through_stop"
        )
    scores, zeros = torch.ones(3), torch.zeros(3, 4)
    rewards, _ = algorithm.token_rewards(scores, zeros, zeros, mask, 0.1)
    if rewards.argmax(1).tolist() != [1, 0, 3] or float(rewards.sum()) != 3.0:
        raise Fault(
            f"the score falls on positions {rewards.argmax(1).tolist()} and not on the last "
            "tokens 1, 0, 3; see algorithm.token_rewards"
        )
    probe = check.probe
    last = probe.response_mask.long().sum(1) - 1
    ends = probe.response_ids.gather(1, last[:, None]).squeeze(1) == stop
    if not torch.equal(ends, probe.finished):
        raise Fault(
            f"{int((ends != probe.finished).sum())} of {len(ends)} sampled answers are called "
            "finished without a stop token in their mask, or the other way round"
        )
    expected = check.models.hybrid.train_engine.module.config.eos_token_id
    if expected != stop:
        raise Fault(f"the model's config stops at {expected}, the tokenizer at {stop}")
    share = float(probe.finished.float().mean())
    return f"{tokenizer.eos_token!r} is inside loss, mask and reward; {share:.0%} of probe ended"


def same_language(check) -> str:
    """Prompts are the tokens that training rows begin with, for the policy and who scores it."""
    tokenizer, reward = check.models.tokenizer, check.models.reward
    limit = check.config.max_prompt_length
    for prompt in check.held[:PROMPTS_TRIED]:
        fitted = fitting.shortened(tokenizer, prompt.messages, limit)
        turns = (*fitted, {"role": "assistant", "content": "a"})
        try:
            whole = chat_template.encode_conversation(tokenizer, turns)
        except chat_template.TemplateError:
            continue  # a template that rewrites earlier turns; single turns are compared
        if whole.ids[: whole.last_answer] != list(prompt.ids):
            raise Fault(
                f"the prompt {prompt.messages[-1]['content'][:80]!r} is given to the policy as "
                f"{tokenizer.decode(prompt.ids)[-80:]!r} and stands in training rows as "
                f"{tokenizer.decode(whole.ids[: whole.last_answer])[-80:]!r}: the chat template "
                "is not the one the policy was trained with; use step 1's output folder whole"
            )
        if whole.ids[-1] != tokenizer.eos_token_id:
            raise Fault(f"an answer ends with {tokenizer.decode(whole.ids[-1:])!r} in the template")
    if reward is None:
        return f"template and stop token agree; scores come from {check.config.reward_function}"
    if not reward.by_text:
        return "policy and reward model share vocabulary, template, stop and pad token"
    if reward.reader.read_at == "end":
        return "the reward model is read behind the answer's stop token: answers go to it as text"
    return "the reward model has another tokenizer or template: answers go to it as text"


def reward_model_sanity(check) -> str:
    """The reward model tells better from worse, and better than length does; its bias is set."""
    config, reward = check.config, check.models.reward
    if reward is None:
        return "no reward model: scores come from --reward_function"
    if config.preference_data:
        found = _held_out_accuracy(check)
    else:
        path = Path(config.reward_model) / "result.json"
        if not path.exists():
            raise Doubt(
                f"{config.reward_model} has no result.json of step 2: whether it tells better from "
                "worse is not known; name comparisons with --preference_data"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    low, high = found["accuracy_low"], found["accuracy_high"]
    longer = found["accuracy_longer_answer"]
    text = (
        f"right on {found['accuracy']:.3f} ({low:.3f} to {high:.3f}, 95 % by prompt) of "
        f"{found['pairs']} held-out pairs, the longer answer on {longer:.3f}"
    )
    if high < 0.5:
        raise Fault(f"{text}: it prefers the worse answer; were the labels swapped in step 2?")
    if low <= 0.5 or found["accuracy"] <= max(longer, 1 - longer):
        raise Doubt(f"{text}: no better than chance or length; PPO will learn what it pays for")
    inner = getattr(reward.model, "module", reward.model)
    if not hasattr(inner.classifier.config, "reward_bias"):
        raise Doubt(
            f"{text}; its bias is not set (config.reward_bias), so scores have no zero: set "
            "--score_normalisation fixed, or train it with step2_reward/main.py"
        )
    return f"{text}; bias {inner.bias:.3f}"


def _held_out_accuracy(check) -> dict:
    """The reward model's accuracy on held-out pairs of --preference_data, as step 2 measures it."""
    config, reward = check.config, check.models.reward
    bad = rows.BadRows(config.max_bad_rows)

    plain = dataclasses.replace(
        config.pick(DataSettings), data_schema="auto", data_weights=[], data_split=""
    )
    # What step 2 held out, not what this run's settings would: the prompt as it read it decides.
    saved = Path(config.reward_model) / "config.yaml"
    if saved.exists():
        then = yaml.safe_load(saved.read_text(encoding="utf-8"))
        same = ("eval_fraction", "seed", "data_split", "data_schema", "columns")
        plain = dataclasses.replace(plain, **{k: then[k] for k in same if k in then})

    _, every = splits.train_and_held_out(
        comparisons.COMPARISONS, config.preference_data, None, plain, 2, bad
    )
    held = []
    for comparison in every[:COMPARISONS_TRIED]:
        if refusal := reward.reader.refusal(comparison.prompt):
            bad.add(comparison.where, refusal, list(comparison.responses))
        else:
            held.append(comparison)
    bad.finish("preference_data")
    texts = [(c, k) for c in held for k in range(len(c.responses))]
    encoded = [reward.reader.encode(c.prompt, c.responses[k], c.finished[k]) for c, k in texts]
    scores = reward_reader.scores_of(reward.model, encoded, config.micro_batch_size, check.device)
    found = {(id(c), k): s for (c, k), s in zip(texts, scores, strict=True)}
    pairs = [
        (c, i, j)
        for c in held
        for i in range(len(c.responses))
        for j in range(len(c.responses))
        if c.scores[i] > c.scores[j]
    ]
    if not pairs:
        raise Doubt(f"preference_data={config.preference_data} holds out no pair that differs")
    # Imported here: `evaluate` takes 2.5 s, which --help and refused settings should not pay.
    from utils.intervals import pair_accuracy

    prompts = [str(splits.place(p[0], "")) for p in pairs]
    ours = pair_accuracy(*([found[id(p[0]), p[k]] for p in pairs] for k in (1, 2)), prompts)
    lengths = ([float(len(p[0].responses[p[k]])) for p in pairs] for k in (1, 2))
    longer = pair_accuracy(*lengths, prompts)
    return {
        "accuracy": ours["accuracy"],
        "accuracy_low": ours["low"],
        "accuracy_high": ours["high"],
        "accuracy_longer_answer": longer["accuracy"],
        "pairs": ours["pairs"],
    }


def prompts_are_apart(check) -> str:
    """Training and held-out prompts share none; few are cut at the limit or come twice."""
    limit, tokenizer = check.config.max_prompt_length, check.models.tokenizer
    # By hashes: the tokens of a million prompts would take gigabytes.
    train, held = ([hash(tuple(p.ids)) for p in part] for part in (check.prompts, check.held))
    shared = len(set(train) & set(held))
    whole = [chat_template.encode_prompt(tokenizer, p.messages) for p in check.held]
    cut = sum(len(ids) > limit for ids in whole) / len(whole)
    twice = 1 - len(set(train)) / len(train)
    text = (
        f"{len(train)} training and {len(held)} held-out prompts, {shared} of them in both; "
        f"{cut:.1%} of the latter are cut to --max_prompt_length {limit}; {twice:.1%} of the "
        "former come again"
    )
    if shared > 0.05 * len(set(held)):
        raise Fault(f"{text}: evaluation would be of what was trained on; name other held-out data")
    weighted = any(w > 1 for w in check.config.data_weights)
    if shared or cut > 0.2 or (twice > 0.5 and not weighted):
        raise Doubt(f"{text}; raise --max_prompt_length, or look at the data for duplicates")
    return text
