"""Which answers a rollout has: drawn again where a group teaches nothing, and greedy ones."""

from types import SimpleNamespace

import pytest
import torch

from step3_ppo import drawing, rollout
from step3_ppo.experience import make_experience
from step3_ppo.rollout import Prompt
from step3_ppo.state import State
from tests.helpers.small_models import config_of, drawn_rows, rollout_of

PROMPTS, COPIES, EACH = 40, 3, 6


def prompts_of(count: int):
    return [Prompt((), f"p{i}", {}, [1 + i] * (1 + i % 4)) for i in range(count)]


class Sampler:
    """In the place of rollout.collect: prompt i's answers differ with probability `lively`, by the
    noise of the call alone; a prompt's only token says which it is."""

    def __init__(self, lively: float, monkeypatch):
        self.lively, self.calls = lively, []
        monkeypatch.setattr(rollout, "collect", self)

    def __call__(self, models, prompts, config, device, noise_step, copies=1, greedy=False):
        self.calls.append((noise_step, len(prompts), greedy))
        generator = torch.Generator().manual_seed(noise_step % 2**40)
        rows = drawn_rows(len(prompts), 50, seed=noise_step % 2**31, longest=3 + noise_step % 5)
        alike = torch.rand(len(prompts) // copies, generator=generator) >= self.lively
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            row |= {"prompt": prompt.ids, "group": i // copies}
            row["score"] = 100.0 + prompt.ids[0] if greedy else row["score"]
            row["score"] = 1.0 if alike[i // copies] and not greedy else row["score"]
        means = {"score_function/a": float(len(self.calls))}
        return rollout_of(rows), {"seconds_generate": 1.0, "seconds_score": 2.0} | means


def drawn(lively, monkeypatch, step=5, **settings):
    given = dict(algorithm="grpo", samples_per_prompt=COPIES, prompts_per_rollout=EACH)
    config = config_of(**(given | settings))
    sampler = Sampler(lively, monkeypatch)
    return sampler, *drawing.draw(SimpleNamespace(), prompts_of(PROMPTS), config, None, step)


def is_alike(found, group: int) -> bool:
    scores = [
        s for s, g in zip(found.scores.tolist(), found.group.tolist(), strict=True) if g == group
    ]
    assert len(scores) == COPIES
    return len(set(scores)) == 1


@pytest.mark.parametrize("rounds, lively", [(0, 0.5), (1, 0.5), (3, 0.3), (20, 0.5), (2, 0.0)])
def test_groups_alike_give_way_to_others_so_many_times(rounds, lively, monkeypatch):
    sampler, found, asked, greedy, metrics = drawn(lively, monkeypatch, dynamic_sampling=rounds)
    assert greedy is None and found.group.tolist() == [i // COPIES for i in range(EACH * COPIES)]
    for row, prompt in enumerate(asked):
        assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == prompt.ids, (
            "its own answer"
        )
        assert asked[row // COPIES * COPIES] is prompt, "one prompt for the whole group"
    # Played by hand: a group that is alike takes the next of the round's answers.
    generator = torch.Generator().manual_seed(5)
    alike = [bool(x) for x in torch.rand(EACH, generator=generator) >= lively]
    sizes = [EACH]
    for again in range(1, rounds + 1):
        if not any(alike):
            break
        generator = torch.Generator().manual_seed((2**32 * again + 5) % 2**40)
        new = iter((torch.rand(sum(alike), generator=generator) >= lively).tolist())
        sizes.append(sum(alike))
        alike = [bool(next(new)) if was else False for was in alike]
    assert [is_alike(found, g) for g in range(EACH)] == alike
    assert [n for _, n, _ in sampler.calls] == [COPIES * n for n in sizes]
    assert metrics["seconds_generate"] == len(sizes)
    mean = sum(n * call for call, n in enumerate(sizes, 1)) / sum(sizes)
    assert metrics["score_function/a"] == pytest.approx(mean), "over all that was sampled"
    assert metrics.get("groups_drawn") == (sum(sizes) if rounds else None)
    # No column that is padding in every row, as where nothing was drawn again.
    assert found.response_mask.any(0).all() and found.prompt_mask.any(0).all()


def test_every_draw_has_noise_and_prompts_of_its_own(monkeypatch):
    """Whatever was drawn before: what a resumed run draws is a function of step and round."""
    noises, first = [], {}
    for steps in (range(4), range(3, 5)):
        for step in steps:
            sampler, found, asked, *_ = drawn(0.0, monkeypatch, step=step, dynamic_sampling=3)
            again = first.setdefault(step, (sampler.calls, [p.where for p in asked], found.scores))
            assert again[0] == sampler.calls and again[1] == [p.where for p in asked]
            assert torch.equal(again[2], found.scores)
    noises = [noise for calls, *_ in first.values() for noise, *_ in calls]
    assert len(noises) == len(set(noises)) == 5 * 4
    assert not {2**31, 2**31 + 7, 2**31 + 9} & set(noises), "nor an evaluation's or a check's"
    last = [tuple(where) for _, where, _ in first.values()]
    assert len(set(last)) == 5


def test_what_is_no_number_is_left_for_the_watch(monkeypatch):
    class Broken(Sampler):
        def __call__(self, *args, **kwargs):
            found, seconds = super().__call__(*args, **kwargs)
            found.scores[:COPIES] = -torch.inf
            found.scores[COPIES : 2 * COPIES] = torch.nan
            return found, seconds

    config = config_of(algorithm="grpo", samples_per_prompt=COPIES, prompts_per_rollout=EACH)
    config.dynamic_sampling = 2
    sampler = Broken(1.0, monkeypatch)
    found, *_ = drawing.draw(SimpleNamespace(), prompts_of(PROMPTS), config, None, 0)
    assert len(sampler.calls) == 1 and found.not_finite() == ["6 of 18 scores"]


def test_each_prompt_has_one_greedy_answer_and_its_rows_its_score(monkeypatch):
    sampler, found, asked, greedy, metrics = drawn(1.0, monkeypatch, algorithm="remax")
    assert [call[1:] for call in sampler.calls] == [(EACH * COPIES, False), (EACH, True)]
    sampled_alone = {"score_function/a": 1.0}
    assert metrics == {"seconds_generate": 2.0, "seconds_score": 4.0} | sampled_alone
    config = config_of(algorithm="remax", samples_per_prompt=COPIES, prompts_per_rollout=EACH)
    config.score_clip, state = 120.0, State(kl_coef=0.2)
    experience, _ = make_experience(found, config, state, greedy)
    for row, prompt in enumerate(asked):
        acts = found.action_mask[row]
        kl = (found.logprobs[row] - found.ref_logprobs[row])[acts].sum().item()
        baseline = min(100.0 + prompt.ids[0], 120.0)
        assert experience.baseline[row].item() == baseline
        total = found.scores[row].item() - 0.2 * kl
        expected = pytest.approx([total - baseline] * int(acts.sum()), rel=1e-5)
        assert experience.advantages[row][acts].tolist() == expected
    assert state.finished_score < 90, "of the sampled answers: greedy ones change no statistic"
