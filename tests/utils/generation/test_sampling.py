"""Decoding against transformers' own generate; log-probabilities against unpadded rows."""

import functools
import inspect

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES, SIZES
from tests.helpers.family_folders import REAL
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.kernels import token_attention
from utils.models import language_model

PAD, VOCAB, NEW = 0, 96, 12
LENGTHS = [9, 1, 4, 7, 2, 5]
VARIANTS = {family: (family, sizes) for family, sizes in FAMILIES.items()} | {
    "Llama, a key for each head": ("Llama", FAMILIES["Llama"] | {"num_key_value_heads": 4}),
    "Falcon, whose layers know sdpa by its name": ("Falcon", SIZES | {"alibi": False}),
}
# Of those with their tokenizers' rules each architecture that the others do not have.
OTHERS = "Gemma 2,Gemma 3,Phi-3,GLM-4,InternLM 3,Mixtral,Qwen2-MoE,Qwen3-MoE".split(",")
VARIANTS |= {name: (REAL[name].model, REAL[name].sizes) for name in OTHERS if name in REAL}


@pytest.fixture(autouse=True, scope="module")
def short_blocks():
    """Answers of a few tokens cross several blocks of the cache."""
    before, token_attention.BLOCK = token_attention.BLOCK, 5
    yield
    token_attention.BLOCK = before


@functools.cache
def tiny(family):
    config = getattr(transformers, f"{VARIANTS[family][0]}Config")(
        vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **VARIANTS[family][1]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    # Larger than the usual initialisation, which would repeat one token whatever the prompt.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                std = 0.25 if "emb" not in name and "wte" not in name else 1.0
                if (
                    family.startswith("Gemma") and "emb" in name
                ):  # it multiplies them by √hidden_size
                    std = 0.05
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def left_padded(lengths, extra=0, seed=3):
    """Prompts that do not depend on the padding: (B,P) ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        ids[row, width - n :] = torch.randint(3, VOCAB, (n,), generator=generator)
        mask[row, width - n :] = True
    return ids, mask


def greedy(family, stop_id, extra=0, pad_id=PAD, mode="eager"):
    ids, mask = left_padded(LENGTHS, extra)
    settings = dict(max_new_tokens=NEW, stop_id=stop_id, pad_id=pad_id, decoder=Decoder(mode))
    return generation.generate(tiny(family), ids, mask, **settings)


def stop_token(family):
    """A token that greedy decoding gives some rows, neither as their first nor to all rows."""
    free = greedy(family, stop_id=-1)
    for token in free[:, 2:].flatten().tolist():
        hits = (free == token).any(1)
        if token != PAD and hits.any() and not hits.all() and not (free[:, 0] == token).any():
            return token
    raise AssertionError(f"{family}: no token stops some rows and spares others:\n{free}")


# Sampling one token.


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_frequencies_are_the_softmax(seed, temperature):
    grid = 4000
    logits = 2 * torch.randn(1, 11, generator=torch.Generator().manual_seed(seed))
    noise = (torch.arange(grid) + 0.5) / grid
    drawn = generation.sample_tokens(logits.expand(grid, -1), noise, temperature)
    assert drawn.dtype == torch.int64 and drawn.shape == (grid,)
    frequencies = torch.bincount(drawn, minlength=11) / grid
    exact = (logits[0].double() / temperature).softmax(-1)
    assert (frequencies - exact).abs().max().item() <= 1.01 / grid


def test_impossible_tokens_are_never_drawn():
    never = float("-inf")
    logits = torch.tensor(
        [[never, 0.0, never, 0.0, never], [0.0, never, never, never, never]] * 2
        + [[never, never, never, never, 3.0]]
    )
    for noise, expected in (
        (0.0, [1, 0, 1, 0, 4]),
        (0.499, [1, 0, 1, 0, 4]),
        (0.501, [3, 0, 3, 0, 4]),
        (0.999999, [3, 0, 3, 0, 4]),
        (1 - 2**-24, [3, 0, 3, 0, 4]),  # the largest number below 1 in fp32
    ):
        drawn = generation.sample_tokens(logits, torch.full((5,), noise), 1.0)
        assert drawn.tolist() == expected, noise


def test_largest_noise_draws_a_possible_token_of_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator)
    logits[:, 4000:] = float("-inf")
    noise = torch.full((64,), 1 - 2**-24)
    assert (generation.sample_tokens(logits, noise, 1.0) < 4000).all()
    assert (generation.sample_tokens(logits.flip(-1), noise * 0, 1.0) >= 1000).all()


def test_uniform_noise_is_a_function_of_seed_and_step():
    a = generation.uniform_noise(4, 5, seed=1, step=2)
    assert a.shape == (4, 5) and a.dtype == torch.float32 and (a >= 0).all() and (a < 1).all()
    assert torch.equal(a, generation.uniform_noise(4, 5, seed=1, step=2))
    assert not torch.equal(a, generation.uniform_noise(4, 5, seed=1, step=3))
    assert not torch.equal(a, generation.uniform_noise(4, 5, seed=2, step=2))


# The response mask.


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([5, 6, 2, 0, 0], [1, 1, 1, 0, 0]),
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1]),
        ([2, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        ([5, 6, 7, 8, 2], [1, 1, 1, 1, 1]),
        ([5, 2, 2, 2, 2], [1, 1, 0, 0, 0]),  # pad is the stop token
        ([2, 5, 2, 6, 2], [1, 0, 0, 0, 0]),
        ([0, 5, 0, 2, 0], [1, 1, 1, 1, 0]),  # the pad token sampled inside an answer counts
    ],
)
def test_mask_through_stop(ids, expected):
    mask = generation.mask_through_stop(torch.tensor([ids, ids]), 2)
    assert mask.dtype == torch.bool and mask.long().tolist() == [expected] * 2


# Decoding.


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("family", VARIANTS)
def test_greedy_decoding_is_transformers_generate(family, mode):
    stop = stop_token(family)
    ids, mask = left_padded(LENGTHS)
    theirs = tiny(family).generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        eos_token_id=stop,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]
    ours = greedy(family, stop, mode=mode)
    assert ours.tolist() == theirs.tolist() and ours.shape == (len(LENGTHS), NEW)
    stopped = (ours == stop).any(1)
    assert stopped.any() and not stopped.all()
    assert len({tuple(row) for row in ours.tolist()}) == len(LENGTHS), "the prompt must matter"
    response_mask = generation.mask_through_stop(ours, stop)
    assert (ours[~response_mask] == PAD).all() and (~response_mask).any()


def test_greedy_decoding_is_the_argmax_of_unpadded_prefixes():
    """Without cache, padding or mask: one row, one full pass a token."""
    ids, mask = left_padded(LENGTHS)
    ours = greedy("Llama", stop_id=-1)
    for row, n in enumerate(LENGTHS):
        prefix = ids[row, -n:].tolist()
        for step in range(NEW):
            with torch.no_grad():
                token = tiny("Llama")(input_ids=torch.tensor([prefix])).logits[0, -1].argmax()
            prefix.append(int(token))
            assert ours[row, step] == token


def test_sampling_inverts_the_distribution_of_unpadded_prefixes():
    """Each token: the first whose cumulative probability passes its own number of the noise."""
    ids, mask = left_padded(LENGTHS)
    noise = generation.uniform_noise(len(LENGTHS), NEW, seed=3, step=4)
    ours = generation.generate(
        tiny("Llama"),
        ids,
        mask,
        max_new_tokens=NEW,
        stop_id=-1,
        pad_id=PAD,
        temperature=1.7,
        noise=noise,
    )
    for row, n in enumerate(LENGTHS):
        prefix = ids[row, -n:].tolist()
        for step in range(NEW):
            with torch.no_grad():
                logits = tiny("Llama")(input_ids=torch.tensor([prefix])).logits[0, -1]
            total = 0.0
            for token, p in enumerate((logits.double() / 1.7).softmax(-1).tolist()):  # noqa: B007
                total += p
                if total > noise[row, step].item():
                    break
            prefix.append(token)
        assert ours[row].tolist() == prefix[n:]


def test_decoding_ends_once_all_rows_have_stopped(monkeypatch):
    model, calls = tiny("Llama"), []
    stop = int(greedy("Llama", -1)[0, 2])
    forward = type(model).forward
    ids, mask = left_padded(LENGTHS[:1])

    def counted(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", counted)
    response = generation.generate(model, ids, mask, max_new_tokens=50, stop_id=stop, pad_id=PAD)
    ends = int((response[0] == stop).nonzero()[0])
    assert response.shape == (1, 50) and (response[0, ends + 1 :] == PAD).all()
    assert calls == [LENGTHS[0]] + [1] * ends


@pytest.mark.parametrize("family", ["Llama", "OPT", "Bloom"])
def test_pad_may_equal_the_stop_token(family):
    stop = stop_token(family)
    apart, same = greedy(family, stop), greedy(family, stop, pad_id=stop)
    mask = generation.mask_through_stop(apart, stop)
    assert torch.equal(mask, generation.mask_through_stop(same, stop))
    assert torch.equal(apart[mask], same[mask]) and (same[~mask] == stop).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_does_not_depend_on_the_company_of_a_row(family):
    ids, mask = left_padded(LENGTHS)
    noise = generation.uniform_noise(len(LENGTHS), NEW, seed=1, step=2)
    stop = stop_token(family)

    def sample(rows, left, noise):
        return generation.generate(
            tiny(family),
            ids[rows, left:],
            mask[rows, left:],
            max_new_tokens=NEW,
            stop_id=stop,
            pad_id=PAD,
            temperature=1.3,
            noise=noise,
        )

    together = sample(slice(None), 0, noise)
    alone = [
        sample(slice(i, i + 1), max(LENGTHS) - n, noise[i : i + 1]) for i, n in enumerate(LENGTHS)
    ]
    assert torch.equal(together, torch.cat(alone))
    other = sample(slice(None), 0, generation.uniform_noise(len(LENGTHS), NEW, seed=1, step=3))
    assert not torch.equal(together, other)
    assert not torch.equal(together, greedy(family, stop)), "the noise must matter"


# Log-probabilities of responses.

RESPONSES = [6, 6, 3, 1, 5, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_response_logprobs_do_not_depend_on_padding(family):
    """0, 1 and 7 further pads on the left: the numbers of each row alone, without any padding."""
    model, temperature, width = tiny(family), 0.7, max(RESPONSES)
    response = torch.randint(3, VOCAB, (6, width), generator=torch.Generator().manual_seed(5))
    response_mask = torch.arange(width)[None, :] < torch.tensor(RESPONSES)[:, None]
    prompt, _ = left_padded(LENGTHS)
    logprobs = torch.zeros(6, width, dtype=torch.float64)
    entropies = torch.zeros(6, width, dtype=torch.float64)
    for row, (p, r) in enumerate(zip(LENGTHS, RESPONSES, strict=True)):
        ids = torch.cat([prompt[row, -p:], response[row, :r]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for t in range(r):
            logs = (logits[p + t - 1] / temperature).log_softmax(-1)
            logprobs[row, t] = logs[ids[p + t]]
            entropies[row, t] = -sum(x.exp() * x for x in logs)
    for extra in (0, 1, 7):
        ids, mask = left_padded(LENGTHS, extra)
        actual = language_model.response_logprobs(
            model,
            torch.cat([ids, torch.where(response_mask, response, PAD)], 1),
            torch.cat([mask, response_mask], 1),
            width,
            temperature=temperature,
            with_entropies=True,
        )
        for got, expected in zip(actual, (logprobs, entropies), strict=True):
            assert got.shape == (6, width) and got.dtype == torch.float32
            error = ((got - expected) * response_mask).abs().max().item()
            assert error < 5e-5, f"{extra} pads: off by {error}"


def test_logprobs_of_a_sampled_response_are_those_it_was_drawn_with():
    """What the update recomputes with gradient equals the no-gradient pass."""
    model = tiny("Qwen2")
    ids, mask = left_padded(LENGTHS)
    response = greedy("Qwen2", -1)
    full, everything = torch.cat([ids, response], 1), torch.ones_like(response, dtype=torch.bool)
    full_mask = torch.cat([mask, everything], 1)
    logprobs, _ = language_model.response_logprobs(model, full, full_mask, NEW)
    logits = language_model.response_logits(model, full, full_mask, NEW)
    again = language_model.token_logprobs(logits, response)
    assert logits.shape == (len(LENGTHS), NEW, VOCAB) and logits.requires_grad
    assert torch.equal(logits.argmax(-1), response)
    torch.testing.assert_close(again.detach(), logprobs.detach(), rtol=0, atol=2e-5)


def test_positions_follow_the_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    assert language_model.positions(mask).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 3],
        [0, 0, 0, 0, 0],
    ]
