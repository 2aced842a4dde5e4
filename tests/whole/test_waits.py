"""How often a micro-batch waits for the device: never, but for what a library does inside."""

from types import SimpleNamespace

import pytest
import torch

from step3_ppo import rollout, update
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from tests.helpers.small_models import Engine, config_of, drawn_rows, rollout_of
from tests.helpers.waits import DEVICE, Waits
from tests.step3_ppo.test_update import VOCABULARY, build_llama, examples
from utils.distributed import host_memory
from utils.kernels import packing
from utils.models.scalar_model import ScalarModel
from utils.models.scorer import Scorer

ROWS = 12


def models(packed: bool):
    language, classifier = build_llama(1), build_llama(2, labels=1)
    for model in (language, classifier):
        if packed:
            packing.turn_on(model)
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        actor=Engine(language),
        critic=Engine(ScalarModel(classifier)),
        ptx=examples(),
        ema=None,
        nucleus=None,
    )


def waits_of(work, packed: bool, rows_each: int) -> dict[str, int]:
    """What `work(models, config)` counts with micro-batches of so many rows. The models are on the
    device; a first pass has asked what is asked once."""
    config = config_of(
        prompts_per_rollout=ROWS,
        global_batch_size=ROWS,
        micro_batch_size=rows_each,
        action_level="token",
        ptx_coef=1.0,
        ptx_data=["-"],
    )
    found = models(packed)
    for engine in (found.actor, found.critic):
        engine.step = lambda: {}
    with Waits() as waits:
        for engine in (found.actor, found.critic):
            waits.mark([*engine.module.parameters(), *engine.module.buffers()])
        work(found, config)
        waits.counts.clear()
        work(found, config)
    return waits.counts


def per_micro_batch(work, packed: bool) -> dict[str, float]:
    """What each micro-batch adds, by counting with 4 and with 12 of them."""
    few, many = waits_of(work, packed, 3), waits_of(work, packed, 1)
    return {name: (many[name] - few[name]) / 8 for name in few | many if many[name] != few[name]}


def experience():
    rows = rollout_of(drawn_rows(ROWS, VOCABULARY, seed=5))
    return make_experience(rows, config_of(prompts_per_rollout=ROWS), State(kl_coef=0.1))[0]


def actor(found, config):
    update.step_actor(found, experience(), list(range(ROWS)), config, DEVICE)


def critic(found, config):
    update.step_critic(found.critic, experience(), list(range(ROWS)), config, DEVICE)


def scored(found, config):
    part = rollout_of(drawn_rows(ROWS, VOCABULARY, seed=5))
    given = part, config, DEVICE
    with torch.no_grad():
        rollout.in_micro_batches(*given, rollout.logprobs_of, found.actor, 1.0)
        rollout.in_micro_batches(*given, rollout.values_of, found.critic)
    ids, mask = part.joined()
    reward = Scorer(found.critic, None, False, DEVICE)
    reward.scores(None, None, part.finished, ids, mask, config.micro_batch_size)


@pytest.mark.parametrize("work", [actor, critic, scored])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_no_micro_batch_waits_for_the_one_before(work, packed):
    found = per_micro_batch(work, packed)
    if packed:
        assert found == {}
    else:
        # transformers looks whether a mask has a pad in it.
        passes = {actor: 2, critic: 1, scored: 3}[work]
        assert set(found) <= {"_local_scalar_dense"} and sum(found.values()) <= passes, found


def test_what_waits_is_counted():
    """Each way that there was in an update before, and the ways round it."""
    mask = torch.tensor([[True, False], [True, True]])
    asks = {
        "_local_scalar_dense": lambda x, m: [x.sum().item(), float(x[0, 0]), bool(m.any())],
        "index": lambda x, m: x[m],
        "masked_select": lambda x, m: x.masked_select(m),
        "nonzero": lambda x, m: m.nonzero(),
        "repeat_interleave": lambda x, m: m.long().repeat_interleave(m.sum(1), 0),
        "tolist": lambda x, m: x.tolist(),
        "to cpu": lambda x, m: x.cpu(),
        "to cpu:0": lambda x, m: torch.ones(3).to(DEVICE),
    }
    for name, ask in asks.items():
        with Waits() as waits:
            x, m = (host_memory.send(t, DEVICE) for t in (torch.ones(2, 2), mask))
            assert x.device == DEVICE and not waits.counts
            ask(x * 2, m)
        assert waits.counts[name] == (3 if name == "_local_scalar_dense" else 1), name
    with Waits() as waits:
        x = host_memory.send(torch.ones(2, 2, requires_grad=True), DEVICE)
        packing.spread(x.flatten()[:3] * 2, mask).sum().backward()
        mask.nonzero(), mask.tolist(), torch.ones(3)[torch.ones(3).bool()]
    assert not waits.counts
    with Waits() as waits:  # in the backward pass, which nobody sees
        x = host_memory.send(torch.ones(3), DEVICE).requires_grad_()
        m = host_memory.send(mask, DEVICE)
        torch.zeros_like(m, dtype=torch.float).masked_scatter(m, x * 2).sum().backward()
    assert sum(waits.counts.values()) > 0


def test_what_is_sent_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch):
    done, real = [], torch.Tensor.to

    def to(self, *args, **kwargs):
        done.append((args, kwargs))
        return self

    def pin_memory(self):
        done.append(("pinned", self.is_contiguous()))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu, tensor = torch.device("cuda", 1), torch.arange(6.0).view(2, 3)[:, :2]
    assert torch.equal(host_memory.send(tensor, gpu), tensor)
    assert done == [("pinned", True), ((gpu,), {"non_blocking": True})]
    monkeypatch.setattr(torch.Tensor, "to", real)
    assert host_memory.send(tensor, torch.device("cpu")) is tensor
