"""How the self-check measures, and that a rank's cost does not grow with ranks or vocabulary."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from step3_ppo.checks import data, probe
from tests.helpers.small_models import Engine, config_of, drawn_rows, rollout_of
from utils.distributed import process_group
from utils.models import language_model

VOCABULARY, ROWS_A_RANK = 50, 32


def probe_of(world: int, monkeypatch, rank: int = 0, **settings) -> probe.Probe:
    """The probe that one of `world` ranks would have."""
    monkeypatch.setattr(process_group, "world_size", lambda: world)
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    return probe.Probe(
        SimpleNamespace(actor=Engine(model), tokenizer=tokenizer, nucleus=None),
        config_of(micro_batch_size=8, **settings),
        torch.device("cpu"),
        tolerance=5e-5,
        train=[],
        held=[],
        rollout=rollout_of(drawn_rows(ROWS_A_RANK * world, VOCABULARY, seed=1)),
        asked=[],
        seconds_score=0.0,
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
    given = probe_of(world, monkeypatch, rank=world - 1)
    probe.train_forward(given, given.own_rows())  # the first one looks at the head, too
    passes.clear()
    probe.train_forward(given, given.own_rows())
    assert sum(rows for rows, _ in passes) == ROWS_A_RANK


def test_the_ranks_own_rows_are_those_it_drew_and_all_of_them(monkeypatch):
    """rollout.collect deals row i to rank i % ranks."""
    seen = []
    for rank in range(4):
        rows = probe_of(4, monkeypatch, rank).own_rows()
        assert len(rows.scores) == ROWS_A_RANK
        seen.append(rows.scores)
    together = torch.stack(seen, 1).flatten()
    assert torch.equal(together, probe_of(4, monkeypatch).rollout.scores)


def test_logits_exist_for_a_few_rows_at_a_time_and_say_the_same(monkeypatch, passes):
    given = probe_of(1, monkeypatch, temperature=0.7)
    rollout = given.rollout
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.response_mask], 1)
    length = rollout.response_ids.shape[1]
    logits = language_model.response_logits(given.models.actor, ids, mask, length) / 0.7
    policy = torch.distributions.Categorical(logits=logits)
    passes.clear()
    row = probe.MOST_TOKENS * VOCABULARY
    monkeypatch.setattr(probe, "LOGITS_AT_ONCE", 3 * row + row // 2)
    found = probe.distributions(given, rollout)
    assert max(rows for rows, _ in passes) == 3
    kept, close = rollout.response_mask, dict(rtol=1e-4, atol=1e-5)
    own = policy.log_prob(rollout.response_ids)
    torch.testing.assert_close(found.logprobs[kept], own[kept], **close)
    torch.testing.assert_close(found.best, policy.logits.max(-1).values, **close)
    torch.testing.assert_close(found.entropies, policy.entropy(), **close)
    surprise = (-policy.logits - policy.entropy()[..., None]) ** 2
    torch.testing.assert_close(found.variances, (policy.probs * surprise).sum(-1), **close)


def test_impossible_tokens_leave_the_sums_finite(monkeypatch):
    given = probe_of(1, monkeypatch)
    bias = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor([3]), -torch.inf)
    head = given.models.actor.module.lm_head
    head.register_forward_hook(lambda *call: call[-1] + bias)
    found = probe.distributions(given, given.rollout)
    assert found.entropies.isfinite().all() and found.variances.isfinite().all()


def test_what_ranks_have_drawn_counts_together(monkeypatch):
    """Two ranks' sums, as the collective would add them, say what one rank says of all rows."""
    sums = []
    monkeypatch.setattr(
        process_group, "sum_over_ranks", lambda v, d: sums.append(list(v)) or [1] * 3
    )
    for rank in range(2):
        data.samples_follow_the_policy(probe_of(2, monkeypatch, rank))
    together = probe_of(2, monkeypatch)
    together.config.micro_batch_size = 64
    monkeypatch.setattr(process_group, "world_size", lambda: 1)
    data.samples_follow_the_policy(together)
    for first, second, both in zip(*sums, strict=True):
        assert float(first + second) == pytest.approx(float(both), rel=1e-4)
