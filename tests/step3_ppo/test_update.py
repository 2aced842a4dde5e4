"""One optimizer step against losses written answer by answer: whole answers as actions, the
pretraining loss, and that no split into ranks and micro-batches changes a gradient."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import log_softmax

from step3_ppo import ptx, update
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from tests.helpers.small_models import Engine, config_of, drawn_rows, rollout_of
from utils.data import batches, fitting
from utils.data.chat_template import Encoded
from utils.distributed import process_group
from utils.models.scalar_model import ScalarModel

VOCABULARY, KL_COEF = 20, 0.3
CPU = torch.device("cpu")
MINIBATCH = [7, 2, 11, 0, 5, 9, 4, 10]  # of a rollout of twelve


def build_llama(seed: int, labels: int | None = None):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=labels or 2,
    )
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    return auto.from_config(settings)


@pytest.fixture
def models():
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        actor=Engine(build_llama(1)),
        critic=Engine(ScalarModel(build_llama(2, labels=1))),
        ptx=None,
        ema=None,
        nucleus=None,
    )


def on_its_own(model, ids):
    """(T,V) log-probabilities of the next token after each of `ids`, one row without padding."""
    return log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def answer_logprobs(model, row):
    ids = row["prompt"] + row["response"]
    logs, start = on_its_own(model, ids), len(row["prompt"])
    return [logs[start + t - 1, x] for t, x in enumerate(row["response"])]


def values_of(critic, row):
    """V before each response token: read where the token before it is the last."""
    ids = row["prompt"] + row["response"]
    hidden = critic.classifier.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    values = hidden.double() @ critic.classifier.score.weight[0].double()
    return list(values[len(row["prompt"]) - 1 : -1])


def rows_near(models):
    """Twelve rows whose stored numbers are a little off what the models now say."""
    rows = drawn_rows(12, VOCABULARY, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for row in rows:
            for name, now in (
                ("logprobs", answer_logprobs(models.actor.module, row)),
                ("values", values_of(models.critic.module, row)),
            ):
                noise = 0.15 * torch.randn(len(now), generator=generator)
                row[name] = [float(x) + e for x, e in zip(now, noise.tolist(), strict=True)]
            moves = 0.5 * torch.randn(len(row["logprobs"]), generator=generator)
            row["ref_logprobs"] = (torch.tensor(row["logprobs"]) + moves).tolist()
    return rows


def gradients(models, rows, world=1, **settings):
    """One optimizer step's gradients of actor and critic, and its metrics, as `world` ranks add
    them up, each in its turn."""
    config = config_of(prompts_per_rollout=len(rows), global_batch_size=len(MINIBATCH), **settings)
    experience, _ = make_experience(rollout_of(rows), config, State(kl_coef=KL_COEF))
    totals: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "world_size", lambda: world)
        patch.setattr(process_group, "sum_over_ranks", lambda values, device: list(values))
        for rank in range(world):
            patch.setattr(process_group, "rank", lambda rank=rank: rank)
            if models.ptx is not None:
                models.ptx.steps = 0
            found = update.step_actor(models, experience, MINIBATCH, config, CPU)
            if models.critic is not None:
                found |= update.step_critic(models.critic, experience, MINIBATCH, config, CPU)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value
    critic = models.critic.gradient() if models.critic is not None else None
    return models.actor.gradient(), critic, totals


def gradient_by_hand(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([g.flatten() for g in found])


def assert_equal(actual, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


def clip(x, low, high):
    return min(max(x, low), high)


# A whole answer as one action.


def bandit(rows, whiten):
    """InstructGPT's text as a bandit: advantage = score − β KL − V(prompt), of each answer."""
    returns = [
        row["score"]
        - KL_COEF * sum(a - b for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True))
        for row in rows
    ]
    advantages = [r - row["values"][0] for r, row in zip(returns, rows, strict=True)]
    if whiten:
        mean = sum(advantages) / len(rows)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(rows))
        advantages = [(a - mean) / deviation for a in advantages]
    return advantages, returns


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "reinforce"])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_whole_answer_as_one_action_is_a_bandit(models, algorithm, whiten):
    rows = rows_near(models)
    critic = models.critic.module
    if algorithm == "reinforce":
        models.critic = None
        rows = [row | {"values": [0.0] * len(row["values"])} for row in rows]
    advantages, returns = bandit(rows, whiten)
    policy, value, ratios = 0.0, 0.0, []
    for i in MINIBATCH:
        row, a = rows[i], advantages[i]
        new = sum(answer_logprobs(models.actor.module, row))
        ratio = (new - sum(row["logprobs"])).exp()
        ratios.append(ratio.item())
        if algorithm == "ppo":
            policy -= min(ratio * a, clip(ratio, 0.8, 1.2) * a)
        else:
            policy -= new * a
        v, old = values_of(critic, row)[0], row["values"][0]
        near = clip(v, old - 0.2, old + 0.2) if algorithm == "ppo" else v
        value += max((v - returns[i]) ** 2, (near - returns[i]) ** 2) / 2
    # Per answer, not per token.
    policy, value = policy / len(MINIBATCH), value / len(MINIBATCH)
    assert min(ratios) < 0.8 and max(ratios) > 1.2, "both clips are tried"
    settings = dict(action_level="sequence", whiten_advantages=whiten, clip_value=0.2)
    actor, critics, metrics = gradients(models, rows, algorithm=algorithm, **settings)
    assert_equal(actor, gradient_by_hand(policy, models.actor.module).float())
    assert metrics["policy_loss"] == pytest.approx(policy.item(), rel=1e-4, abs=1e-5)
    assert metrics["ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    if algorithm == "ppo":
        share = sum(r < 0.8 or r > 1.2 for r in ratios) / len(ratios)
        assert metrics["clip_fraction"] == pytest.approx(share)
    if algorithm != "reinforce":
        assert_equal(critics, gradient_by_hand(value, critic).float())
        assert metrics["value_loss"] == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize("clip_value", [0.2, 0.0])
def test_tokens_as_actions_by_hand(models, clip_value):
    """The same of the default: a loss per token, over all tokens of the minibatch."""
    room = clip_value or math.inf
    rows = rows_near(models)
    config = config_of(prompts_per_rollout=len(rows))
    experience, _ = make_experience(rollout_of(rows), config, State(kl_coef=KL_COEF))
    policy, value, count = 0.0, 0.0, 0
    for i in MINIBATCH:
        row = rows[i]
        values = values_of(models.critic.module, row)
        for t, new in enumerate(answer_logprobs(models.actor.module, row)):
            a, target = (x[i, t].item() for x in (experience.advantages, experience.returns))
            ratio = (new - row["logprobs"][t]).exp()
            policy -= min(ratio * a, clip(ratio, 0.8, 1.2) * a)
            near = clip(values[t], row["values"][t] - room, row["values"][t] + room)
            value += max((values[t] - target) ** 2, (near - target) ** 2) / 2
            count += 1
    actor, critic, metrics = gradients(models, rows, clip_value=clip_value)
    assert_equal(actor, gradient_by_hand(policy / count, models.actor.module).float())
    assert_equal(critic, gradient_by_hand(value / count, models.critic.module).float())
    assert metrics["policy_loss"] == pytest.approx(policy.item() / count, rel=1e-4, abs=1e-5)


# Answers compared in groups, three normalisations, the KL in the loss.


def group_of(i: int) -> int:
    return i % 5


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "cispo", "dr_grpo"])
def test_group_methods_by_hand(models, algorithm, normalisation):
    """Shao et al. 2024, equation 3, and what the others change in it: each answer's advantage in
    its group, spread over the rollout, times a ratio, and β k3 of each token."""
    rows = [row | {"group": group_of(i)} for i, row in enumerate(rows_near(models))]
    models.critic, total, kl_total = None, 0.0, 0.0
    lengths = [len(rows[i]["response"]) for i in MINIBATCH]
    for i in MINIBATCH:
        row = rows[i]
        own = [other["score"] for j, other in enumerate(rows) if group_of(j) == group_of(i)]
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in own) / (len(own) - 1))
        a = row["score"] - mean
        a = a if algorithm == "dr_grpo" else a / (deviation + 1e-4)
        new = answer_logprobs(models.actor.module, row)
        moves = [x - old for x, old in zip(new, row["logprobs"], strict=True)]
        terms, kls = [], []
        for x, move, ref in zip(new, moves, row["ref_logprobs"], strict=True):
            ratio = (sum(moves) / len(moves)).exp() if algorithm == "gspo" else move.exp()
            if algorithm == "cispo":
                terms.append(-clip(ratio.item(), 0.9, 1.1) * a * x)
            else:
                terms.append(-min(ratio * a, clip(ratio, 0.9, 1.1) * a))
            kls.append((ref - x).exp() - 1 + x - ref)
        divisor = {
            "token": sum(lengths),
            "sequence": len(MINIBATCH) * len(new),
            "constant": len(MINIBATCH) * 10,
        }[normalisation]
        total += (sum(terms) + KL_COEF * sum(kls)) / divisor
        kl_total += sum(kls).item() / divisor
    settings = dict(algorithm=algorithm, loss_normalisation=normalisation, clip_ratio=0.1)
    settings |= dict(samples_per_prompt=2, max_response_length=10)
    actor, _, metrics = gradients(models, rows, **settings)
    assert_equal(actor, gradient_by_hand(total, models.actor.module).float())
    assert metrics["kl_in_loss"] == pytest.approx(kl_total, rel=1e-4)
    loss = metrics["policy_loss"] + KL_COEF * metrics["kl_in_loss"]
    assert loss == pytest.approx(total.item(), rel=1e-4, abs=1e-5)


def test_an_answer_that_is_one_action_pays_for_the_kl_of_all_its_tokens(models):
    """RLOO's bandit with k2 in the loss: one ratio, one advantage, and the sum of its KL."""
    rows = [row | {"group": group_of(i)} for i, row in enumerate(rows_near(models))]
    models.critic, total = None, 0.0
    for i in MINIBATCH:
        row = rows[i]
        same = [j for j in range(12) if group_of(j) == group_of(i) and j != i]
        a = row["score"] - sum(rows[j]["score"] for j in same) / len(same)
        new = answer_logprobs(models.actor.module, row)
        ratio = (sum(new) - sum(row["logprobs"])).exp()
        total -= min(ratio * a, clip(ratio, 0.8, 1.2) * a)
        total += KL_COEF * sum(
            (x - ref) ** 2 / 2 for x, ref in zip(new, row["ref_logprobs"], strict=True)
        )
    settings = dict(algorithm="rloo", action_level="sequence", kl_in="loss", kl_estimator="k2")
    actor, _, _ = gradients(models, rows, samples_per_prompt=2, **settings)
    expected = gradient_by_hand(total / len(MINIBATCH), models.actor.module)
    assert_equal(actor, expected.float())


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_masked_answers_are_compared_and_not_learned_from(models, normalisation):
    """DAPO's overlong filtering: their scores count in their group, their tokens not in the loss;
    what the sum is divided by counts the others (a constant length: all answers)."""
    rows = [row | {"group": group_of(i)} for i, row in enumerate(rows_near(models))]
    models.critic, total, kept = None, 0.0, [i for i in MINIBATCH if rows[i]["finished"]]
    assert 2 < len(kept) < len(MINIBATCH)
    for i in kept:
        own = [other["score"] for j, other in enumerate(rows) if group_of(j) == group_of(i)]
        a, new = (
            rows[i]["score"] - sum(own) / len(own),
            answer_logprobs(models.actor.module, rows[i]),
        )
        ratios = [(x - old).exp() for x, old in zip(new, rows[i]["logprobs"], strict=True)]
        divisor = {
            "token": sum(len(rows[j]["response"]) for j in kept),
            "sequence": len(kept) * len(new),
            "constant": len(MINIBATCH) * 10,
        }[normalisation]
        total -= sum(min(r * a, clip(r, 0.8, 1.2) * a) for r in ratios) / divisor
        total += (
            KL_COEF
            * sum(
                (ref - x).exp() - 1 + x - ref
                for x, ref in zip(new, rows[i]["ref_logprobs"], strict=True)
            )
            / divisor
        )
    settings = dict(algorithm="dr_grpo", loss_normalisation=normalisation, mask_cut_answers=True)
    settings |= dict(samples_per_prompt=2, max_response_length=10)
    expected = gradient_by_hand(total, models.actor.module).float()
    for world in (1, 2):
        actor, _, _ = gradients(models, rows, world=world, micro_batch_size=2, **settings)
        assert_equal(actor, expected)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++", "grpo"])
def test_where_every_answer_is_cut_nothing_is_learned(models, algorithm):
    rows = [row | {"finished": False, "group": i // 2} for i, row in enumerate(rows_near(models))]
    settings = dict(algorithm=algorithm, mask_cut_answers=True, samples_per_prompt=2)
    if algorithm != "ppo":
        models.critic = None
    actor, critic, metrics = gradients(models, rows, **settings)
    assert not actor.any() and (critic is None or not critic.any())
    assert all(math.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_engine_that_samples_from_another_distribution_is_weighed(models, level):
    """Yao et al. 2025: min(π / π_engine, 1.1) before each term of the policy's loss, not of the KL;
    where the engine agrees nothing changes."""
    rows = [row | {"group": group_of(i)} for i, row in enumerate(rows_near(models))]
    for i, row in enumerate(rows):
        moves = [0.1 * ((t + i) % 5 - 2) + 0.06 * (-1) ** i for t in range(len(row["response"]))]
        row["engine"] = [x + m for x, m in zip(row["logprobs"], moves, strict=True)]
    models.critic, total, weights = None, 0.0, []
    for i in MINIBATCH:
        row, new = rows[i], answer_logprobs(models.actor.module, rows[i])
        same = [rows[j]["score"] for j in range(12) if group_of(j) == group_of(i) and j != i]
        a, old, engine = row["score"] - sum(same) / len(same), row["logprobs"], row["engine"]
        kl = sum((x - ref) ** 2 / 2 for x, ref in zip(new, row["ref_logprobs"], strict=True))
        if level == "sequence":
            new, old, engine = [sum(new)], [sum(old)], [sum(engine)]
        for x, before, drawn in zip(new, old, engine, strict=True):
            weights.append(min(math.exp(before - drawn), 1.1))
            ratio = (x - before).exp()
            total -= weights[-1] * min(ratio * a, clip(ratio, 0.8, 1.2) * a)
        total += KL_COEF * kl
    assert min(weights) < 0.95 and max(weights) == 1.1
    settings = dict(algorithm="rloo", action_level=level, kl_in="loss", kl_estimator="k2")
    settings |= dict(samples_per_prompt=2)
    actor, _, _ = gradients(models, rows, importance_cap=1.1, **settings)
    expected = gradient_by_hand(total / len(weights), models.actor.module)
    assert_equal(actor, expected.float())
    agreeing = [row | {"engine": row["logprobs"]} for row in rows]
    one, other = (gradients(models, agreeing, importance_cap=c, **settings)[0] for c in (0.0, 1.1))
    assert torch.equal(one, other) and not torch.equal(one, actor)


# An environment's turns between the policy's.


def with_turns(rows):
    """Rows of which some tokens are an environment's: first, in the middle and last."""
    for i, row in enumerate(rows):
        n = len(row["response"])
        row["actions"] = [n == 1 or (t + i) % 3 != 0 for t in range(n)]
    return rows


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_an_environments_tokens_are_read_and_not_learned(models, algorithm, level):
    """The loss over the policy's tokens alone, written row by row, with the environment's in the
    context; what was stored at these changes nothing."""
    rows = with_turns(rows_near(models))
    assert sum(not all(row["actions"]) for row in rows) > 5
    settings = dict(algorithm=algorithm, action_level=level, whiten_advantages=False)
    settings |= dict(gamma=0.9, lam=0.8)
    policy, value, count = 0.0, 0.0, 0
    for i in MINIBATCH:
        row = rows[i]
        at = [t for t, acts in enumerate(row["actions"]) if acts]
        new = [answer_logprobs(models.actor.module, row)[t] for t in at]
        old, ref, stored = ([row[x][t] for t in at] for x in ("logprobs", "ref_logprobs", "values"))
        values = [values_of(models.critic.module, row)[t] for t in at]
        rewards = [-KL_COEF * (a - b) for a, b in zip(old, ref, strict=True)]
        rewards[-1] += row["score"]
        if level == "sequence":
            new, old, rewards = [sum(new)], [sum(old)], [sum(rewards)]
            values, stored = values[:1], stored[:1]
        advantage, following = 0.0, 0.0
        for t in reversed(range(len(new))):
            advantage = rewards[t] + 0.9 * following - stored[t] + 0.9 * 0.8 * advantage
            following = stored[t]
            ratio = (new[t] - old[t]).exp()
            if algorithm == "ppo":
                policy -= min(ratio * advantage, clip(ratio, 0.8, 1.2) * advantage)
            else:
                policy -= new[t] * advantage
            value += (values[t] - advantage - stored[t]) ** 2 / 2
            count += 1
    actor, critic, metrics = gradients(models, rows, **settings)
    assert_equal(actor, gradient_by_hand(policy / count, models.actor.module).float())
    assert_equal(critic, gradient_by_hand(value / count, models.critic.module).float())
    assert metrics["policy_loss"] == pytest.approx(policy.item() / count, rel=1e-4, abs=1e-5)
    for row in rows:
        for name in ("logprobs", "ref_logprobs", "values"):
            numbers = zip(row[name], row["actions"], strict=True)
            row[name] = [x if acts else 99.0 for x, acts in numbers]
    other_actor, other_critic, _ = gradients(models, rows, **settings)
    assert torch.equal(actor, other_actor) and torch.equal(critic, other_critic)


# The pretraining loss beside PPO's.


def examples():
    """Nine rows of several lengths: a third supervised throughout, the others in their answers."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(9):
        length = 3 + 2 * i % 7
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Encoded(ids, [i % 3 == 0 or t >= 2 for t in range(length)]))
    return ptx.Examples(rows, fitting.Counts())


def test_the_ptx_gradient_is_the_coefficient_times_that_of_the_mean_nll(models):
    rows, coefficient = rows_near(models), 1.7
    without, critic, _ = gradients(models, rows)
    models.ptx = examples()
    together, same, metrics = gradients(models, rows, ptx_coef=coefficient, ptx_data=["-"])
    chosen = batches.rows_of_step(0, len(MINIBATCH), 9, config_of().seed)
    losses = []
    for i in chosen:
        row = models.ptx.rows[i]
        logs = on_its_own(models.actor.module, row.ids)
        # The first token follows nothing, so nothing predicts it.
        losses += [-logs[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.supervised[t]]
    mean = sum(losses) / len(losses)
    expected = coefficient * gradient_by_hand(mean, models.actor.module)
    assert_equal(together - without, expected.float())
    assert torch.equal(critic, same)
    assert metrics["ptx_loss"] == pytest.approx(mean.item(), rel=1e-5)


def test_each_optimizer_step_takes_the_next_ptx_rows(models):
    models.ptx = examples()
    config = config_of(global_batch_size=4, ptx_coef=1.0, ptx_data=["-"], micro_batch_size=2)
    for step in range(4):
        ptx.add_gradient(models.actor, models.ptx, config, 0, CPU)
        actual = models.actor.gradient()
        chosen = [models.ptx.rows[i] for i in batches.rows_of_step(step, 4, 9, config.seed)]
        ptx.add_gradient(models.actor, ptx.Examples(chosen, fitting.Counts()), config, 0, CPU)
        assert_equal(actual, models.actor.gradient())


# Splits.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"action_level": "sequence"},
        {"algorithm": "a2c"},
        {"ptx_coef": 2.0, "ptx_data": ["-"]},
        {"action_level": "sequence", "clip_ratio_high": 0.28, "dual_clip": 3.0, "ptx_coef": 2.0},
        {"algorithm": "grpo"},
        {"algorithm": "gspo", "clip_ratio": 0.1, "loss_normalisation": "token"},
        {"algorithm": "dr_grpo", "kl_estimator": "k2"},
    ],
    ids=lambda s: "+".join(map(str, s.values())) or "defaults",
)
def test_no_split_into_ranks_and_micro_batches_changes_a_gradient(models, settings):
    rows = [row | {"group": group_of(i)} for i, row in enumerate(rows_near(models))]
    if "ptx_coef" in settings:
        models.ptx = examples()
    found = {
        (world, micro): gradients(models, rows, world=world, micro_batch_size=micro, **settings)
        for world, micro in itertools.product((1, 2, 4), (1, 2, 8))
        if world * micro <= len(MINIBATCH)
    }
    actor, critic, metrics = found[1, 8]
    # By tokens: one row each, some of several, all at once.
    for world, tokens in itertools.product((1, 2), (1, 15, 999)):
        found[world, f"{tokens} tokens"] = gradients(
            models, rows, world=world, micro_batch_tokens=tokens, **settings
        )
    assert len(found) == 13 and actor.abs().max() > 1e-3 and critic.abs().max() > 1e-3
    for split, (other_actor, other_critic, others) in found.items():
        message = f"{split[0]} ranks, micro-batches of {split[1]}"
        torch.testing.assert_close(other_actor, actor, rtol=1e-4, atol=2e-6, msg=message)
        torch.testing.assert_close(other_critic, critic, rtol=1e-4, atol=2e-6, msg=message)
        for name in ("policy_loss", "value_loss", "ratio", "value_gap"):
            assert others[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), message


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_distance_and_loss_are_those_of_the_rows_answer_by_answer(models, normalisation):
    rows = rows_near(models)
    settings = dict(algorithm="trpo", loss_normalisation=normalisation, micro_batch_size=3)
    config = config_of(prompts_per_rollout=12, global_batch_size=len(MINIBATCH), **settings)
    experience, _ = make_experience(rollout_of(rows), config, State(kl_coef=0.1))
    tokens = sum(len(rows[i]["response"]) for i in MINIBATCH)
    normaliser = tokens if normalisation == "token" else len(MINIBATCH)
    found = update.distance_and_loss(models, experience, MINIBATCH, normaliser, config, CPU)
    kl = loss = 0.0
    with torch.no_grad():
        for i in MINIBATCH:
            new = [float(x) for x in answer_logprobs(models.actor.module, rows[i])]
            for t, (now, old) in enumerate(zip(new, rows[i]["logprobs"], strict=True)):
                ratio = math.exp(now - old)
                kl += (ratio - 1 - math.log(ratio)) / tokens
                share = 1 / tokens if normalisation == "token" else 1 / (len(new) * len(MINIBATCH))
                loss -= ratio * float(experience.advantages[i, t]) * share
    assert found == pytest.approx((kl, loss), rel=1e-4, abs=1e-6)
    assert abs(loss) > 1e-3 and kl > 1e-3
