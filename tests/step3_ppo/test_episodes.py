"""Episodes of several turns in tensors: what is attended to, what is the policy's."""

from types import SimpleNamespace

import torch

from step3_ppo.episodes import Episode, Segment, answered, lay_out, numbers_of
from utils.generation.engine import Samples

PAD = 0


def policy(*ids):
    numbers = torch.tensor([-float(i) for i in ids])
    return Segment(torch.tensor(ids), True, numbers, -2 * numbers)


def environment(*ids):
    return Segment(torch.tensor(ids), by_policy=False)


EPISODES = [
    Episode([5, 6, 7], [policy(11, 12), environment(21, 22, 23), policy(13)], True),
    Episode([8], [environment(24), policy(14, 15)], False),
    Episode([9, 9], [policy(16)], True),
]


def test_turns_lie_behind_their_prompts():
    tokens = lay_out(EPISODES, PAD)
    assert tokens.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 9]]
    assert tokens.prompt_mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    expected = [[11, 12, 21, 22, 23, 13], [24, 14, 15, 0, 0, 0], [16, 0, 0, 0, 0, 0]]
    assert tokens.response_ids.tolist() == expected
    assert tokens.response_mask.tolist() == [[i > 0 for i in row] for row in expected]
    assert tokens.action_mask.tolist() == [[10 < i < 20 for i in row] for row in expected]
    assert {x.dtype for x in (tokens.response_mask, tokens.action_mask)} == {torch.bool}
    assert tokens.lengths() == [9, 4, 3]


def test_what_the_sampler_said_lies_at_its_tokens():
    logprobs, entropies = (numbers_of(EPISODES, x) for x in ("logprobs", "entropies"))
    expected = [[-11.0, -12, 0, 0, 0, -13], [0, -14, -15, 0, 0, 0], [-16, 0, 0, 0, 0, 0]]
    assert logprobs.tolist() == expected and torch.equal(entropies, -2 * logprobs)


def test_selected_rows_lose_the_padding_that_none_of_them_needs():
    part = lay_out(EPISODES, PAD).select([1, 2])
    assert part.prompt_ids.tolist() == [[0, 8], [9, 9]]
    assert part.response_ids.tolist() == [[24, 14, 15], [16, 0, 0]]
    assert part.action_mask.tolist() == [[False, True, True], [True, False, False]]
    ids, mask = part.joined()
    assert ids.tolist() == [[0, 8, 24, 14, 15], [9, 9, 16, 0, 0]]
    assert torch.equal(mask, ids != PAD)


def test_one_sampled_answer_is_an_episode_of_one_turn():
    ids = torch.tensor([[3, 2, 0], [4, 5, 6]])
    mask, numbers = ids != PAD, torch.rand(2, 3)
    samples = Samples(ids, mask, numbers * mask, None, ["stop", "length"])
    prompts = [SimpleNamespace(ids=[7]), SimpleNamespace(ids=[8, 9])]
    episodes = answered(prompts, samples)
    tokens = lay_out(episodes, PAD)
    assert [e.finished for e in episodes] == [True, False]
    assert torch.equal(tokens.response_ids, ids) and torch.equal(tokens.action_mask, mask)
    assert torch.equal(numbers_of(episodes, "logprobs"), numbers * mask)
    assert not numbers_of(episodes, "entropies").any()
