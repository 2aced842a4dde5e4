"""What the self-check costs a rank: it does not grow with the ranks, nor with the vocabulary."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from step3_ppo.checks import data as check_data
from step3_ppo.checks import models as check_models
from tests.helpers.small_models import Engine, config_of, drawn_rows, rollout_of
from utils.distributed import process_group
from utils.models import language_model

VOCABULARY, ROWS_A_RANK = 50, 32


def check_of(world: int, monkeypatch, rank: int = 0, **settings):
    """A running self-check of one of `world` ranks, with the probe that it would have there."""
    monkeypatch.setattr(process_group, "world_size", lambda: world)
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()
    probe = rollout_of(drawn_rows(ROWS_A_RANK * world, VOCABULARY, seed=1))
    return SimpleNamespace(
        probe=probe,
        models=SimpleNamespace(
            actor=Engine(model), tokenizer=SimpleNamespace(eos_token_id=1, pad_token_id=0)
        ),
        config=config_of(micro_batch_size=8, **settings),
        device=torch.device("cpu"),
    )


@pytest.fixture
def passes(monkeypatch):
    """[(rows, tokens) of each forward pass of the actor]."""
    seen, forward = [], LlamaForCausalLM.forward

    def watched(self, input_ids, **inputs):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids, **inputs)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return seen


@pytest.mark.parametrize("world", [1, 8])
def test_a_rank_forwards_its_own_rows_however_many_ranks_there_are(world, monkeypatch, passes):
    check = check_of(world, monkeypatch, rank=world - 1)
    check_models.train_forward(check, check_models.own_rows(check))
    assert sum(rows for rows, _ in passes) == ROWS_A_RANK


def test_the_ranks_own_rows_are_those_it_drew_and_all_of_them(monkeypatch):
    """rollout.collect deals row i to rank i % ranks."""
    seen = []
    for rank in range(4):
        rows = check_models.own_rows(check_of(4, monkeypatch, rank))
        assert len(rows.scores) == ROWS_A_RANK
        seen.append(rows.scores)
    together = torch.stack(seen, 1).flatten()
    assert torch.equal(together, check_of(4, monkeypatch).probe.scores)


def test_logits_exist_for_a_few_rows_at_a_time_and_say_the_same(monkeypatch, passes):
    check = check_of(1, monkeypatch, temperature=0.7)
    probe = check.probe
    ids = torch.cat([probe.prompt_ids, probe.response_ids], 1)
    mask = torch.cat([probe.prompt_mask, probe.response_mask], 1)
    length = probe.response_ids.shape[1]
    logits = language_model.response_logits(check.models.actor, ids, mask, length) / 0.7
    policy = torch.distributions.Categorical(logits=logits)
    passes.clear()
    row = check_models.PROBE_TOKENS * VOCABULARY
    monkeypatch.setattr(check_models, "LOGITS_AT_ONCE", 3 * row + row // 2)
    found = check_models.distributions(check, probe)
    assert max(rows for rows, _ in passes) == 3
    kept, close = probe.response_mask, dict(rtol=1e-4, atol=1e-5)
    own = policy.log_prob(probe.response_ids)
    torch.testing.assert_close(found.logprobs[kept], own[kept], **close)
    torch.testing.assert_close(found.best, policy.logits.max(-1).values, **close)
    torch.testing.assert_close(found.entropies, policy.entropy(), **close)
    surprise = (-policy.logits - policy.entropy()[..., None]) ** 2
    torch.testing.assert_close(found.variances, (policy.probs * surprise).sum(-1), **close)


def test_impossible_tokens_leave_the_sums_finite(monkeypatch):
    check = check_of(1, monkeypatch)
    bias = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor([3]), -torch.inf)
    head = check.models.actor.module.lm_head
    head.register_forward_hook(lambda *call: call[-1] + bias)
    found = check_models.distributions(check, check.probe)
    assert found.entropies.isfinite().all() and found.variances.isfinite().all()


def test_what_ranks_have_drawn_counts_together(monkeypatch):
    """Two ranks' sums, as the collective would add them, say what one rank says of all rows."""
    sums = []
    monkeypatch.setattr(
        process_group, "sum_over_ranks", lambda v, d: sums.append(list(v)) or [1] * 3
    )
    for rank in range(2):
        check_data.samples_follow_the_policy(check_of(2, monkeypatch, rank))
    together = check_of(2, monkeypatch)
    together.config.micro_batch_size = 64
    monkeypatch.setattr(process_group, "world_size", lambda: 1)
    check_data.samples_follow_the_policy(together)
    for first, second, both in zip(*sums, strict=True):
        assert float(first + second) == pytest.approx(float(both), rel=1e-4)
