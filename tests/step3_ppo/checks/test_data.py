"""The checks of samples, on rollouts written by hand."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from step3_ppo.checks import data
from step3_ppo.checks.probe import COPIES, Fault
from utils.distributed import process_group

PROMPTS, LENGTH = 3, 4


def drawn(world: int, answer_of, logprob: float, monkeypatch):
    """A probe on `world` ranks: `answer_of(prompt, copy, rank)` is said token by token, each with
    this log-probability."""
    monkeypatch.setattr(process_group, "world_size", lambda: world)
    rows = itertools.product(range(PROMPTS), range(COPIES), range(world))
    ids = torch.tensor([[1 + answer_of(*row)] * LENGTH for row in rows])
    rollout = SimpleNamespace(
        response_ids=ids,
        response_mask=torch.ones_like(ids, dtype=torch.bool),
        logprobs=torch.full(ids.shape, logprob),
    )
    tokenizer = SimpleNamespace(pad_token_id=0)
    return SimpleNamespace(
        rollout=rollout, models=SimpleNamespace(tokenizer=tokenizer, nucleus=None)
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_copies_alike_are_a_fault_unless_the_policy_is_sure(world, monkeypatch):
    def same(prompt, copy, rank):
        return 10 * prompt + rank

    with pytest.raises(Fault, match="all rows drew the same") as fault:
        data.ranks_and_rows_draw_apart(drawn(world, same, -1.0, monkeypatch))
    # By chance: each token of every copy but the first once more.
    assert f"e^{-PROMPTS * (COPIES - 1) * world * LENGTH}:" in str(fault.value)
    said = data.ranks_and_rows_draw_apart(drawn(world, same, -1e-3, monkeypatch))
    assert f"{PROMPTS * world} different answers" in said and "too sure to tell" in said


def test_ranks_alike_are_a_fault(monkeypatch):
    def same(prompt, copy, rank):
        return 10 * prompt + copy

    with pytest.raises(Fault, match="all ranks drew the same"):
        data.ranks_and_rows_draw_apart(drawn(2, same, -1.0, monkeypatch))


@pytest.mark.parametrize("world", [1, 2])
def test_one_that_differs_is_enough(world, monkeypatch):
    def almost(prompt, copy, rank):
        return 1 if (prompt, copy, rank) == (2, COPIES - 1, world - 1) else 0

    said = data.ranks_and_rows_draw_apart(drawn(world, almost, -1.0, monkeypatch))
    assert said == f"2 different answers among {PROMPTS * COPIES * world}, {world} ranks"
