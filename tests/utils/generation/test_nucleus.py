"""NLPO's mask by its definition, in sampling as in log-probabilities, and a run that is masked."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES, LLAMA_LIKE
from tests.helpers.jobs import ppo
from tests.helpers.running import ROOT, assert_same_path, metrics_of, run_ranks
from tests.helpers.same_end import assert_same_end
from utils.generation.engine import Request, Sampling, Untrained, synced
from utils.generation.engines.native import NativeEngine
from utils.generation.nucleus import Nucleus, top_p
from utils.generation.sampling import uniform_noise
from utils.kernels import vocabulary_head
from utils.models import language_model

VOCABULARY, STOP, PAD, P, TEMPERATURE = 40, 1, 0, 0.6, 0.7
FAMILY = {"Llama": FAMILIES["Llama"], "Gemma2": LLAMA_LIKE | {"head_dim": 8}}
FAMILY["Gemma2"]["final_logit_softcapping"] = 2.0  # a head whose logits are changed afterwards


def pair(family: str = "Llama"):
    """A policy, and the mask of another one with its shape."""
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **FAMILY[family])
    config.initializer_range = 0.4
    torch.manual_seed(0)
    model, other = (transformers.AutoModelForCausalLM.from_config(config).float() for _ in range(2))
    nucleus = Nucleus(other, P, TEMPERATURE, "eager")
    with torch.no_grad():  # the mask is of the last update: later weights are not in it
        other_was = [p.clone() for p in other.parameters()]
        for p in other.parameters():
            p.add_(1.0)
    return model.eval(), nucleus, other_was


def mask_by_definition(logits: torch.Tensor, p: float) -> set[int]:
    chosen, total = set(), 0.0
    probabilities = (logits.double() / TEMPERATURE).softmax(-1).tolist()
    for token in sorted(range(len(probabilities)), key=lambda v: (-probabilities[v], v)):
        if total >= p:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_top_p_is_the_fewest_likeliest_tokens(p):
    logits = 2 * torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[3] = 0.0  # all alike: in the order of their numbers
    logits[4, 7] = 60.0  # all of it in one token
    found = top_p(logits / TEMPERATURE, p)
    for row, may in zip(logits, found, strict=True):
        expected = mask_by_definition(row, p)
        if p < 1.0:  # in fp32 the rarest tokens of all add nothing
            assert set(may.nonzero().flatten().tolist()) == expected
    assert found.sum(1).min() >= 1 and (p < 1.0 or found[:3].all())


def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :2] = mask[2, -3:] = False
    return ids, mask


@pytest.mark.parametrize("kept", [2**24, 0])
@pytest.mark.parametrize("family", FAMILY)
def test_log_probabilities_and_gradients_are_normalised_over_the_mask(family, kept, monkeypatch):
    monkeypatch.setattr(vocabulary_head, "KEPT", kept)
    monkeypatch.setitem(vocabulary_head.CHUNK, "cpu", 3 * VOCABULARY)
    model, nucleus, _ = pair(family)
    ids, mask = rows()
    settings = dict(temperature=TEMPERATURE, with_entropies=True, nucleus=nucleus)
    found, entropies = language_model.response_logprobs(model, ids, mask, 5, **settings)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    total, left_out = 0.0, 0
    for row in range(len(ids)):
        real = ids[row][mask[row]][None]
        logits, others = (m(input_ids=real).logits[0].double() for m in (model, nucleus.twin))
        start = int(mask[row, :4].sum())
        for t in range(start, real.shape[1]):
            token = int(real[0, t])
            may = sorted(mask_by_definition(others[t - 1], P) | {token})
            left_out += VOCABULARY - len(may)
            logs = (logits[t - 1, may] / TEMPERATURE).log_softmax(-1)
            expected, place = logs[may.index(token)], t - start
            assert float(found[row, place]) == pytest.approx(float(expected), abs=1e-5)
            entropy = -(logs.exp() * logs).sum()
            assert float(entropies[row, place]) == pytest.approx(float(entropy), abs=1e-5)
            total = total + expected * weights[row, place]
    assert left_out > 100
    total.backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)


def test_samples_are_drawn_among_the_mask_and_know_their_log_probabilities():
    model, nucleus, _ = pair()
    prompts, prompt_mask = rows()[0].repeat(8, 1)[:, :4], torch.ones(32, 4, dtype=torch.bool)
    noise = uniform_noise(32, 12, seed=5, step=0)
    sampling = Sampling(12, STOP, PAD, TEMPERATURE, logprobs=True, nucleus=nucleus)
    with synced(NativeEngine(), Untrained(model)) as engine:
        samples = engine.generate(Request(prompts, prompt_mask, noise), sampling)
    ids = torch.cat([prompts, samples.response_ids], 1)
    mask = torch.cat([prompt_mask, samples.response_mask], 1)
    width = samples.response_ids.shape[1]
    settings = dict(temperature=TEMPERATURE, with_entropies=True, nucleus=nucleus)
    with torch.no_grad():
        logprobs, entropies = language_model.response_logprobs(model, ids, mask, width, **settings)
    torch.testing.assert_close(samples.logprobs, logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(samples.entropies, entropies, rtol=0, atol=1e-4)
    # Each is the token that its noise means, by the cumulative distribution over the mask alone.
    with torch.no_grad():
        for row in range(len(ids)):
            for t in range(int(samples.response_mask[row].sum())):
                before = ids[row, : 4 + t][None]
                own, other = (m(input_ids=before).logits[0, -1] for m in (model, nucleus.twin))
                may = sorted(mask_by_definition(other, P))
                share = (own[may].double() / TEMPERATURE).softmax(-1).cumsum(-1)
                drawn = may.index(int(samples.response_ids[row, t]))
                low = 0.0 if drawn == 0 else float(share[drawn - 1])
                assert low - 1e-5 <= float(noise[row, t]) <= float(share[drawn]) + 1e-5


def test_the_mask_is_of_the_last_update():
    _, nucleus, was = pair()
    for p, kept in zip(nucleus.twin.parameters(), was, strict=True):
        assert torch.equal(p, kept)
    nucleus.update()
    for p, kept in zip(nucleus.twin.parameters(), was, strict=True):
        assert torch.equal(p, kept + 1.0)


@pytest.mark.slow
def test_a_run_takes_one_path_and_ends_alike_when_it_crashed(tiny, chain, tmp_path):
    """Two ranks, ZeRO-0 and 3; the mask is renewed before the fourth rollout, and the run that goes
    on begins with the fifth or sixth."""

    def job(name, *flags):
        own = ["--algorithm", "nlpo", "--mask_top_p", 0.8, "--mask_every", 3, "--max_steps", 6]
        return ppo(tiny, chain / "sft", chain / "reward", tmp_path / name, *own, *flags)

    saving = ["--zero_stage", 3, "--save_every", 1]
    program, argv = job("crashed", *saving)
    jobs = [
        job("zero0"),
        job("zero3", "--zero_stage", 3),
        job("forward", "--logprobs_from", "forward"),
    ]
    jobs += [("tests/helpers/stop_at.py", [ROOT / program, 5, "crash", *argv])]
    jobs += [job("crashed", *saving, "--resume", "auto")]
    said = run_ranks(jobs, 2)
    folders = {name: tmp_path / name for name in ("zero0", "zero3", "forward")}
    assert_same_path(folders, ["score", "kl", "policy_loss", "entropy", "actor_grad_norm"])
    assert_same_end(tmp_path / "crashed", tmp_path / "zero3")
    # On-policy at the first update: the mask of the samples is that of the update.
    assert said.count("first minibatch: ratio 1,") >= 2, said[-3000:]
    assert metrics_of(tmp_path / "zero0", "entropy")[0] > 0.05
