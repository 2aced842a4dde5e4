"""What the decoder saves must not be seen in what it writes."""

import functools
import inspect

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, greedy, left_padded, tiny
from utils.generation import decoder
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.kernels import token_attention
from utils.models import language_model

ROWS = len(LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def short_blocks():
    """Answers of a few tokens cross several blocks of the cache."""
    before, token_attention.BLOCK = token_attention.BLOCK, 5
    yield
    token_attention.BLOCK = before


def sample(family="Llama", rows=slice(None), **settings):
    """(responses, log-probabilities, entropies) of LENGTHS' prompts."""
    ids, mask = left_padded(LENGTHS)
    ids, mask = ids[rows], mask[rows]
    noise = settings.pop("noise", generation.uniform_noise(ROWS, NEW, seed=1, step=2)[rows])
    seen = [torch.zeros(len(ids), NEW) for _ in range(2)]
    given = dict(max_new_tokens=NEW, stop_id=-1, pad_id=PAD, temperature=1.3, noise=noise)
    responses = generation.generate(
        tiny(family), ids, mask, **(given | settings), logprobs_and_entropies=seen
    )
    return responses, *seen


@functools.cache
def stop_of(family) -> tuple[int, torch.Tensor]:
    """(token, noise): a token that stops half of the sampled rows early and some never."""
    for seed in range(200):
        noise = generation.uniform_noise(ROWS, NEW, seed, step=2)
        free, _, _ = sample(family, noise=noise)
        for token in free[:, 2:].unique().tolist():
            early, hits = (free[:, : NEW - 2] == token).any(1), (free == token).any(1)
            if token != PAD and early.sum() >= ROWS / 2 and not hits.all():
                return token, noise
    raise AssertionError(f"{family}: no token stops some rows and spares others")


def batches_of(monkeypatch, family="Llama") -> list[tuple[int, int]]:
    """Fills with the (rows, tokens) of each forward pass from now on."""
    shapes, kind = [], type(tiny(family))
    forward = kind.forward

    def counted(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(kind, "forward", counted)
    return shapes


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropies_are_those_of_a_whole_forward_pass(family, mode):
    stop, noise = stop_of(family)
    responses, *seen = sample(family, noise=noise, stop_id=stop, decoder=Decoder(mode))
    ids, prompt_mask = left_padded(LENGTHS)
    mask = generation.mask_through_stop(responses, stop)
    assert mask.any(0).all() and not mask.all()
    expected = language_model.response_logprobs(
        tiny(family),
        torch.cat([ids, responses], 1),
        torch.cat([prompt_mask, mask], 1),
        NEW,
        temperature=1.3,
        with_entropies=True,
    )
    for got, right in zip(seen, expected, strict=True):
        assert ((got - right) * mask).abs().max().item() < 3e-5


def test_impossible_tokens_add_nothing_to_the_entropy():
    never = float("-inf")
    logits = torch.tensor([[0.0, never, 0.0, never], [never, 5.0, never, never]])
    logprobs, entropies = generation.numbers_of(logits, torch.tensor([2, 1]), 1.0)
    two = torch.tensor([2.0]).log()
    torch.testing.assert_close(logprobs, torch.cat([-two, torch.zeros(1)]))
    torch.testing.assert_close(entropies, torch.cat([two, torch.zeros(1)]))


@pytest.mark.parametrize("mode, together", [("eager", 1), ("eager", 3), ("static", None)])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Bloom", "OPT"])
def test_stopped_rows_leave_and_nobody_notices(family, mode, together, monkeypatch):
    stop, noise = stop_of(family)
    settings = dict(noise=noise, stop_id=stop)
    monkeypatch.setattr(Decoder, "keep_running", lambda self, finished: None)
    everyone = sample(family, **settings)
    monkeypatch.undo()
    if together:
        monkeypatch.setattr(decoder, "LEAVE_TOGETHER", together)
    shapes = batches_of(monkeypatch, family)
    fewer = sample(family, **settings, decoder=Decoder(mode))
    sizes = [rows for rows, _ in shapes]
    assert sizes[0] == ROWS > sizes[-1] and sizes == sorted(sizes, reverse=True)
    mask = generation.mask_through_stop(everyone[0], stop)
    live = mask.long().flip(1).cumsum(1).flip(1).bool()[:, 1:].sum(0)  # rows that need pass t
    for rows, needed in zip(sizes[1:], live.tolist(), strict=False):
        allowed = needed + together - 1 if together else 2 * needed
        assert needed <= rows <= max(allowed, 1)
    assert torch.equal(fewer[0], everyone[0])
    for a, b in zip(fewer[1:], everyone[1:], strict=True):
        torch.testing.assert_close(a * mask, b * mask, rtol=0, atol=2e-5)


def test_a_rank_that_has_stopped_goes_on_with_one_row_until_all_have(monkeypatch):
    monkeypatch.setattr(decoder, "LEAVE_TOGETHER", 1)
    stop = int(greedy("Llama", -1)[0, 0])
    alone = greedy("Llama", stop)
    shapes, asked = batches_of(monkeypatch), []

    def others_need_seven_steps(finished, in_step):
        asked.append(bool(finished.all()))
        return len(asked) == 7

    monkeypatch.setattr(generation, "_all_finished", others_need_seven_steps)
    ids, mask = left_padded(LENGTHS)
    settings = dict(max_new_tokens=NEW, stop_id=stop, pad_id=PAD, in_step=True)
    one = generation.generate(tiny("Llama"), ids[:1], mask[:1], **settings)
    assert asked == [True] * 7 and shapes == [(1, ids.shape[1])] + [(1, 1)] * 6
    assert torch.equal(one, alone[:1]) and (one[:, 1:] == PAD).all()
    with pytest.raises(ValueError, match="ranks in step"):
        generation.generate(tiny("Llama"), ids, mask, **settings, decoder=Decoder("static"))


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Bloom", "GPT2"])
def test_samples_of_one_prompt_share_its_reading(family, mode, monkeypatch):
    rows = [2, 0, 0, 4, 2, 0, 1]
    noise = generation.uniform_noise(len(rows), NEW, seed=5, step=0)
    alone = [sample(family, [r], noise=noise[i : i + 1]) for i, r in enumerate(rows)]
    shapes = batches_of(monkeypatch, family)
    together = sample(family, rows, noise=noise, decoder=Decoder(mode))
    assert shapes == [(4, max(LENGTHS))] + [(7, 1)] * (NEW - 1)
    assert torch.equal(together[0], torch.cat([x[0] for x in alone]))
    assert len({tuple(row) for row in together[0].tolist()}) == len(rows)
    for i in (1, 2):
        expected = torch.cat([x[i] for x in alone])
        torch.testing.assert_close(together[i], expected, rtol=0, atol=2e-5)


def test_equal_ids_behind_different_masks_are_different_prompts():
    ids = torch.tensor([[PAD, 7, 8], [PAD, 7, 8]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    settings = dict(max_new_tokens=NEW, stop_id=-1, pad_id=PAD)
    both = generation.generate(tiny("Llama"), ids, mask, **settings)
    for row in range(2):
        one = generation.generate(tiny("Llama"), ids[[row]], mask[[row]], **settings)
        assert torch.equal(both[[row]], one)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Bloom"])
def test_a_decoder_used_again_is_clean(family, mode):
    """After a longer batch, a wider one, one of NaN, and after its memory was given back."""
    kept = Decoder(mode)
    expected = sample(family, [0, 3], decoder=Decoder(mode))

    def again():
        got = sample(family, [0, 3], decoder=kept)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    again()
    sample(family, decoder=kept)
    size = kept.cache.nbytes()
    again()
    assert kept.cache.nbytes() == size > 0
    for layer in kept.cache.layers:
        for store in layer.stores:
            store.fill_(torch.nan)
    again()
    assert kept.cache.nbytes() == size
    kept.release()
    assert kept.cache is None
    again()


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_another_model_finds_no_keys_of_the_last(family):
    kept = Decoder()
    sample("Llama", decoder=kept)
    got, expected = sample(family, decoder=kept), sample(family)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_modes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="decode='fast' is none of auto, eager"):
        Decoder("fast")
    with pytest.raises(ValueError, match="decode=graph cannot be: device cpu"):
        sample(decoder=Decoder("graph"))
