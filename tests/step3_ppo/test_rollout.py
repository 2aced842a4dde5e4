"""What a rollout holds, against each row decoded and scored alone."""

from types import SimpleNamespace

import pytest
import torch

from step3_ppo import rollout
from tests.helpers.small_models import Engine, config_of, drawn_rows, rollout_of
from tests.utils.generation.test_decoder import stop_of
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, left_padded, tiny
from utils.distributed import process_group
from utils.generation import sampling as generation
from utils.generation.engines.native import NativeEngine
from utils.models import language_model


def models_of(model) -> SimpleNamespace:
    """A policy that is its own reference, and nobody who scores."""
    actor = Engine(model)
    absent = ("critic", "reward", "judge", "reward_function", "environment", "nucleus")
    none = dict.fromkeys((*absent, "frozen_offload"))
    return SimpleNamespace(
        **none,
        tokenizer=SimpleNamespace(
            eos_token_id=stop_of("Llama")[0],
            pad_token_id=PAD,
            batch_decode=lambda ids, skip_special_tokens: [""] * len(ids),
        ),
        actor=actor,
        reference=model,
        rollout_engine=NativeEngine(tokens_at_once=40),
    )


@pytest.mark.parametrize("source, passes", [("decode", 1), ("forward", 2)])
def test_a_rollout_scores_with_the_actor_only_where_it_must(source, passes, monkeypatch):
    """Prompts out of order, some twice, in small batches; the reference's pass is always there."""
    model, asked = tiny("Llama"), []
    score = language_model.response_logprobs
    monkeypatch.setattr(
        language_model, "response_logprobs", lambda *a, **k: asked.append(1) or score(*a, **k)
    )
    models = models_of(model)
    ids, mask = left_padded(LENGTHS)
    prompts = [
        rollout.Prompt((), "", {}, row[m].tolist()) for row, m in zip(ids, mask, strict=True)
    ]
    prompts = [prompts[i] for i in (0, 0, 3, 1, 5, 3, 2, 4)]
    config = config_of(max_response_length=NEW, temperature=1.3, micro_batch_size=8)
    config.logprobs_from = source
    device = torch.device("cpu")
    found, _ = rollout.collect(models, prompts, config, device, noise_step=0, copies=2)
    assert found.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3], "by their place, whatever the prompt"
    assert len(asked) == passes
    noise = generation.uniform_noise(len(prompts), NEW, config.seed, 0)
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([prompt.ids])
        response = generation.generate(
            model,
            alone,
            torch.ones_like(alone, dtype=torch.bool),
            max_new_tokens=NEW,
            stop_id=models.tokenizer.eos_token_id,
            pad_id=PAD,
            temperature=1.3,
            noise=noise[[row]],
        )
        kept = found.response_mask[row]
        assert found.response_ids[row][kept].tolist() == response[0, : kept.sum()].tolist()
        assert found.prompt_ids[row][found.prompt_mask[row]].tolist() == prompt.ids
    torch.testing.assert_close(found.logprobs, found.ref_logprobs, rtol=0, atol=3e-5)
    entropies = score(
        model,
        torch.cat([found.prompt_ids, found.response_ids], 1),
        torch.cat([found.prompt_mask, found.response_mask], 1),
        found.response_ids.shape[1],
        temperature=1.3,
        with_entropies=True,
    )[1]
    expected = entropies * found.response_mask
    torch.testing.assert_close(found.entropies, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_groups_survive_the_way_over_ranks_and_micro_batches(world, monkeypatch):
    """Rows dealt by the length of their prompts, gathered, and selected again, with their group."""
    rows = [row | {"group": i // 2} for i, row in enumerate(drawn_rows(8, 12, seed=1))]
    whole = rollout_of(rows)
    order = [5, 0, 7, 2, 4, 1, 3, 6]
    dealt = (order + order[: -len(order) % world])[: -(-len(order) // world) * world]
    own = [len(order[rank::world]) for rank in range(world)]
    parts = [whole.select(dealt[rank::world][: own[rank]]) for rank in range(world)]
    monkeypatch.setattr(process_group, "world_size", lambda: world)
    monkeypatch.setattr(process_group, "gather_objects", lambda part: parts)
    found = rollout.gather(whole.select(dealt[::world]), order)
    assert found.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(found.scores, whole.scores)
    assert found.select([6, 1, 3]).group.tolist() == [3, 0, 1]


def test_an_engine_that_samples_from_another_policy_stops_the_run():
    rows = drawn_rows(5, 9, seed=4)
    for row in rows:
        row["engine"] = [x + 0.25 for x in row["logprobs"]]
    found = rollout_of(rows)
    rollout.check_gap(found, 0.2501)
    with pytest.raises(process_group.StopRun, match="engine_gap 0.25 .*--engine_gap_limit 0.2499"):
        rollout.check_gap(found, 0.2499)
    found.engine_logprobs[tuple(found.action_mask.nonzero()[0].tolist())] = torch.nan
    with pytest.raises(process_group.StopRun, match="engine_gap nan"):
        rollout.check_gap(found, 0.3)
