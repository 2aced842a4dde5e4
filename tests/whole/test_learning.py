"""Values that must be reached: returns of a chain, and tasks whose best policy is known.

Scores here are functions of the answer; rollouts, experience and updates are step 3's own.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from step3_ppo import algorithm, update
from step3_ppo.advantages import gae
from step3_ppo.checks.watch import Watch
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from tests.helpers.jobs import ppo
from tests.helpers.running import metrics_of, run_ranks
from tests.helpers.small_models import Engine, TableActor, TableCritic, config_of, rollout_of
from utils.run import BadSteps

CPU = torch.device("cpu")
VOCABULARY, STOP, RIGHT = 8, 2, 5
START = VOCABULARY  # stands in prompts and is never drawn
LONGEST, ROWS = 4, 128


# The critic.


@pytest.mark.parametrize("gamma, length, lam", [(0.9, 100, 0.95), (0.5, 40, 0.0), (1.0, 12, 0.95)])
def test_the_critic_reaches_the_sum_of_discounted_rewards(gamma, length, lam):
    """Reward 1 a step. Far from the end that is the endless chain's 1 / (1 − γ)."""
    values = torch.zeros(1, length, requires_grad=True)
    rewards, mask = torch.ones(1, length), torch.ones(1, length, dtype=torch.bool)
    optimizer = torch.optim.SGD([values], lr=0.5)
    for _ in range(60):
        before = values.detach().clone()
        _, returns = gae(rewards, before, mask, gamma, lam)
        for _ in range(4):
            loss, _ = algorithm.value_loss(values, before, returns, mask, 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = [sum(gamma**k for k in range(length - t)) for t in range(length)]
    assert values[0].tolist() == pytest.approx(expected, abs=1e-3)
    if gamma < 1:
        assert values[0, 0].item() == pytest.approx(1 / (1 - gamma), abs=1e-3)


def test_the_critic_reaches_the_expected_score_in_step_3_s_updates():
    """A uniform policy begins with the right token once in eight, so V at the start is 1/8."""
    models = models_of("ppo", actor_rate=0.0, critic_rate=0.02)
    settings = dict(kl_coef=0.0, lam=1.0, ppo_epochs=4)
    history = []
    for step in range(50):
        learn(models, sampled(models, step, right_first_token), step, **settings)
        history.append(models.critic.module.table[START].item())
    # Samples make it tremble.
    assert sum(history[-25:]) / 25 == pytest.approx(1 / VOCABULARY, abs=0.02)


# The policy.


def models_of(name: str, actor_rate: float = 0.1, critic_rate: float = 0.1):
    has_critic = algorithm.ALGORITHMS[name].critic
    critic = Engine(TableCritic(VOCABULARY + 1), critic_rate) if has_critic else None
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=STOP),
        actor=Engine(TableActor(VOCABULARY + 1, VOCABULARY), actor_rate),
        critic=critic,
        ptx=None,
        ema=None,
        nucleus=None,
    )


def sampled(models, step: int, score_of) -> list[dict]:
    """Answers drawn from the actor's table after START, up to STOP or LONGEST tokens."""
    generator = torch.Generator().manual_seed(step)
    logs = models.actor.module.table.detach().log_softmax(-1)
    values = torch.zeros(len(logs))
    if models.critic is not None:
        values = models.critic.module.table.detach()
    path = [torch.full((ROWS,), START)]
    for _ in range(LONGEST):
        path.append(torch.multinomial(logs[path[-1]].exp(), 1, generator=generator).squeeze(1))
    rows = []
    for start, *tokens in torch.stack(path, 1).tolist():
        answer = tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens
        before = [start, *answer[:-1]]
        rows.append(
            {
                "prompt": [start],
                "response": answer,
                "logprobs": logs[before, answer].tolist(),
                "ref_logprobs": [math.log(1 / VOCABULARY)] * len(answer),  # where the table began
                "values": values[before].tolist(),
                "score": score_of(answer),
                "finished": answer[-1] == STOP,
                "group": len(rows) // 8,
            }
        )
    return rows


def learn(models, rows, step: int, **settings) -> dict[str, float]:
    config = config_of(
        prompts_per_rollout=ROWS, micro_batch_size=64, **({"global_batch_size": ROWS} | settings)
    )
    experience, metrics = make_experience(rollout_of(rows), config, State(kl_coef=config.kl_coef))
    watch = Watch(config, print, BadSteps(5, print, lambda: None))
    return metrics | update.train_on(models, experience, config, CPU, step, watch)


ALGORITHMS = {
    "ppo": {"ppo_epochs": 4, "global_batch_size": 32},
    "ppo, sequence": {"ppo_epochs": 4, "global_batch_size": 32, "action_level": "sequence"},
    "ppo, dual clip": {"ppo_epochs": 4, "clip_ratio_high": 0.28, "dual_clip": 3.0},
    "a2c": {"algorithm": "a2c"},
    "a2c, sequence": {"algorithm": "a2c", "action_level": "sequence"},
    "reinforce": {"algorithm": "reinforce"},
    "reinforce, sequence": {"algorithm": "reinforce", "action_level": "sequence"},
    "rloo, k2": {"algorithm": "rloo", "kl_in": "loss", "kl_estimator": "k2"},
    "rloo, k3": {"algorithm": "rloo", "kl_in": "loss"},
    **{
        name: {"algorithm": name, "global_batch_size": 64}
        for name, method in algorithm.ALGORITHMS.items()
        if not method.one_step and not method.critic and not method.greedy
    },
}


def right_first_token(answer) -> float:
    return float(answer[0] == RIGHT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_right_first_token_is_learned(name):
    settings = ALGORITHMS[name]
    models = models_of(settings.get("algorithm", "ppo"))
    for step in range(40):
        learn(models, sampled(models, step, right_first_token), step, kl_coef=0.0, **settings)
    answers = sampled(models, 1000, right_first_token)
    assert sum(row["score"] for row in answers) / len(answers) >= 0.95
    assert models.actor.module.table.softmax(-1)[START, RIGHT].item() >= 0.95


@pytest.mark.parametrize("name", ["ppo", "ppo, sequence", "a2c", "reinforce"])
def test_a_later_reward_reaches_the_token_that_earned_it(name):
    """The score comes at the end, for a path through three states: 5, then 6, then stop."""
    settings = ALGORITHMS[name]
    models = models_of(settings.get("algorithm", "ppo"))

    def score(answer):
        return sum(a == b for a, b in zip(answer, (RIGHT, 6, STOP), strict=False)) / 3

    for step in range(60):
        learn(models, sampled(models, step, score), step, kl_coef=0.0, **settings)
    answers = sampled(models, 1000, score)
    assert sum(row["score"] for row in answers) / len(answers) >= 0.95


@pytest.mark.parametrize(
    "name", ["ppo", "ppo, sequence", "a2c", "reinforce", "rloo", "rloo, k2", "rloo, k3"]
)
def test_the_kl_holds_the_policy_where_the_closed_form_says(name):
    """The best policy under score − β KL is π ∝ reference · exp(score / β) (Ziegler et al. 2019),
    over answers; here the score is for the first token alone. With k3 in the loss, whose gradient
    is that of KL(reference ‖ policy), it is where p (score − mean) = β (p − q)."""
    beta = 0.5
    settings = ALGORITHMS[name] | {"kl_coef": beta, "whiten_advantages": False, "lam": 1.0}
    models = models_of(settings.get("algorithm", "ppo"), actor_rate=0.03)
    history = []
    for step in range(70):
        learn(models, sampled(models, step, right_first_token), step, **settings)
        history.append(models.actor.module.table.detach().softmax(-1)[START])
    found = torch.stack(history[-30:]).mean(0)  # samples make it tremble
    weight = math.exp(1 / beta)
    best = weight / (weight + VOCABULARY - 1)
    if name == "rloo, k3":
        best = (1 - beta + math.sqrt((1 - beta) ** 2 + 4 * beta / VOCABULARY)) / 2
    assert found[RIGHT].item() == pytest.approx(best, abs=0.04)
    others = [found[x].item() for x in range(VOCABULARY) if x != RIGHT]
    assert others == pytest.approx([(1 - best) / (VOCABULARY - 1)] * 7, abs=0.03)


def test_the_penalty_of_cut_answers_teaches_to_stop():
    """Where the scores lie far below −1, as real reward models' do."""
    models = models_of("ppo")

    def score(answer):
        return right_first_token(answer) - 6

    ended = sum(row["finished"] for row in sampled(models, 1000, score))
    assert 0.3 * ROWS < ended < 0.5 * ROWS, "1 − (7/8)⁴ of them, before"
    for step in range(40):
        rows = sampled(models, step, score)
        learn(models, rows, step, ppo_epochs=4, missing_eos_penalty=1.0, kl_coef=0.0)
    answers = sampled(models, 1000, score)
    assert sum(row["finished"] for row in answers) >= 0.95 * ROWS
    assert sum(row["score"] for row in answers) / ROWS >= -5.1, "and to say the right thing"


def test_step_3_learns_what_a_reward_function_pays_for(tiny, tmp_path):
    """From random weights, on held-out prompts, by each algorithm: answers that begin as asked."""
    wanted = "aeioust"
    (tmp_path / "own.py").write_text(
        "def begins_right(prompts, responses, rows):\n"
        f"    return [float(r[:1] in tuple({wanted!r})) for r in responses]\n"
    )
    settings = dict(
        reward_function=f"{tmp_path / 'own.py'}:begins_right",
        max_steps=30,
        prompts_per_rollout=64,
        global_batch_size=64,
        micro_batch_size=64,
        max_response_length=3,
        eval_fraction=0.3,
        max_eval_rows=64,
        learning_rate=2e-2,
        lr_schedule="constant",
        kl_coef=0.0,
        ema_decay=0.0,
        self_check="off",
    )
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    jobs = {
        "ppo": [],
        "sequence": ["--action_level", "sequence"],
        "a2c": ["--algorithm", "a2c", "--ppo_epochs", 1],
        "reinforce": ["--algorithm", "reinforce", "--ppo_epochs", 1],
    }
    run_ranks(
        [ppo(tiny, tiny / "base_model", "", tmp_path / n, *flags, *own) for n, own in jobs.items()],
        1,
    )
    for name in jobs:
        before, after = metrics_of(tmp_path / name, "eval/score")
        assert before < 0.3 and after >= 0.95, f"{name}: {before} → {after}"
