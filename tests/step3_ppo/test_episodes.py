"""Episodes of several turns in tensors: what is attended to, what is the policy's."""

import torch

from step3_ppo.episodes import Episode, Segment, lay_out, numbers_of, turn_of
from utils.generation.engine import Samples

PAD = 0


def policy(*ids):
    numbers = torch.tensor([-float(i) for i in ids])
    return Segment(torch.tensor(ids), True, numbers, -2 * numbers)


def environment(*ids):
    return Segment(torch.tensor(ids), by_policy=False)


SAID = ({"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"})
EPISODES = [
    Episode([5, 6, 7], [policy(11, 12), environment(21, 22, 23), policy(13)], True, SAID),
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
    assert tokens.lengths() == [9, 4, 3] and tokens.earlier == [SAID, (), ()]
    last = [[10 < i < 20 for i in row] for row in expected]
    last[0][:2] = [False, False]  # before the environment's
    assert tokens.last_turn().tolist() == last
    assert [e.ids() for e in EPISODES[:1]] == [[5, 6, 7, 11, 12, 21, 22, 23, 13]]


def test_what_the_sampler_said_lies_at_its_tokens():
    logprobs, entropies = (numbers_of(EPISODES, x) for x in ("logprobs", "entropies"))
    expected = [[-11.0, -12, 0, 0, 0, -13], [0, -14, -15, 0, 0, 0], [-16, 0, 0, 0, 0, 0]]
    assert logprobs.tolist() == expected and torch.equal(entropies, -2 * logprobs)


def test_selected_rows_lose_the_padding_that_none_of_them_needs():
    part = lay_out(EPISODES, PAD).select([1, 2])
    assert part.earlier == [(), ()]
    assert part.prompt_ids.tolist() == [[0, 8], [9, 9]]
    assert part.response_ids.tolist() == [[24, 14, 15], [16, 0, 0]]
    assert part.action_mask.tolist() == [[False, True, True], [True, False, False]]
    ids, mask = part.joined()
    assert ids.tolist() == [[0, 8, 24, 14, 15], [9, 9, 16, 0, 0]]
    assert torch.equal(mask, ids != PAD)


def test_a_sampled_turn_is_cut_where_its_room_ends():
    """4, 3, 2 tokens of room for three tokens of which the last is the stop token."""
    ids = torch.tensor([[3, 4, 2, 0], [4, 5, 6, 7]])
    mask, numbers = ids != PAD, torch.rand(2, 4)
    samples = Samples(ids, mask, numbers * mask, None, ["stop", "length"])
    for room, stopped in ((4, True), (3, True), (2, False), (1, False)):
        segment, whole = turn_of(samples, 0, room)
        assert segment.ids.tolist() == [3, 4, 2][:room] and whole == stopped
        assert torch.equal(segment.logprobs, numbers[0, :3][:room]) and segment.entropies is None
    segment, whole = turn_of(samples, 1, 4)
    assert segment.by_policy and segment.ids.tolist() == [4, 5, 6, 7] and not whole
    assert samples.response_mask.tolist() == mask.tolist()
