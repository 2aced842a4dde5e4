"""The memory of an actor's update with a large vocabulary, beside that of one without logits."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from step3_ppo import update
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from tests.helpers.small_models import Engine, config_of, rollout_of
from utils.kernels import vocabulary_head


def peak_bytes(work) -> int:
    """What `work` has allocated at most at one time, beside what was there, by torch's profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def without_logits(hidden, weight, bias, targets, *settings):
    """Gradients reach the same weights, and no tensor has the vocabulary in it but those."""
    return (hidden * weight[targets]).sum(-1).float(), None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "vocabulary, tokens",
    [
        # A chunk of logits in proportion: at 152k it is a seventh of the head's weight.
        (19_000, 256),
        pytest.param(152_000, 2_048, marks=pytest.mark.slow),
    ],
)
def test_an_update_takes_little_more_than_weights_optimizer_and_activations(
    monkeypatch, vocabulary, tokens, tied
):
    monkeypatch.setitem(vocabulary_head.CHUNK, "cpu", 2**20 * vocabulary // 152_000)
    monkeypatch.setattr(vocabulary_head, "KEPT", 2**24 * vocabulary // 152_000)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )
    engine = Engine(AutoModelForCausalLM.from_config(settings), learning_rate=1e-4)
    engine.optimizer = torch.optim.AdamW(engine.module.parameters(), lr=1e-4, fused=True)
    length = tokens // 4
    row = {"prompt": [5, 6], "logprobs": [-9.0] * length, "ref_logprobs": [-9.0] * length}
    row |= {"values": [0.0] * length, "score": 1.0, "finished": False}
    rows = [row | {"response": torch.arange(i, i + length).tolist()} for i in range(4)]
    config = config_of(prompts_per_rollout=4, global_batch_size=4, micro_batch_size=4)
    experience, _ = make_experience(rollout_of(rows), config, State(kl_coef=0.1))
    models = SimpleNamespace(actor=engine, nucleus=None, ptx=None)

    def step():
        update.step_actor(models, experience, [0, 1, 2, 3], config, torch.device("cpu"))

    step()  # the optimizer's moments come with its first step
    weights = sum(p.numel() * 4 for p in engine.module.parameters())
    held = 3 * weights  # and two moments each
    actual = held + peak_bytes(step)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary_head._LogProbs, "apply", without_logits)
        lean = held + peak_bytes(step)
    logits = 4 * vocabulary * tokens
    assert lean > 4 * weights, "the gradients are in it"
    assert lean < held + 2.5 * weights + logits / 4, "and logits are not"
    assert actual < 1.3 * lean, f"{actual / lean:.2f} × the {lean:,} bytes without logits"
